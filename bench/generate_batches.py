"""Tokens a second of Model.generate with few and many prompts.

    python bench/generate_batches.py FOLDER [--weights int8] [--threads 2]

Greedy, short prompts, sizes take turns; medians are printed. MUSTAFAR_ISA chooses the kernels.
"""

from __future__ import annotations

import argparse
import statistics
import time

import mustafar

SIZES = (1, 4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64, help="of every reply")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    greedy = mustafar.SamplingParams(max_new_tokens=args.tokens, temperature=0, ignore_eos=True)
    prompts = [f"Once upon a time there was number {i} and" for i in range(max(SIZES))]
    speeds: dict[int, list[float]] = {size: [] for size in SIZES}
    with mustafar.Model(args.model, weights=args.weights, threads=args.threads) as model:
        model.generate(prompts[:2], greedy)
        for _ in range(args.rounds):
            for size in SIZES:
                start = time.perf_counter()
                model.generate(prompts[:size], greedy)
                speeds[size].append(size * args.tokens / (time.perf_counter() - start))
    one = statistics.median(speeds[1])
    for size, of_size in speeds.items():
        speed = statistics.median(of_size)
        spread = f"({min(of_size):.0f}-{max(of_size):.0f})"
        print(f"{size:3} prompts  {speed:6.1f} tokens/s  {spread:12} {speed / one:.1f} times one")


if __name__ == "__main__":
    main()
