"""Weight files that are cut short while a model uses them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import mustafar
from support.paths import model_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a model that may be spoiled."""
    return Path(shutil.copytree(model_folder("demo"), tmp_path / "model"))


def cut(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as weights:
            weights.truncate(5000)


def test_cut_while_a_thread_generates(folder: Path, tmp_path: Path) -> None:
    model = mustafar.Model(folder, device="cpu", threads=2)
    session, idle = mustafar.Session(model), mustafar.Session(model)
    idle.prefill(list(range(1, 90)))
    expected = idle.fork().decode(5)
    errors: list[mustafar.ModelError] = []
    begun = threading.Event()

    def generate() -> None:
        try:
            for _ in session.stream("Once upon a time", max_new_tokens=400, ignore_eos=True):
                begun.set()
        except mustafar.ModelError as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    begun.wait()
    cut(folder)
    thread.join()
    assert len(errors) == 1
    assert ".safetensors: " in str(errors[0]) and "while it is in use" in str(errors[0])
    with pytest.raises(mustafar.ModelError, match="while it is in use"):
        idle.decode(5)
    assert idle.position == 89
    idle.save(tmp_path / "state")
    whole = mustafar.Model(model_folder("demo"), device="cpu", threads=2)
    loaded = mustafar.Session.load(whole, tmp_path / "state")
    assert (loaded.decode(5) == expected).all()


WITH_FAULTHANDLER = """
import faulthandler, mmap, pathlib, sys
faulthandler.enable()
import mustafar
folder = pathlib.Path(sys.argv[1])
session = mustafar.Session(mustafar.Model(folder, device="cpu", threads=2))
session.prefill([1, 2, 3])
for file in folder.glob("*.safetensors"):
    with file.open("r+b") as weights:
        weights.truncate(5000)
try:
    session.decode(4)
except mustafar.ModelError:
    print("refused", flush=True)
with (folder / "other").open("w+b") as other:
    other.truncate(8192)
    mapped = mmap.mmap(other.fileno(), 0)
    other.truncate(0)
    mapped[5000]
print("not reached")
"""


def test_faulthandler_sees_the_faults_that_are_not_the_library_s(folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITH_FAULTHANDLER, folder],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout == "refused\n", ended.stderr
    assert ended.returncode == -signal.SIGBUS
    assert ended.stderr.startswith("Fatal Python error: Bus error")
