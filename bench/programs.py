"""Speed beside llama.cpp on the same weights: `mustafar bench` and `llama-bench` take turns.

    python bench/programs.py -m FOLDER --llama-bench PROGRAM \\
        --peer int8=Q8_0.gguf --peer int4=Q4_0.gguf --peer int4=Q4_K_M.gguf

Each program has the machine to itself while it runs, so that no idle threads of the other disturb
steps of a few milliseconds (bench/peers.py runs both in one process). A round runs every test once
with every program; figures are medians over rounds, ratios are to the fastest of the files that
have been named for the same weights. Flash attention is on in llama.cpp, its cache is f16, ours
what --kv says. Depths of ours are random keys and values, llama.cpp's are computed. Tests:

    pp512         tokens/s of a prompt of 512 tokens
    tg32@16384    tokens/s of 32 tokens, one by one, after 16,384
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path


def split_test(test: str) -> tuple[int, int, int]:
    """Tokens of the prompt, tokens made and depth of a test's name."""
    match = re.fullmatch(r"(pp|tg)(\d+)(?:@(\d+))?", test)
    if not match:
        raise SystemExit(f"{test}: expected pp512 or tg32@16384")
    tokens, depth = int(match[2]), int(match[3] or 0)
    return (tokens, 0, depth) if match[1] == "pp" else (0, tokens, depth)


def run_json(command: list[str]) -> list[dict[str, float]]:
    """What a program prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    found: list[dict[str, float]] = json.loads(done.stdout)
    return found


def ours(args: argparse.Namespace, weights: str, test: str) -> float:
    """Tokens a second of `mustafar bench`."""
    prompt, made, depth = split_test(test)
    words = [args.mustafar, "bench", "-m", str(args.model), "-w", weights, "-r", "1", "--json"]
    words += ["-p", str(prompt), "-n", str(made), "-d", str(depth), "-t", str(args.threads)]
    return run_json([*words, "--kv", args.kv])[0]["avg_ts"]


def theirs(args: argparse.Namespace, path: str, test: str) -> float:
    """Tokens a second of `llama-bench`."""
    prompt, made, depth = split_test(test)
    words = [args.llama_bench, "-m", path, "-fa", "1", "-r", "1", "-o", "json"]
    words += ["-p", str(prompt), "-n", str(made), "-d", str(depth), "-t", str(args.threads)]
    return run_json(words)[0]["avg_ts"]


def main() -> None:
    """Runs all rounds and prints Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--peer", action="append", required=True, metavar="WEIGHTS=FILE")
    parser.add_argument("--tests", nargs="+", default=["pp512", "tg32@512", "tg16@16384"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv", default="lossless", help="our cache")
    parser.add_argument("--mustafar", default="mustafar", metavar="PROGRAM")
    parser.add_argument("--llama-bench", default="llama-bench", metavar="PROGRAM")
    args = parser.parse_args()
    files: dict[str, list[str]] = {}
    for peer in args.peer:
        weights, _, path = peer.partition("=")
        files.setdefault(weights, []).append(path)
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for test in args.tests:
            for weights, paths in files.items():
                found.setdefault((test, weights), []).append(ours(args, weights, test))
                for path in paths:
                    found.setdefault((test, path), []).append(theirs(args, path, test))
        print(".", end="", file=sys.stderr, flush=True)
    print("\n| test | weights | tokens/s | runs | beside llama.cpp |\n|---|---|---:|---|---:|")
    for test in args.tests:
        for weights, paths in files.items():
            best = max(statistics.median(found[test, path]) for path in paths)
            for name in (weights, *paths):
                runs = found[test, name]
                median = statistics.median(runs)
                ratio = f"{median / best:.2f}" if name == weights else ""
                each = ", ".join(f"{run:.1f}" for run in sorted(runs))
                print(f"| {test} | {Path(name).stem} | {median:.1f} | {each} | {ratio} |")


if __name__ == "__main__":
    main()
