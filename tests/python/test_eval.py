"""`mustafar eval` and `mustafar perplexity`: what they measure, and results that survive a stop."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Session
from support.command import COMMAND, needs_command, run
from support.paths import DEMO, ROOT

pytestmark = needs_command

# The model knows Python, so its own sources are text to it; what they say may change.
SOURCES = ROOT / "python" / "mustafar"
TEXT = "\n".join(
    path.read_text()
    for path in (*sorted((SOURCES / "reference").glob("*.py")), SOURCES / "calibration.py")
)
# Another setting by name, but the same values in the same places as the dense cache.
LIKE_DENSE = "sparsity=0,value_dtype=bf16"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def eval_json(*arguments: object) -> dict:
    result = run("eval", "-m", DEMO, "-t", 2, "--json", *arguments)
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stderr, "a progress bar outside a terminal"
    return json.loads(result.stdout)


def by_name(out: dict, task: str) -> dict[str, dict]:
    return {row["name"]: row["result"] for row in out["rows"] if row["task"] == task}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_perplexity_is_that_of_the_sessions_own_scores(text: Path) -> None:
    """Chunks scored side by side against each one alone, and figures against numpy's."""
    arguments = ["-c", 200, "--chunks", 5, "--sparsity", 0.6, "--sinks", 4, "--json"]
    result = run("perplexity", "-m", DEMO, "-f", text, *arguments)
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout)
    assert out["chunks"] == 5 and out["chunk_tokens"] == 200
    row, dense_row = out["results"][0], out["dense"]
    with mustafar.Model(DEMO, device="cpu") as model:
        tokenizer = model.tokenizer
        prefix = tokenizer.encode("")
        ids = tokenizer.encode(TEXT, add_special=False)
        step = 200 - len(prefix)
        nll, divergence, same = [], [], 0
        dense_nll = []
        for chunk in range(5):
            tokens = [*prefix, *ids[chunk * step : (chunk + 1) * step]]
            dense = log_softmax(Session(model, KVConfig.preset("dense")).score_logits(tokens))
            session = Session(model, KVConfig(sparsity=0.6, sink_tokens=4))
            pruned = log_softmax(session.score_logits(tokens))
            at = np.arange(len(tokens) - 1), np.array(tokens[1:])
            assert np.abs(session.score(tokens) - pruned[at]).max() < 1e-4
            nll.append(-pruned[at])
            dense_nll.append(-dense[at])
            divergence.append((np.exp(dense) * (dense - pruned)).sum(-1))
            same += (dense.argmax(-1) == pruned.argmax(-1)).sum()
    n = 5 * 199
    assert row["tokens"] == n
    assert row["ppl"] == pytest.approx(math.exp(np.concatenate(nll).mean()), rel=1e-4)
    assert dense_row["ppl"] == pytest.approx(math.exp(np.concatenate(dense_nll).mean()), rel=1e-4)
    d = np.concatenate(divergence)
    assert row["kld_mean"] == pytest.approx(d.mean(), rel=1e-3)
    assert row["kld_mean_error"] == pytest.approx(d.std(ddof=1) / math.sqrt(n), rel=1e-2)
    assert row["kld_median"] == pytest.approx(np.median(d), rel=1e-2, abs=2e-6)
    assert row["same_top_p"] == pytest.approx(same / n, abs=2 / n)
    assert dense_row["kld_mean"] == 0 and row["kld_mean"] > 0


def test_a_setting_that_loses_nothing_costs_nothing(text: Path) -> None:
    out = eval_json(
        "-f", text, "--settings", f"{LIKE_DENSE}; sparsity=0.8,pattern=row",
        "--lengths", 300, "--depths", "20,80", "--chunks", 2, "-c", 150, "--facts", 3, "-n", 12,
    )  # fmt: skip
    for task in ("ppl", "needle", "needle-multi", "copy", "qa"):
        rows = by_name(out, task)
        assert list(rows) == ["dense", LIKE_DENSE, "sparsity=0.8,pattern=row"], task
        assert rows["dense"] == rows[LIKE_DENSE], task
    ppl = by_name(out, "ppl")
    assert ppl[LIKE_DENSE]["kld_mean"] == 0 and ppl[LIKE_DENSE]["same_top_p"] == 1
    assert ppl["sparsity=0.8,pattern=row"]["kld_mean"] > 0
    needle = by_name(out, "needle")["dense"]
    assert needle["agreement"] == 1 and needle["questions"] == 2
    assert list(needle["by"]) == ["300@20", "300@80"]
    assert all(isinstance(answer, str) for answer in needle["answers"])
    assert by_name(out, "qa")["dense"]["questions"] == 3
    copy = by_name(out, "copy")
    assert copy["sparsity=0.8,pattern=row"]["agreement"] < 1
    for row in out["rows"]:
        if row["task"] != "ppl":
            result = row["result"]
            assert result["low"] <= result["accuracy"] <= result["high"]
            assert result["right"] == sum(right for right, _ in result["by"].values())
            assert result["questions"] == sum(n for _, n in result["by"].values())


