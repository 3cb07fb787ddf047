"""Many clients of one server, some of them rude: tools/soak_server.py at the length of a test."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("h11")

from support.paths import ROOT, load_tool
from support.tiny_model import write_tiny_model

soak = load_tool(ROOT / "tools" / "soak_server.py")


def test_replies_are_right_and_nothing_is_left(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", context=2048)
    words = ["-m", str(model), "--requests", "300", "--kv-budget", "250K", "--most-tokens", "100"]
    args = soak.parser().parse_args(words)
    args.serve = []
    found = asyncio.run(soak.soak(args))
    assert found["wrong"] == 0, (found["what_is_wrong"], found["log"])
    assert sum(found["outcomes"].values()) == 300
    assert found["replies_compared"] > 100
    assert {"whole", "stream", "cancelled", "left", "refused by name"} <= found["outcomes"].keys()
    assert found["most"]["running"] > 1


def test_it_finds_what_is_wrong() -> None:
    before = {"kv_bytes": 0, "failed": 0, "sockets": 3, "threads": 9, "resident_bytes": 10}
    assert soak.leaks([before, before], 0) == []
    for name in ("kv_bytes", "failed", "sockets", "resident_bytes"):
        assert name in soak.leaks([before, {**before, name: 20}], 5)[0]
    kind = soak.Kind(soak.TEXTS, {}, ("abc",), ("stop",))
    for said, whole, right in (
        ({0: ("abc", "stop")}, True, True),
        ({0: ("abc", "length")}, True, False),
        ({0: ("abd", "stop")}, True, False),
        ({0: ("ab", None)}, False, True),
        ({0: ("b", None)}, False, False),
    ):
        clients = soak.Clients(None, [kind], 0)
        clients._compare(kind, said, whole)
        assert (clients.found.wrong == []) == right
