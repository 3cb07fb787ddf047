"""The `mustafar` command as the tests run it."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from support.paths import ROOT


def find_command() -> str | None:
    """MUSTAFAR_COMMAND, what is installed, or an optimised build in the tree."""
    if named := os.environ.get("MUSTAFAR_COMMAND"):
        return named
    # The installed command first: a sanitised build beside it also reports leaks of its libraries.
    if installed := shutil.which("mustafar"):
        return installed
    built = (ROOT / "build" / preset / "cpp" / "mustafar" for preset in ("cpu-test", "cpu-release"))
    return next((str(path) for path in built if path.exists()), None)


COMMAND = find_command()
needs_command = pytest.mark.skipif(COMMAND is None, reason="the mustafar command is not built")


def run(
    *arguments: object, stdin: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end; stdin is a pipe, empty unless given."""
    assert COMMAND is not None
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )
