"""Draws what caches cost in quality, from committed results, as SVG.

    pip install matplotlib
    python tools/plot_quality.py docs/results docs

Reads quality.json and needle.json (`mustafar eval`), quality-lab.json (tools/kv_lab.py) and
rows.json (below), writes quality.svg (KL divergence against bytes), needle.svg (what is found, by
length and depth, and against bytes) and rows.svg (root mean square of keys and values by dim).

    python tools/plot_quality.py docs/results docs --rows MODEL TEXT

gathers rows.json first: moments of one layer and KV head on the text, as computed and in the basis
that `profile="auto"` has for the model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

LAYER, HEAD = 15, 0  # one in the middle of the model


def family_of(config: dict[str, Any]) -> str:
    """What a setting of the product is drawn as."""
    if config["value_dtype"] == "coded":
        return "coded: bits by energy"
    if config["k_sparsity"] or config["v_sparsity"]:
        basis = "calibrated basis" if config["profile"] else "as computed"
        return f"sparse, {basis}"
    return "dense integers"


def figures_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The perplexity rows of the first text in a file of `mustafar eval`, usual sinks, window."""
    rows = [row for row in results["rows"] if row["task"] == "ppl"]
    return [
        {"config": row["setting"], "of_dense": row["store"]["of_dense"], **row["result"]}
        for row in rows
        if row["parameters"] == rows[0]["parameters"]
        and (row["setting"]["sink_tokens"], row["setting"]["window"]) == (4, 32)
    ]


def draw_pareto(
    results: list[dict[str, Any]], lab: list[dict[str, Any]], figure_path: Path
) -> None:
    """KLD against bytes: one marker per family, the lab's published methods in grey."""
    figure, axes = plt.subplots(figsize=(8, 5))
    published = [row for row in lab if row["family"].startswith("Published")]
    axes.scatter(
        [row["percent"] for row in published],
        [row["kld"] for row in published],
        color="0.7",
        marker="x",
        label="published methods (PyTorch, other chunks)",
    )
    families: dict[str, list[tuple[float, float]]] = {}
    for row in results:
        if row["kld_mean"] > 0:
            point = (100 * row["of_dense"], row["kld_mean"])
            families.setdefault(family_of(row["config"]), []).append(point)
    for name, points in sorted(families.items()):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o", label=name)
    axes.set_yscale("log")
    axes.set_xlabel("bytes of a compressed token, % of 2 bytes a value")
    axes.set_ylabel("KL divergence from the dense cache, nats")
    axes.set_title("SmolLM2-135M-Instruct, 16 x 1,024 tokens")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(figure_path, metadata={"Date": None}, bbox_inches="tight")


def short_name(name: str) -> str:
    """A setting's name without the words that all have."""
    for word in ("value_dtype=", "pattern=", "profile="):
        name = name.replace(word, "")
    return name


def draw_needle(results: dict[str, Any], figure_path: Path) -> None:
    """A map of length and depth for every setting, and accuracy against bytes."""
    rows = [row for row in results["rows"] if row["task"] == "needle"]
    found: dict[str, dict[str, list[int]]] = {}  # by setting and "length@depth": right, of
    of_dense: dict[str, float] = {}
    for row in rows:
        found.setdefault(row["name"], {}).update(row["result"]["by"])
        of_dense[row["name"]] = row["store"]["of_dense"]
    names = sorted(found, key=lambda name: -of_dense[name])
    labels = {label for by in found.values() for label in by}
    lengths = sorted({int(label.split("@")[0]) for label in labels})
    depths = sorted({int(label.split("@")[1]) for label in labels})
    columns = 3
    lines = -(-(len(names) + 1) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(9, 2.3 * lines))
    for axes, name in zip(panels.flat, names, strict=False):
        share = np.full((len(lengths), len(depths)), np.nan)
        for label, (right, of) in found[name].items():
            length, depth = map(int, label.split("@"))
            share[lengths.index(length), depths.index(depth)] = right / of
            axes.text(depths.index(depth), lengths.index(length), f"{right}/{of}",
                      ha="center", va="center", fontsize=7)  # fmt: skip
        axes.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", alpha=0.7)
        axes.set_xticks(range(len(depths)), [f"{depth} %" for depth in depths], fontsize=7)
        axes.set_yticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
        axes.set_title(f"{short_name(name)} ({100 * of_dense[name]:.1f} %)", fontsize=8)
    axes = panels.flat[len(names)]
    for length in lengths:
        points = []
        for name in names:
            at = [v for label, v in found[name].items() if label.startswith(f"{length}@")]
            if at:
                points.append((100 * of_dense[name], sum(a for a, _ in at) / sum(b for _, b in at)))
        axes.plot(*zip(*points, strict=True), "o", label=f"{length} tokens")
    axes.set_xlabel("bytes, % of dense", fontsize=7)
    axes.set_title("found, against bytes", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
    for axes in panels.flat[len(names) + 1 :]:
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(figure_path, metadata={"Date": None})


def gather_rows(model_path: Path, text: Path) -> dict[str, Any]:
    """Root mean squares by dim of one layer and KV head, before and after the transform."""
    import mustafar
    from mustafar import _core

    with mustafar.Model(model_path, device="cpu") as model:
        ids = model.tokenizer.encode(text.read_text())[:4096]
        pieces = [ids[i : i + 1024] for i in range(0, len(ids), 1024)]
        moments = _core.kv_statistics(model._core, pieces, 4)
        profile = mustafar.auto_profile(model)
        out: dict[str, Any] = {"layer": LAYER, "head": HEAD}
        for kind, forward in (("keys", profile.k_forward), ("values", profile.v_forward)):
            moment = moments[kind][LAYER, HEAD] / moments["tokens"]
            f = forward[LAYER, HEAD].astype(np.float64)
            out[kind] = {
                "as computed": np.sqrt(np.diag(moment)).tolist(),
                "transformed": np.sqrt(np.diag(f.T @ moment @ f)).tolist(),
            }
        return out


def draw_rows(rows: dict[str, Any], figure_path: Path) -> None:
    """Four panels: keys and values, as computed and transformed."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 5), sharex=True)
    for line, kind in zip(panels, ("keys", "values"), strict=True):
        for axes, (name, values) in zip(line, rows[kind].items(), strict=True):
            axes.bar(range(len(values)), values, width=0.9)
            axes.set_title(f"{kind}, {name}", fontsize=9)
            axes.set_ylabel("root mean square", fontsize=8)
    for axes in panels[1]:
        axes.set_xlabel("dim")
    figure.suptitle(f"Layer {rows['layer']}, KV head {rows['head']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(figure_path, metadata={"Date": None})


def main() -> None:
    """Reads results, writes the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--rows", type=Path, nargs=2, metavar=("MODEL", "TEXT"))
    options = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "mustafar"  # the same data give the same file
    rows_file = options.results / "rows.json"
    if options.rows:
        rows_file.write_text(json.dumps(gather_rows(*options.rows), indent=1) + "\n")
    draw_rows(json.loads(rows_file.read_text()), options.figures / "rows.svg")
    results = json.loads((options.results / "quality.json").read_text())
    lab = json.loads((options.results / "quality-lab.json").read_text())
    draw_pareto(figures_of(results), lab["rows"], options.figures / "quality.svg")
    needle = json.loads((options.results / "needle.json").read_text())
    draw_needle(needle, options.figures / "needle.svg")


if __name__ == "__main__":
    main()
