"""Where the command looks for the demo model, by the folder it is installed in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.command import COMMAND, needs_command
from support.paths import DEMO

pytestmark = needs_command


def info(command: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "MUSTAFAR_DEMO_MODEL"}
    return subprocess.run(
        [str(command), "info", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize(
    "place",
    [
        "lib/python3.11/site-packages/mustafar",  # pip in a virtual environment
        "lib/python3.11/dist-packages/mustafar",  # Debian's pip, under /usr/local
        "lib/python3/dist-packages/mustafar",
        "lib64/python3.12/site-packages/mustafar",
        "mustafar",  # pip install --target
        "share/mustafar",  # cmake --install
    ],
)
def test_beside_the_command(tmp_path: Path, place: str) -> None:
    assert COMMAND is not None
    command = tmp_path / "bin" / "mustafar"
    command.parent.mkdir()
    shutil.copy2(COMMAND, command)
    absent = info(command)
    assert absent.returncode == 1
    assert "demo model" in absent.stderr and "-m" in absent.stderr
    folder = tmp_path / place / "models" / "demo"
    shutil.copytree(DEMO, folder)
    found = info(command)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["model"] == str(folder)
