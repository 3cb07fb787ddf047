#!/usr/bin/env python3
"""Turn a folder of tools/gpu_check.sh into results.json and results.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# (setting, shape): least and hoped-for ratio to the best dense fp16 decode of the same run.
GOALS = {
    ("f16 37.5 %", (8, 32768, 32, 8)): (1.9, 2.3),
    ("int8 22.7 %", (8, 32768, 32, 8)): (2.7, 3.4),
}
SHAPE = ("batch", "context", "heads", "kv_heads")


def rows_of(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def main() -> int:
    folder = Path(sys.argv[1])
    machine = dict(line.split(" ", 1) for line in (folder / "machine.txt").read_text().splitlines())
    stages = (folder / "stages.txt").read_text().splitlines()
    rows = rows_of(folder / "bench.jsonl") + rows_of(folder / "torch.jsonl")
    measured = [r for r in rows if "us_per_layer" in r]
    best: dict[tuple[int, ...], float] = {}
    for r in measured:
        if r["setting"] == "dense f16":
            shape = tuple(r[key] for key in SHAPE)
            best[shape] = min(best.get(shape, float("inf")), r["us_per_layer"])
    lines = [
        "# GPU check",
        "",
        *(f"- {key}: {value}" for key, value in machine.items()),
        "",
        *(f"- {line}" for line in stages),
        "",
    ]
    if measured:
        lines += [
            "| batch | context | heads | kernel | setting | us / layer | of copy | against the "
            "best dense | goal | NMSE |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    for r in measured:
        shape = tuple(r[key] for key in SHAPE)
        r["ratio"] = round(best[shape] / r["us_per_layer"], 3) if shape in best else None
        least, hoped = GOALS.get((r["setting"], shape), (None, None))
        goal = f"{least} ({hoped})" if least else ""
        copy = f"{r['of_copy']:.0%}" if "of_copy" in r else ""
        lines.append(
            f"| {r['batch']} | {r['context']} | {r['heads']}/{r['kv_heads']} | {r['kernel']} "
            f"| {r['setting']} | {r['us_per_layer']:.1f} | {copy} | {r['ratio']} | {goal} | "
            f"{r.get('nmse', '')} |"
        )
    sass = folder / "sass.md"
    if sass.exists():
        lines += ["", "## Instructions", "", sass.read_text()]
    (folder / "results.json").write_text(
        json.dumps({"machine": machine, "stages": stages, "rows": rows}, indent=1) + "\n"
    )
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
