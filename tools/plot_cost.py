"""Draws decode cost over context and batch from benchmark results, as SVG.

    pip install matplotlib
    python tools/plot_cost.py docs/results/cost.json docs/cost.svg

The input is what bench/measure_cost.py wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402


def main() -> None:
    """Reads results, writes one figure with two panels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args()
    results = json.loads(options.results.read_text())

    plt.rcParams["svg.hashsalt"] = "mustafar"  # the same data give the same file
    figure, (by_context, by_batch) = plt.subplots(1, 2, figsize=(10, 4))
    for name in results["settings"]:
        for axis, points, x in (
            (by_context, results["context"], "context"),
            (by_batch, results["batch"], "batch"),
        ):
            rows = [row for row in points if row["setting"] == name]
            axis.plot([r[x] for r in rows], [r["ms"] for r in rows], marker="o", label=name)
    by_context.set_xlabel("context, tokens")
    by_context.set_ylabel("decode step, ms")
    by_batch.set_xlabel(f"sequences of {results['batch_context']} tokens")
    for axis in (by_context, by_batch):
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    by_context.legend()
    figure.suptitle(f"{results['shape']}, {results['machine']}, {results['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(options.figure, metadata={"Date": None})


if __name__ == "__main__":
    main()
