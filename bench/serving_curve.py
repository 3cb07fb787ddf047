"""What clients of a server see at a fixed memory for KV caches: dense beside compressed caches.

    PYTHONPATH=build/cpu-test/python python bench/serving_curve.py -m FOLDER --json curve.json
    ... --llama-server PROGRAM --gguf FILE    the same traffic at llama.cpp's server, same weights
    ... --shape llama-3-8b --tokenizer FILE    random weights of a known shape in place of -m

Every setting of the cache serves 1, 4 and 16 clients with the same long prompts; each client waits
for a reply before it sends its next request. Settings take turns within a number of clients, so
that a machine that changes its speed does so for all. Prints Markdown; --json writes every report.
llama.cpp's server has as many slots, each with its own part of the context, as --kv-budget holds of
its cache's type, and clients at most; what it keeps of prompts beside them is off.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from random_llama import SHAPES, parse_shape, write_folder

START_SECONDS = 120
LLAMA_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # of a value in llama.cpp's caches


def measure(args: argparse.Namespace, clients: int, where: list[str], serve: list[str]) -> Any:
    """A report of `mustafar bench-serve`."""
    requests = max(args.least_requests, args.rounds * clients)
    words = [
        *("--clients", str(clients), "--requests", str(requests), "--json"),
        *("--prompt-tokens", str(args.prompt), "--prompt-sigma", "0"),
        *("--output-tokens", str(args.output), "--output-sigma", "0"),
        *("--context", str(args.context), *where),
        *(["--text", str(args.text)] if args.text else []),
        *(["--", *serve] if serve else []),
    ]
    command = [sys.executable, "-m", "mustafar.bench_serve", *words]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not result.stdout:
        raise SystemExit("bench-serve failed: " + " ".join(command))
    return json.loads(result.stdout)


def llama_slots(args: argparse.Namespace, kind: str) -> int:
    """Sequences of llama.cpp that the budget holds with a cache of this type."""
    config = json.loads((args.model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads", heads)
    values = 2 * config["num_hidden_layers"] * kv_heads * head_dim * args.context
    return int(size_in_bytes(args.kv_budget) // (values * LLAMA_BYTES[kind]))


def size_in_bytes(text: str) -> int:
    """As --kv-budget spells it."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    unit = units.get(text[-1].upper())
    return int(text[:-1]) * unit if unit else int(text)


@contextlib.contextmanager
def llama_server(args: argparse.Namespace, kind: str, slots: int) -> Iterator[tuple[str, int]]:
    """URL and process of llama.cpp's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = {
        "model": args.gguf,
        "port": port,
        "parallel": slots,
        "ctx-size": slots * args.context,
        "cache-type-k": kind,
        "cache-type-v": kind,
        "flash-attn": "on",
        "threads": args.threads,
        "threads-batch": args.threads,
        "cache-ram": 0,
    }
    options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    command = [str(args.llama_server), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(url + "/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("llama.cpp's server did not start: " + " ".join(command))
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A report for every setting and number of clients, with the setting's name."""
    reports = []
    for clients in args.clients:
        for preset in args.presets:
            print(f"{preset}, {clients} clients", file=sys.stderr)
            serve = ["--kv", preset, "--kv-budget", args.kv_budget, "-t", str(args.threads)]
            serve += args.serve
            found = measure(args, clients, ["-m", str(args.model)], serve)
            reports.append({"setting": preset, "clients": clients, **found})
        for kind in args.llama_kv if args.llama_server else ():
            slots = min(llama_slots(args, kind), clients)
            print(f"llama.cpp {kind}, {clients} clients, {slots} slots", file=sys.stderr)
            if slots == 0:
                continue
            with llama_server(args, kind, slots) as (url, pid):
                where = ["--url", url, "--pid", str(pid), "--tokenizer", str(args.model)]
                found = measure(args, clients, where, [])
            reports.append(
                {"setting": f"llama.cpp, {kind}", "clients": clients, "slots": slots, **found}
            )
    return reports


def markdown(args: argparse.Namespace, reports: list[dict[str, Any]]) -> str:
    """The reports as a table."""
    lines = [
        f"{args.model.resolve().name}, prompts of {args.prompt} and replies of {args.output} "
        f"tokens, {args.kv_budget} for caches, {args.threads} threads{args.with_options}; "
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, load {args.load:.2f} before.",
        "",
        "| clients | cache | first token p50 s | between tokens p50, p99 ms | request p50 s "
        "| replies tokens/s | prompts tokens/s | running most | caches most MiB | failed |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for found in reports:
        first, between = found["time_to_first_token"], found["time_between_tokens"]
        if first is None or between is None:
            lines.append(f"| {found['clients']} | {found['setting']} | no reply | | | | | | | |")
            continue
        server = found["server"]
        running = f"{server['running']['most']:.0f}" if "running" in server else "-"
        running = str(found.get("slots", running))
        caches = f"{server['kv_bytes']['most'] / 2**20:.0f}" if "kv_bytes" in server else "-"
        bad = found["requests"]["failed"] + found["requests"]["refused"]
        lines.append(
            f"| {found['clients']} | {found['setting']} | {first['p50']:.2f} "
            f"| {1000 * between['p50']:.1f}, {1000 * between['p99']:.1f} "
            f"| {found['request_time']['p50']:.2f} | {found['output_tokens_per_second']:.1f} "
            f"| {found['prompt_tokens_per_second']:.0f} | {running} | {caches} | {bad} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the options, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("-m", "--model", type=Path, help="folder")
    model.add_argument("--shape", help=f"{', '.join(SHAPES)}: random bf16 weights of that shape")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json for --shape")
    parser.add_argument("--folder", type=Path, help="where --shape may write; else a temporary one")
    parser.add_argument(
        "--serve", nargs=argparse.REMAINDER, default=[], help="further options of mustafar serve"
    )
    parser.add_argument("--presets", nargs="+", default=["lossless", "balanced", "small"])
    parser.add_argument("--kv-budget", default="400M", help="for all caches together")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=1, help="requests of every client")
    parser.add_argument("--least-requests", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--text", type=Path, help="that prompts are cut from; else Python's")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's program; needs --gguf")
    parser.add_argument("--gguf", type=Path, help="the same weights for it")
    parser.add_argument("--llama-kv", nargs="+", choices=LLAMA_BYTES, default=list(LLAMA_BYTES))
    parser.add_argument("--json", type=Path, help="write the reports here")
    args = parser.parse_args()
    args.load = os.getloadavg()[0]
    args.context = args.prompt + args.output + 64
    args.with_options = ", " + " ".join(args.serve) if args.serve else ""
    if args.llama_server and not args.gguf:
        parser.error("--llama-server needs --gguf")
    if args.shape and not args.tokenizer:
        parser.error("--shape needs --tokenizer")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.shape:
            args.model = Path(folder) / args.shape.replace(":", "-")
            write_folder(parse_shape(args.shape), args.model)
            shutil.copy(args.tokenizer, args.model / "tokenizer.json")
        reports = run_all(args)
    print(markdown(args, reports))
    if args.json:
        args.json.write_text(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
