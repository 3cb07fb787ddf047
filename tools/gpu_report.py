#!/usr/bin/env python3
"""Turn what the stages of tools/gpu_check.sh printed into results.json and results.md.

gpu_report.py RAW_FOLDER RESULTS_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Shape = tuple[int, ...]

SHAPE = ("batch", "context", "heads", "kv_heads")
DENSE = "dense f16"
# (setting, shape): least ratio to the best dense fp16 decode of the same run, with the memory
# bandwidth of an H100 and with that of an H200, where fewer bytes are worth less.
GOALS: dict[tuple[str, Shape], tuple[float, float]] = {
    ("f16 37.5 %", (8, 32768, 32, 8)): (2.0, 1.9),
    ("int8 22.7 %", (8, 32768, 32, 8)): (3.0, 2.7),
}
FAST_MEMORY = 3.5e12  # bytes per second copied
LEAST_DENSE_SHARE = 0.85  # of the copy bandwidth, for our own dense kernel at the goals' shapes


def rows_of(log: Path) -> list[Row]:
    """JSON lines among a stage's output; one that was cut off by the time limit is left out."""
    rows = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def shape_of(row: Row) -> Shape:
    return tuple(row[key] for key in SHAPE)


def is_valid(row: Row) -> bool:
    """A time counts where the result was right; PyTorch's is not checked by us."""
    return "us_per_layer" in row and row.get("nmse_ok", True) is True


def best_dense(rows: list[Row]) -> dict[Shape, Row]:
    """The fastest right dense decode per shape."""
    best: dict[Shape, Row] = {}
    for row in rows:
        if row.get("setting") == DENSE and is_valid(row):
            known = best.get(shape_of(row))
            if known is None or row["us_per_layer"] < known["us_per_layer"]:
                best[shape_of(row)] = row
    return best


def goal_lines(rows: list[Row], best: dict[Shape, Row], bandwidth: float = 0) -> list[str]:
    """How every goal fared; one without a measurement is "not measured", never met.

    bandwidth: bytes per second of a copy, 0 where it was not measured.
    """
    lines = []
    for (setting, shape), leasts in GOALS.items():
        least = leasts[bandwidth > FAST_MEMORY]
        name = f"{setting}, {shape[2]}/{shape[3]} heads, batch {shape[0]}, context {shape[1]}"
        mine = [r for r in rows if r.get("setting") == setting and shape_of(r) == shape]
        valid = [r for r in mine if is_valid(r)]
        # PyTorch's kernels are the peer: our own dense kernel alone is no proof.
        peer = any(
            r.get("setting") == DENSE
            and shape_of(r) == shape
            and is_valid(r)
            and str(r.get("kernel", "")).startswith("torch")
            for r in rows
        )
        if mine and not valid:
            verdict = "WRONG RESULT"
        elif not valid or shape not in best:
            verdict = "not measured"
        else:
            ratio = best[shape]["us_per_layer"] / min(r["us_per_layer"] for r in valid)
            met = "met" if ratio >= least else "MISSED"
            if met == "met" and not peer:
                met = "not shown: PyTorch's attention was not measured"
            verdict = f"{ratio:.2f}x, {met}"
        lines.append(f"- {name}: {verdict} (least {least})")
    for shape in sorted({shape for _, shape in GOALS}):
        shares = [
            r["of_copy"]
            for r in rows
            if r.get("setting") == DENSE and shape_of(r) == shape and is_valid(r) and "of_copy" in r
        ]
        verdict = "not measured"
        if shares:
            verdict = (
                f"{max(shares):.0%}, {'met' if max(shares) >= LEAST_DENSE_SHARE else 'MISSED'}"
            )
        lines.append(
            f"- own dense kernel's share of the copy bandwidth, batch {shape[0]}, context "
            f"{shape[1]}: {verdict} (least {LEAST_DENSE_SHARE:.0%})"
        )
    return lines


def table_lines(rows: list[Row], best: dict[Shape, Row]) -> list[str]:
    lines = [
        "| batch | context | heads | kernel | setting | us / layer | of copy | ratio to the best "
        "dense | NMSE |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape = shape_of(row)
        cells = [row["batch"], row["context"], f"{row['heads']}/{row['kv_heads']}"]
        cells += [row["kernel"], row["setting"]]
        if "us_per_layer" not in row:
            cells += ["not available: " + str(row.get("error", "no time")), "", "", ""]
        else:
            ratio = ""
            if is_valid(row) and shape in best:
                ratio = f"{best[shape]['us_per_layer'] / row['us_per_layer']:.2f}"
            copy = f"{row['of_copy']:.0%}" if "of_copy" in row else ""
            nmse = f"{row['nmse']:.2g}" if isinstance(row.get("nmse"), float) else ""
            if row.get("nmse_ok", True) is not True:
                nmse += " WRONG"
            cells += [f"{row['us_per_layer']:.1f}", copy, ratio, nmse]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return lines


def any_table(rows: list[Row]) -> list[str]:
    """Rows of any keys, a column each, in the order in which keys first come."""
    if not rows:
        return ["not measured"]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = (str(row.get(key, "")).replace("|", "/") for key in keys)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(raw: Path) -> tuple[str, dict[str, Any]]:
    """Markdown and JSON of a folder of raw outputs; parts that are not there are said to be."""
    machine = dict(line.split(" ", 1) for line in (raw / "machine.txt").read_text().splitlines())
    stages = dict(
        line.split(": ", 1) for line in (raw / "stages.txt").read_text().splitlines() if line
    )
    logs = sorted([*raw.glob("bench*.log"), *raw.glob("torch*.log")])
    printed = [row for log in logs for row in rows_of(log)]
    rows = [r for r in printed if all(key in r for key in (*SHAPE, "kernel", "setting"))]
    devices = [r for r in printed if "copy_bandwidth" in r]
    best = best_dense(rows)
    bandwidth = max((d["copy_bandwidth"] for d in devices), default=0)
    goals = goal_lines(rows, best, bandwidth)
    lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in machine.items())]
    if devices:
        lines.append(f"- copy bandwidth: {bandwidth / 1e12:.2f} TB/s")
    lines += ["", "## Stages", "", *(f"- {name}: {end}" for name, end in stages.items())]
    lines += ["", "## Goals", "", *goals]
    lines += ["", "## Decode attention", ""]
    lines += table_lines(rows, best) if rows else ["not measured"]
    for title, name in (("Prefill attention", "prefill"), ("Linear layers", "linear")):
        other = rows_of(raw / f"{name}.log")
        if name == "prefill":
            other += [row for row in printed if "prefill" in row]
        lines += ["", f"## {title}", "", *any_table(other)]
    for log in sorted(raw.glob("model_*.log")):
        lines += ["", f"## {log.stem}", "", log.read_text(errors="replace").rstrip()]
    sass = raw / "sass.md"
    if sass.exists():
        lines += ["", "## Instructions", "", sass.read_text().rstrip()]
    results = {
        "machine": machine,
        "devices": devices,
        "stages": stages,
        "goals": [goal.removeprefix("- ") for goal in goals],
        "rows": rows,
    }
    return "\n".join(lines) + "\n", results


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: gpu_report.py RAW_FOLDER RESULTS_FOLDER", file=sys.stderr)
        return 2
    raw, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    markdown, results = report(raw)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text(markdown)
    print(markdown, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
