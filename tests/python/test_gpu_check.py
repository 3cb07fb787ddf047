"""tools/gpu_check.sh and its report, without a GPU: what did not run must never look like a success.

All figures below are made up; none was measured.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SHAPE = {"batch": 8, "context": 32768, "heads": 32, "kv_heads": 8}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


gpu_report = load("gpu_report")


def row(kernel: str, setting: str, us: float, **more: object) -> dict[str, object]:
    return {"kernel": kernel, "setting": setting, **SHAPE, "us_per_layer": us, **more}


def own(setting: str, us: float, **more: object) -> dict[str, object]:
    checked = {"of_copy": 0.9, "nmse": 1e-9, "nmse_ok": True, **more}
    return row("decode_attention", setting, us, **checked)


def report(
    folder: Path, bench: list[dict[str, object]], torch: list[dict[str, object]], tail: str = ""
) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "machine.txt").write_text("gpu FIXTURE, not a GPU\nnvcc release 0.0\n")
    (folder / "stages.txt").write_text("bench: passed in 1 s\nsanitize: not available: no tool\n")
    for name, rows in (("bench", bench), ("torch", torch)):
        text = "some words\n" + "".join(json.dumps(r) + "\n" for r in rows)
        (folder / f"{name}.log").write_text(text + tail)
    markdown, results = gpu_report.report(folder)
    json.dumps(results)
    return markdown


def goal(markdown: str, start: str) -> str:
    (line,) = (line for line in markdown.splitlines() if line.startswith(f"- {start}"))
    return line


def test_the_best_dense_kernel_of_the_run_is_the_measure(tmp_path: Path) -> None:
    markdown = report(
        tmp_path,
        [own("dense f16", 210), own("f16 37.5 %", 100), own("int8 22.7 %", 80)],
        [row("torch flash", "dense f16", 200), row("torch cudnn", "dense f16", 300)],
    )
    assert "2.00x, met" in goal(markdown, "f16 37.5 %")
    assert "2.50x, MISSED" in goal(markdown, "int8 22.7 %")
    assert "90%, met" in goal(markdown, "own dense kernel")
    assert "- sanitize: not available: no tool" in markdown
    assert "| 8 | 32768 | 32/8 | decode_attention | f16 37.5 % | 100.0 | 90% | 2.00 | 1e-09 |" in (
        markdown
    )


def test_a_wrong_result_is_no_time(tmp_path: Path) -> None:
    markdown = report(
        tmp_path,
        # A wrong dense kernel must not set the measure either.
        [own("dense f16", 10, nmse=1.0, nmse_ok=False), own("f16 37.5 %", 50, nmse_ok=False)],
        [row("torch flash", "dense f16", 200)],
    )
    assert "WRONG RESULT" in goal(markdown, "f16 37.5 %")
    assert "not measured" in goal(markdown, "own dense kernel")
    assert markdown.count(" WRONG |") == 2
    (dense,) = gpu_report.best_dense(gpu_report.rows_of(tmp_path / "torch.log")).values()
    assert dense["us_per_layer"] == 200


def test_without_the_peer_no_goal_is_met(tmp_path: Path) -> None:
    error = {"kernel": "torch flash", "setting": "dense f16", **SHAPE, "error": "no kernel | here"}
    markdown = report(tmp_path, [own("dense f16", 200), own("f16 37.5 %", 50)], [error])
    assert "4.00x, not shown: PyTorch" in goal(markdown, "f16 37.5 %")
    assert "not available: no kernel / here" in markdown


def test_nothing_measured_and_lines_cut_off(tmp_path: Path) -> None:
    markdown = report(tmp_path, [], [], tail='{"kernel": "decode_attention", "setti')
    assert "not measured" in goal(markdown, "f16 37.5 %")
    assert "## Decode attention\n\nnot measured" in markdown
    assert ", met" not in markdown


def check(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "OUT"}
    environment["CUDA_VISIBLE_DEVICES"] = "-1"
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        ["bash", str(TOOLS / "gpu_check.sh"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A PATH with no CUDA tool, no GPU and no cmake."""
    folder = tmp_path / "bin"
    folder.mkdir()
    names = "bash cat cp dirname grep gzip head ln mkdir mktemp realpath rm sed sleep tail tar tee"
    for name in [*names.split(), "test", "timeout"]:
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"no {name}")
        (folder / name).symlink_to(found)
    python = folder / "python3"  # not a link: what it is called by matters to it
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(folder)


