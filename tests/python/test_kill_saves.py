"""kill -9 in the middle of saving: tools/kill_saves.py at the length of a test."""

from __future__ import annotations

import random

import pytest

import mustafar
from support.paths import ROOT, load_tool

TOOL = ROOT / "tools" / "kill_saves.py"


@pytest.mark.parametrize("kind", ["session", "chat", "profile"])
def test_a_killed_save_leaves_the_old_file_or_the_new_one(kind: str, model: mustafar.Model) -> None:
    n = 12
    found = load_tool(TOOL).kill_often(kind, n, model, random.Random(3))
    found.pop("temporary files left", 0)
    assert sum(found.values()) == n
