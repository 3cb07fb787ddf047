"""``KVConfig(profile="auto")``: what is logged, kept, shared between processes; and the command."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mustafar
from mustafar import KVConfig, Session
from support.command import COMMAND, needs_command
from support.paths import model_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mustafar" / "profiles"


def small_model() -> mustafar.Model:
    return mustafar.Model(model_folder("stories260K"), device="cpu")


def test_it_is_logged_once_and_kept(
    cache: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="mustafar")
    with small_model() as model:
        first = Session(model, KVConfig(profile="auto"))
        Session(model, KVConfig(profile="auto"))
        assert [record.levelname for record in caplog.records] == ["INFO"]
        (file,) = cache.iterdir()
        assert str(file) in caplog.text and file.name.startswith(model.fingerprint)
        profile = mustafar.auto_profile(model)
        assert mustafar.Profile.load(file).hash() == profile.hash()
        assert first.generate("Once", max_new_tokens=8, temperature=0).token_ids
    with small_model() as model:
        assert mustafar.auto_profile(model).hash() == profile.hash()
    assert len(caplog.records) == 1
    assert capfd.readouterr().out == ""


def test_progress_is_told_and_may_stop_it(cache: Path) -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 1000:
            raise KeyboardInterrupt

    with small_model() as model:
        with pytest.raises(KeyboardInterrupt):
            mustafar.auto_profile(model, progress=stop)
        assert seen and seen[-1][0] < seen[-1][1]
        assert not cache.exists()
        mustafar.auto_profile(model)
        assert len(list(cache.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with small_model() as model:
        profile = mustafar.auto_profile(model)
        assert mustafar.auto_profile(model).hash() == profile.hash()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "could not be kept" in caplog.text


def test_processes_may_make_it_at_once(cache: Path) -> None:
    script = (
        "import mustafar, sys\n"
        "with mustafar.Model(sys.argv[1], device='cpu', threads=1) as model:\n"
        "    print(mustafar.auto_profile(model).hash())\n"
    )
    folder = model_folder("stories260K")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    (file,) = cache.iterdir()
    assert {out.strip() for out, _ in outputs} == {mustafar.Profile.load(file).hash()}


@needs_command
def test_the_command_says_it_on_stderr_alone(cache: Path) -> None:
    def generate() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(COMMAND), "generate", "-m", str(model_folder("stories260K")), "--device", "cpu",
             "-p", "Once", "-n", "8", "--temp", "0", "--profile", "auto", "-q"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    first, second = generate(), generate()
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "calibrating a KV profile" in first.stderr
    assert str(next(cache.iterdir())) in first.stderr
    assert "calibrating" not in second.stderr
    assert first.stdout == second.stdout and "calibrating" not in first.stdout