FIRST = "environment smoke bench prefill linear torch step kernels sessions model profile".split()


def test_stages_without_their_tools_are_not_available(bare: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = check("-o", str(out), "-p", str(tmp_path / "none"), "second", path=bare)
    assert result.returncode == 3, result.stdout + result.stderr
    assert "passed" not in result.stdout
    results = json.loads((out / "results.json").read_text())
    assert set(results["stages"]) == {*FIRST, "more", "sanitize"}
    for stage, end in results["stages"].items():
        assert end.startswith("not available: "), (stage, end)
    assert results["machine"]["gpu"] == results["machine"]["build"] == "not available"
    assert all("not measured" in goal for goal in results["goals"])
    assert (out / "raw.tar.gz").exists()


@pytest.fixture
def prebuilt(tmp_path: Path) -> Path:
    """Programs in the place of what tools/gpu_prebuild.sh makes, and a driver that answers."""
    scripts = {
        "bin/mustafar_cuda_kernel_tests": """case $1 in
--gtest_list_tests) printf 'Sound.\n  Works\nKinds/Broken.\n  Fails/int8  # GetParam()\n' ;;
*Broken*) echo '[  FAILED  ] Kinds/Broken.Fails/int8'; exit 1 ;;
*) echo '[  PASSED  ] 1 test.' ;;
esac""",
        "bin/mustafar_cuda_bench": 'echo \'{"kernel": "k"}\'',
        "path/nvidia-smi": "exit 0",
    }
    for name, text in scripts.items():
        script = tmp_path / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    folder = tmp_path / "prebuilt"
    (folder / "shared").mkdir(parents=True)
    (folder / "build.txt").write_text("commit FIXTURE\n")
    with tarfile.open(folder / "bin.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "bin", "bin")
    return folder


def test_every_suite_runs_by_itself_and_a_broken_one_stops_none(
    bare: str, prebuilt: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    path = f"{tmp_path}/path:{bare}"
    result = check("-o", str(out), "-p", str(prebuilt), "kernels", "smoke", path=path)
    assert result.returncode == 1, result.stdout + result.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["machine"]["commit"] == "FIXTURE"
    assert set(results["stages"]) == {"Sound", "Kinds_Broken", "smoke"}
    assert results["stages"]["Sound"].startswith("passed")
    assert results["stages"]["Kinds_Broken"].startswith("failed with status 1")
    assert results["stages"]["smoke"].startswith("passed")
    assert "Kinds/Broken.Fails/int8" in result.stdout


def test_a_dry_run_runs_nothing(bare: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = check("-n", "-o", str(out), path=bare)
    assert result.returncode == 0
    assert "bench: not available here: an NVIDIA GPU" in result.stdout
    assert "mustafar_cuda_bench 0.15 8,32768,32,8" in result.stdout
    assert not out.exists()


def test_unknown_stages_and_options_are_refused() -> None:
    assert check("no-such-stage").returncode == 2
    assert check("-x").returncode == 2


PTXAS = """
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for _Z1bv
    {frame} bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
"""


@pytest.mark.parametrize(("frame", "stores"), [(32, 0), (8, 8)])
def test_spills_and_local_memory_in_the_compiler_report(frame: int, stores: int) -> None:
    sass_count = load("sass_count")
    assert sass_count.spills(PTXAS.format(frame=0, stores=0)) == []
    (fault,) = sass_count.spills(PTXAS.format(frame=frame, stores=stores))
    assert fault.startswith(f"_Z1bv (sm_90a): {frame} bytes stack frame")
    assert sass_count.compiled([PTXAS]) == {"sm_80": 1, "sm_90a": 1}
