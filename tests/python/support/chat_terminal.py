"""`mustafar chat` driven in a pseudo-terminal, as a person uses it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.command import COMMAND

pexpect = pytest.importorskip("pexpect")

FIGURES = r"prompt (\d+) tokens [\d.]+ t/s(?: \((\d+) cached\))? \| reply (\d+) tokens [\d.]+ t/s \| context (\d+)/(\d+) \| KV [\d.]+ \w+ of [\d.]+ \w+ dense \| sparsity 0\.\d\d"
PASTE = "\x1b[200~{}\x1b[201~"  # as terminals send it
ARROW_UP = "\x1b[A"


@contextmanager
def terminals(cwd: Path) -> Iterator[Any]:
    """A function that starts `mustafar chat` with arguments and environment variables.

    Two threads, greedy and 8 tokens a reply unless the arguments say otherwise; what it started
    ends with the block.
    """
    children = []

    def spawn(*arguments: object, **environment: str) -> Any:
        env = {
            **os.environ,
            "TERM": "xterm",
            "MUSTAFAR_HISTORY": str(cwd / "history"),
            **environment,
        }
        if "NO_COLOR" not in environment:
            env.pop("NO_COLOR", None)
        child = pexpect.spawn(
            COMMAND,
            ["chat", "--temp", "0", "-n", "8", "-t", "2", *map(str, arguments)],
            env=env,
            cwd=cwd,
            encoding="utf-8",
            timeout=60,
            dimensions=(40, 300),
        )
        children.append(child)
        child.expect("lists the commands")
        child.banner = child.before
        child.expect("> ")
        return child

    try:
        yield spawn
    finally:
        for child in children:
            child.close(force=True)


def say(child: Any, text: str) -> Any:
    """Sends a message and waits for the figures after the reply."""
    child.send(text + "\r")
    child.expect(FIGURES)
    match = child.match
    child.expect("> ")
    return match


def command(child: Any, text: str, answer: str) -> Any:
    child.send(text + "\r")
    child.expect(answer)
    match = child.match
    child.expect("> ")
    return match


def saved(child: Any, tmp_path: Path) -> list[dict[str, Any]]:
    command(child, "/save chat.json", "saved chat.json")
    messages: list[dict[str, Any]] = json.loads((tmp_path / "chat.json").read_text())["messages"]
    return messages


def leave(child: Any, status: int = 0) -> None:
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == status, (child.exitstatus, child.signalstatus, child.before)
