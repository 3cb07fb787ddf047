"""Fixtures: model folders, and the Hugging Face oracle where it is installed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A runner started in the background may have been told to ignore Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
DEMO = ROOT / "python" / "mustafar" / "models" / "demo"

MODELS = {
    "story": SHARED / "models" / "story",
    "stories260K": SHARED / "models" / "stories260K",
    "demo": DEMO,
}


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
