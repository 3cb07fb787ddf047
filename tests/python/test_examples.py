"""The README's examples are the files in examples/, and those run."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import mustafar
from support.paths import DEMO, ROOT, SHARED

PROMPT = "def read_file("
EXAMPLES = ROOT / "examples"


@pytest.fixture
def folder() -> Path:
    """The demo model, or else a trained one from the shared data."""
    for folder in (DEMO, SHARED / "models" / "story"):
        if (folder / "config.json").exists():
            return folder
    pytest.skip("no model to run the examples on")


def output(*command: str | Path) -> str:
    package = str(Path(mustafar.__file__).parents[1])
    environment = dict(os.environ, PYTHONPATH=package, RAY_USAGE_STATS_ENABLED="0")
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["python/continue_text.py", "continue_text.sh"])
def test_readme_shows_the_examples(name: str) -> None:
    assert (EXAMPLES / name).read_text() in (ROOT / "README.md").read_text()


def test_readme_shows_the_cmake_of_the_cpp_example() -> None:
    readme = (ROOT / "README.md").read_text()
    lines = (EXAMPLES / "cpp" / "CMakeLists.txt").read_text().splitlines()
    shown = [line for line in lines if "find_package" in line or "continue_text" in line]
    assert len(shown) == 3
    for line in shown:
        assert line in readme


def test_python_example(folder: Path) -> None:
    text = output(sys.executable, EXAMPLES / "python" / "continue_text.py", folder, PROMPT)
    assert text.startswith(PROMPT)
    body, _, report = text.rstrip("\n").rpartition("\n")
    assert len(body) > len(PROMPT)
    assert " tokens, KV cache " in report


def test_shell_example_says_the_same(folder: Path) -> None:
    if shutil.which("mustafar") is None:
        pytest.skip("no mustafar command on the PATH")
    shell = output("sh", EXAMPLES / "continue_text.sh", folder, PROMPT)
    assert len(shell.strip()) > 20
    python = output(sys.executable, EXAMPLES / "python" / "continue_text.py", folder, PROMPT)
    assert python.startswith(PROMPT + shell.rstrip("\n"))


def test_ray_example(folder: Path) -> None:
    pytest.importorskip("ray.serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = output(sys.executable, EXAMPLES / "python" / "ray_serve.py", folder, str(port))
    answers = re.findall(r"^(\w{8}): (.+)", said, re.MULTILINE)
    replicas = [replica for replica, _ in answers]
    assert len(set(replicas)) == 2
    assert replicas[::2] == replicas[1::2]  # both turns of a conversation


def test_import_is_light() -> None:
    program = "import mustafar, sys; print(sorted(sys.modules))"
    modules = output(sys.executable, "-c", program)
    for heavy in ("torch", "transformers", "safetensors", "tokenizers", "jinja2", "ray"):
        assert f"'{heavy}'" not in modules
