"""tools/compare_kv.py: its figures against those of `mustafar perplexity`, its sums, its file."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import mustafar
from support.command import needs_command, run
from support.paths import DEMO, ROOT, load_tool

tool = load_tool(ROOT / "tools" / "compare_kv.py")


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """The text that is scored."""
    path = tmp_path / "scored.py"
    path.write_text(Path(argparse.__file__).read_text())
    return path


SKIPPED = b"skipped\n" * 1000


@pytest.fixture
def text(tmp_path: Path, scored: Path) -> Path:
    """The same after something else."""
    path = tmp_path / "text.py"
    path.write_bytes(SKIPPED + scored.read_bytes())
    return path


def start_of(text: Path) -> float:
    """The fraction of a text that lies in the last skipped line."""
    return (len(SKIPPED) - 4) / text.stat().st_size


def run_tool(monkeypatch: pytest.MonkeyPatch, text: Path, out: Path, *options: str) -> list[dict]:
    arguments = ["compare_kv.py", "mustafar", "--model", str(DEMO), "--text", str(text)]
    arguments += ["--start", str(start_of(text)), "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    tool.main()
    return json.loads(out.read_text())


@needs_command
def test_the_whole_protocol_is_that_of_the_command(
    text: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run_tool(monkeypatch, text, tmp_path / "o.json", "--chunks", "2", "--protocol", "whole")
    flags = {
        "dense": ("--kv", "dense"),
        "int4 hadamard": ("--kv-dtype", "int4", "--profile", "hadamard"),
        "sparse K .625 V .75": (
            "--k-sparsity",
            "0.625",
            "--v-sparsity",
            "0.75",
            "--kv-dtype",
            "auto",
        ),
    }
    by_name = {row["setting"]: row for row in rows}
    for name, options in flags.items():
        result = run(
            "perplexity", "-m", DEMO, "-f", scored, "-c", 1024, "--chunks", 2, "--json", *options
        )
        (theirs,) = json.loads(result.stdout)["results"]
        row = by_name[name]
        assert row["tokens"] == theirs["tokens"] == 2 * 1023
        assert row["of_dense_bytes"] == pytest.approx(theirs["of_dense"], abs=1e-4)
        for key in ("ppl", "ppl_error"):
            assert row[key] == pytest.approx(theirs[key], rel=1e-4), (name, key)
        for key in ("kld_mean", "kld_mean_error"):
            assert row[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), (name, key)


def test_prefilled_rows_score_what_follows(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense cache gives what one call over the chunk gives; an ended run goes on."""
    out = tmp_path / "new" / "o.json"
    options = ("--protocol", "prefill 768", "--chunks")
    first = run_tool(monkeypatch, text, out, *options, "1")
    both = run_tool(monkeypatch, text, out, *options, "2")
    at_once = run_tool(monkeypatch, text, tmp_path / "p.json", *options, "2")
    assert [row["tokens"] for row in first] == [255] * len(first)
    assert [row["tokens"] for row in both] == [510] * len(first)
    for row, other in zip(both, at_once, strict=True):
        assert row["setting"] == other["setting"] and row["chunks"] == 2
        assert row["sums"] == pytest.approx(other["sums"], rel=1e-6, abs=1e-9)

    with mustafar.Model(DEMO, device="cpu") as model:
        args = argparse.Namespace(text=text, start=start_of(text), model=DEMO, chunks=1)
        (chunk,) = tool.chunks_of(args)
        nll = -mustafar.Session(model, mustafar.KVConfig.preset("dense")).score(chunk)[-255:]
    by_name = {row["setting"]: row for row in first}
    assert by_name["dense"]["ppl"] == pytest.approx(math.exp(nll.mean()), rel=2e-3)
    assert by_name["dense"]["kld_mean"] == 0
    for name, row in by_name.items():
        if name != "dense":
            assert 0 < row["kld_mean"] < 1
            assert row["of_dense_bytes"] < row["cache_of_dense"] < 1


def test_figures_are_means_and_their_errors() -> None:
    rng = np.random.default_rng(0)
    logits, dense = rng.standard_normal((2, 50, 7)).astype(np.float32)
    targets = rng.integers(0, 7, 50).tolist()
    rows = np.exp(logits.astype(np.float64))
    p = rows / rows.sum(-1, keepdims=True)
    rows = np.exp(dense.astype(np.float64))
    q = rows / rows.sum(-1, keepdims=True)
    nll = -np.log(p[np.arange(50), targets])
    kld = (q * np.log(q / p)).sum(-1)
    figures = tool.figures(tool.sums_of(logits, tool.log_softmax(dense), targets))
    assert figures["tokens"] == 50
    assert figures["ppl"] == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert figures["kld_mean"] == pytest.approx(kld.mean(), rel=1e-4)
    error = nll.std(ddof=1) / 50**0.5
    assert figures["ppl_error"] == pytest.approx(np.exp(nll.mean()) * error, rel=1e-4)
    assert figures["kld_mean_error"] == pytest.approx(kld.std(ddof=1) / 50**0.5, rel=1e-4)


def test_a_row_measured_otherwise_starts_anew(tmp_path: Path) -> None:
    table = tool.Table(tmp_path / "o.json")
    row = {"method": "m 1", "setting": "s", "protocol": "p", "command": "c", "of_dense_bytes": 0.5}
    table.put(row | {"chunks": 3, "sums": [1, 2, 3, 4, 5]})
    again = tool.Table(tmp_path / "o.json")
    done, sums = again.sums(row)
    assert done == 3 and sums.tolist() == [1, 2, 3, 4, 5]
    for change in ({"method": "m 2"}, {"command": "d"}, {"of_dense_bytes": 0.25}):
        assert again.sums(row | change)[0] == 0
    again.put(row | {"method": "m 2", "chunks": 1, "sums": [0] * 5})
    (only,) = json.loads((tmp_path / "o.json").read_text())
    assert only["method"] == "m 2"