def test_what_a_file_of_results_has_is_not_run_again(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ["-f", text, "--tasks", "ppl,copy", "-c", 150, "--chunks", 2, "--lengths", 300]
    first = eval_json(*arguments, "--settings", "sparsity=0.5", "-o", file)
    saved = json.loads(file.read_text())
    assert len(saved["rows"]) == len(first["rows"]) == 4
    assert saved["rows"] == first["rows"]

    # A figure nobody could measure shows that it was read.
    for row in saved["rows"]:
        if row["task"] == "ppl":
            row["result"]["ppl"] = 12345.5
    file.write_text(json.dumps(saved))
    again = eval_json(*arguments, "--settings", "sparsity=0.5; sparsity=0.7", "-o", file)
    ppl = by_name(again, "ppl")
    assert ppl["dense"]["ppl"] == ppl["sparsity=0.5"]["ppl"] == 12345.5
    assert ppl["sparsity=0.7"]["ppl"] < 12345
    assert by_name(again, "copy")["sparsity=0.5"] == by_name(first, "copy")["sparsity=0.5"]
    assert len(json.loads(file.read_text())["rows"]) == 6

    # Another text, other parameters: other rows, and the old ones stay.
    text.write_text(TEXT[100:])
    other = eval_json("-f", text, "--tasks", "ppl", "-c", 150, "--chunks", 2, "-o", file)
    assert by_name(other, "ppl")["dense"]["ppl"] < 12345
    more = eval_json("-f", text, "--tasks", "ppl", "-c", 150, "--chunks", 3, "-o", file)
    assert by_name(more, "ppl")["dense"]["tokens"] == 3 * 149
    assert len(json.loads(file.read_text())["rows"]) == 10
    assert [f for f in tmp_path.iterdir() if f.name.startswith("results")] == [file]


def test_interrupted_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ["eval", "-m", DEMO, "-t", "2", "--tasks", "needle", "--lengths", "256", "-n", "4",
                 "--depths", "0,50", "--settings", "sparsity=0.5;sparsity=0.6;sparsity=0.7",
                 "-o", file]  # fmt: skip
    slow = [*arguments, "--tries", "20"]
    process = subprocess.Popen(
        [COMMAND, *map(str, slow)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not file.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert str(file) in stderr
    kept = json.loads(file.read_text())["rows"]
    assert 1 <= len(kept) < 4
    result = run(*slow)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 4 and rows[: len(kept)] == kept


def test_interrupted_grids_of_perplexity_go_on_too(text: Path, tmp_path: Path) -> None:
    """Their rows come at the end; what is known before stands beside the file until then."""
    file = tmp_path / "results.json"
    settings = ";".join(f"sparsity={s / 100}" for s in range(50, 60))
    arguments = ["eval", "-m", DEMO, "-t", "1", "--tasks", "ppl", "-f", text, "-c", "300",
                 "--chunks", "4", "--settings", settings]  # fmt: skip

    def part() -> list[str]:
        found = list(tmp_path.glob("results.json.*.part"))
        return found[0].read_text().split() if found else []

    process = subprocess.Popen(
        [COMMAND, *map(str, arguments), "-o", str(file)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while len(part()) < 8 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130, stderr
    assert str(file) in stderr and not file.exists()

    lines = part()
    assert 8 <= len(lines) < 44
    # It goes on from what the file says: a figure that is changed there is in a row.
    changed = json.loads(lines[-1])
    assert changed["chunk"] == 3
    changed["nll"] = [0.0] * len(changed["nll"])
    (kept,) = tmp_path.glob("results.json.*.part")
    kept.write_text("\n".join([*lines[:-1], json.dumps(changed), '{"setting": "cut sh']))
    result = run(*arguments, "-o", file, "--json")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("*.part"))
    fresh = json.loads(run(*arguments, "--json").stdout)
    differ = []
    for row, expected in zip(json.loads(result.stdout)["rows"], fresh["rows"], strict=True):
        assert row["name"] == expected["name"]
        if row["result"] != expected["result"]:
            differ.append((row["result"], expected["result"]))
    ((found, expected),) = differ
    assert found["ppl"] < expected["ppl"] and found["kld_mean"] == expected["kld_mean"]


def test_tables_and_grids(tmp_path: Path) -> None:
    grid = tmp_path / "grid.txt"
    grid.write_text("# two settings\nsparsity=0.5, sinks=4  # the usual\n\ndense\ndefault\n")
    result = run("eval", "-m", DEMO, "--tasks", "needle,qa", "--lengths", 200, "--depths", 50,
                 "--facts", 2, "-n", 4, "--grid", grid, "--settings", "default,dense")  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()
    ]
    assert lines[0] == ["setting", "bytes/token", "of dense", "needle", "95 %", "as dense", "qa",
                        "95 %", "as dense"]  # fmt: skip
    assert set("".join(lines[1])) <= set("-:")
    assert [line[0] for line in lines[2:]] == ["dense", "default", "sparsity=0.5, sinks=4"]
    assert lines[2][2] == "100.0 %" and lines[3][2] == "51.6 %"
    assert all(re.fullmatch(r"\d+\.\d %", line[3]) for line in lines[2:])


LONGBENCH = [
    {"context": "The harbour master is Ada. " * 40, "input": "Who is the harbour master?",
     "answers": ["Ada", "Ada Lovelace"], "length": 200, "dataset": "harbour"},
    {"context": "word " * 5000, "input": "", "answers": ["word"], "length": 5000,
     "dataset": "long"},
]  # fmt: skip
RULER = [
    {"index": 0, "input": "One of the numbers is 77.\n" * 30 + "Which number? It is",
     "outputs": ["77", "88"], "length": 300},
]  # fmt: skip


def test_questions_from_files(tmp_path: Path) -> None:
    for name, lines in (("bench", LONGBENCH), ("ruler", RULER)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = eval_json("--jsonl", tmp_path / "bench.jsonl", "--jsonl", tmp_path / "ruler.jsonl",
                    "-n", 8, "--settings", "sparsity=0.5")  # fmt: skip
    rows = by_name(out, "jsonl:bench")
    assert set(rows) == {"dense", "sparsity=0.5"}
    assert rows["dense"]["questions"] == 2 and set(rows["dense"]["by"]) == {"harbour", "long"}
    assert 0 <= rows["dense"]["f1"] <= 1
    ruler = by_name(out, "jsonl:ruler")["dense"]
    assert ruler["questions"] == 2  # each of its outputs
    assert "f1" not in ruler
    said = ruler["answers"][0]
    assert ruler["right"] == ("77" in said) + ("88" in said)

    capped = eval_json("--jsonl", tmp_path / "bench.jsonl", "--max-cases", 1, "-n", 4)
    assert by_name(capped, "jsonl:bench")["dense"]["questions"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a"}', "line 2 has neither"),
        ("not json", "line 2 is not a JSON object"),
        ('{"context": "a b c", "input": "q", "answers": "a"}', "line 2 has neither"),
        (json.dumps(RULER[0]), "line 2 is of another kind"),
    ],
)
def test_lines_that_are_no_questions(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(LONGBENCH[0]) + "\n" + line + "\n")
    result = run("eval", "-m", DEMO, "--jsonl", file)
    assert result.returncode == 1
    assert message in result.stderr and str(file) in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "sparsty=0.5"], 'unknown key "sparsty"; the keys are'),
        (["--settings", "sparsity=half"], 'sparsity "half" is not a number'),
        (["--settings", "sparsity=1.5"], "sparsity must be"),
        (["--settings", "window=-1"], "window"),
        (["--settings", "window=3.5"], 'window "3.5" is not a number'),
        (["--settings", "pattern=rows"], "pattern must be one of"),
        (["--settings", "tiny"], "must be one of dense, lossless"),
        (["--settings", "sparsity=0.5,dense"], '"dense" must come first'),
        (["--settings", "v_policy=output_aware"], "ranks keys only"),
        (["--tasks", "ppl"], "needs a text: give -f"),
        (["--tasks", "haystack"], 'no task "haystack"'),
        (["--depths", "120"], "--depths takes percent"),
        (["--lengths", "1000000"], "more than the model's context"),
        (["--lengths", "64", "--tasks", "copy"], "no room"),
        (["--facts", "99"], "--facts"),
    ],
)
def test_bad_options_are_usage_errors(arguments: list[str], message: str) -> None:
    result = run("eval", "-m", DEMO, *arguments)
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert message in result.stderr
    assert result.stdout == ""


def test_files_that_are_no_results_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    for content in ("my notes", "[]", '{"format": "other"}'):
        file.write_text(content)
        result = run("eval", "-m", DEMO, "--tasks", "qa", "-o", file)
        assert result.returncode == 1
        assert "is not a file of mustafar eval's results" in result.stderr
        assert file.read_text() == content
