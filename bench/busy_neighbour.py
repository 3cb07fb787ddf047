"""Decode with two threads over one, beside processes that take cores: never below 1 is the aim.

    python bench/busy_neighbour.py --model FOLDER [--neighbours 0 1 2] [--pairs 14] [--nice 0]
        [--threads 2] [--tokens 64] [--json FILE]

Runs of one and of several threads alternate, each in a process of its own; a pair's ratio is
that of their tokens/s, and the median of the ratios counts. A neighbour is a process that never
sleeps. Wants a machine that is otherwise quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

# Prints tokens/s of `tokens` tokens after a prompt of 64.
RUN = """
import sys, time
import mustafar
folder, threads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with mustafar.Model(folder, threads=threads) as model, mustafar.Session(model) as session:
    session.prefill(list(range(100, 164)))
    start = time.perf_counter()
    out = session.generate([5], max_new_tokens=tokens, temperature=0, ignore_eos=True)
    print(len(out.token_ids) / (time.perf_counter() - start))
"""


def speed(options: argparse.Namespace, threads: int) -> float:
    command = [sys.executable, "-c", RUN, options.model, str(threads), str(options.tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(options: argparse.Namespace, count: int) -> dict[str, object]:
    busy = [
        subprocess.Popen(
            [sys.executable, "-c", "while 1: pass"], preexec_fn=lambda: os.nice(options.nice)
        )
        for _ in range(count)
    ]
    try:
        pairs = [(speed(options, 1), speed(options, options.threads)) for _ in range(options.pairs)]
    finally:
        for process in busy:
            process.kill()
    ratios = [several / one for one, several in pairs]
    median = statistics.median(ratios)
    print(
        f"{count} neighbours: {options.threads} threads over one {median:.3f}"
        f" [{min(ratios):.3f}, {max(ratios):.3f}], {len(ratios)} pairs;"
        f" one {statistics.median(one for one, _ in pairs):.1f} tokens/s",
        flush=True,
    )
    return {"neighbours": count, "threads": options.threads, "median": median, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=14)
    parser.add_argument("--nice", type=int, default=0, help="of the neighbours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = [measure(options, count) for count in options.neighbours]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
