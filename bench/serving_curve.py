"""What clients of a server see at a fixed memory for KV caches: dense beside compressed caches.

    PYTHONPATH=build/cpu-test/python python bench/serving_curve.py -m FOLDER --json curve.json
    ... --llama-cpp FILE.gguf    the same traffic at llama-cpp-python's server, same weights

Every setting of the cache serves 1, 4 and 16 clients with the same long prompts; each client waits
for a reply before it sends its next request. Settings take turns within a number of clients, so
that a machine that changes its speed does so for all. Prints Markdown; --json writes every report.
llama-cpp-python has one sequence at a time, in a cache of its own for one context: nothing of it is
limited by --kv-budget.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_SECONDS = 120


def measure(args: argparse.Namespace, clients: int, where: list[str], serve: list[str]) -> Any:
    """A report of `mustafar bench-serve`."""
    requests = max(args.least_requests, args.rounds * clients)
    words = [
        *("--clients", str(clients), "--requests", str(requests), "--json"),
        *("--prompt-tokens", str(args.prompt), "--prompt-sigma", "0"),
        *("--output-tokens", str(args.output), "--output-sigma", "0"),
        *("--context", str(args.prompt + args.output + 64), *where),
        *(["--text", str(args.text)] if args.text else []),
        *(["--", *serve] if serve else []),
    ]
    command = [sys.executable, "-m", "mustafar.bench_serve", *words]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not result.stdout:
        raise SystemExit("bench-serve failed: " + " ".join(command))
    return json.loads(result.stdout)


@contextlib.contextmanager
def llama_cpp(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """URL and process of llama-cpp-python's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = {
        "model": args.llama_cpp,
        "port": port,
        "n_ctx": args.prompt + args.output + 64,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "flash_attn": True,
        "interrupt_requests": False,  # or a new request ends the stream that runs
    }
    options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "llama_cpp.server", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(url + "/v1/models", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("llama-cpp-python's server did not start: " + " ".join(command))
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
            found = measure(args, clients, ["-m", str(args.model)], serve)
            reports.append({"setting": preset, "clients": clients, **found})
        if args.llama_cpp:
            print(f"llama-cpp-python, {clients} clients", file=sys.stderr)
            with llama_cpp(args) as (url, pid):
                # It knows no ignore_eos, and has a penalty that others have not.
                extra = {
                    "ignore_eos": None,
                    "stream_options": None,
                    "repeat_penalty": 1.0,
                    "logit_bias": {args.eos: -100},
                }
                where = ["--url", url, "--pid", str(pid), "--extra", json.dumps(extra)]
                where += ["--tokenizer", str(args.model)]
                found = measure(args, clients, where, [])
            reports.append({"setting": "llama-cpp-python", "clients": clients, **found})
    return reports


def markdown(args: argparse.Namespace, reports: list[dict[str, Any]]) -> str:
    """The reports as a table."""
    lines = [
        f"{args.model.resolve().name}, prompts of {args.prompt} and replies of {args.output} "
        f"tokens, {args.kv_budget} for caches, {args.threads} threads; "
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
    parser.add_argument("-m", "--model", type=Path, required=True, help="folder")
    parser.add_argument("--presets", nargs="+", default=["lossless", "balanced", "small"])
    parser.add_argument("--kv-budget", default="400M", help="for all caches together")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=1, help="requests of every client")
    parser.add_argument("--least-requests", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--text", type=Path, help="that prompts are cut from; else Python's")
    parser.add_argument("--llama-cpp", metavar="GGUF", help="the same weights for llama.cpp")
    parser.add_argument("--eos", default="2", help="the end token's id, for llama.cpp")
    parser.add_argument("--json", type=Path, help="write the reports here")
    args = parser.parse_args()
    args.load = os.getloadavg()[0]
    reports = run_all(args)
    print(markdown(args, reports))
    if args.json:
        args.json.write_text(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
