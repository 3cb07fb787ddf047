"""Where the tests find models, tools and the repository's own files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
DEMO = ROOT / "python" / "mustafar" / "models" / "demo"
STORY = SHARED / "models" / "story"
SMOLLM2_TOOL = ROOT / "tools" / "smollm2.py"

MODELS = {"story": STORY, "stories260K": SHARED / "models" / "stories260K", "demo": DEMO}


def load_tool(path: Path) -> ModuleType:
    """A script of tools/ as a module; it may import what stands beside it."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
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
