"""Files of hundreds of kilobytes in `mustafar chat`, and what a full context says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors")

from support.chat_terminal import command, saved, say, terminals
from support.command import needs_command
from support.paths import DEMO
from support.tiny_model import write_tiny_model

pytestmark = needs_command

CONTEXT = 200_000
SLOWLY = {"MUSTAFAR_ISA": "scalar"}  # a bar is seen, and Ctrl-C comes in time, on any machine
SENTENCE = "Returns the number of items in the list, or None where it is empty.\n"
LONG = SENTENCE * (300_000 // len(SENTENCE) + 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), context=CONTEXT)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    (tmp_path / "long.txt").write_text(LONG)
    with terminals(tmp_path) as spawn:
        yield spawn


def test_read_to_the_end(start: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    child = start("-m", tiny, **SLOWLY)
    child.timeout = 200
    first = say(child, "Hello")
    child.send("/read long.txt what is it?\r")
    child.expect(r"read long.txt, 29\d\.\d\d KiB")
    child.expect(r"reading \[#[#.]*\] +\d+%")  # a bar that moves
    child.expect(r"prompt (\d+) tokens [\d.]+ t/s \((\d+) cached\).* context (\d+)/200000")
    prompt, cached, context = (int(n) for n in child.match.groups())
    assert prompt > 50_000
    assert cached == int(first[4])
    assert prompt + cached < context
    child.expect("> ")
    messages = saved(child, tmp_path)
    assert messages[2]["content"] == LONG + "\n\nwhat is it?"
    after = say(child, "Thank you")  # only the new turn is computed
    assert int(after[2]) == context
    assert int(after[1]) < 50


def test_interrupted_in_the_middle(start: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    child = start("-m", tiny, **SLOWLY)
    child.timeout = 200
    first = say(child, "Hello")
    for _ in range(2):
        child.send("/read long.txt\r")
        child.expect(r"reading \[#[#.]*\] +\d+%")
        child.sendintr()
        child.expect("interrupted: the message was not sent")
        child.expect("> ")
        assert len(saved(child, tmp_path)) == 2
    after = say(child, "Still here?")
    assert int(after[2]) == int(first[4])


def test_sparsity_of_a_long_conversation(
    start: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    child = start("-m", tiny, "--sparsity", 0.5, **SLOWLY)
    child.timeout = 200
    command(child, "/sparsity 0.6", r"sparsity K 0\.\d\d V 0\.\d\d(?!;)")  # nothing to compute
    command(child, "/sparsity 0.5", r"sparsity K 0\.\d\d V 0\.\d\d(?!;)")
    held = say(child, "/read long.txt")[4]
    child.send("/sparsity 0.75\r")
    child.expect(rf"computing the conversation's {held} tokens again")
    child.expect(r"reading \[#[#.]*\] +\d+%")
    child.sendintr()
    child.expect(r"interrupted: the cache stays as it was, sparsity K 0\.50 V 0\.50")
    child.expect("> ")
    same = say(child, "One")
    assert same[2] == held
    command(child, "/sparsity 0.75", rf"K 0\.75 V 0\.75; computed again: {same[4]} tokens")
    after = say(child, "Two")
    assert after[2] == same[4]
    command(child, "/stats", r"sparsity 0\.7\d \(K 0\.75 V 0\.75 where compressed\)")
    assert len(saved(child, tmp_path)) == 6


def test_sparsity_that_fails_keeps_the_cache(
    start: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "half.txt").write_text(LONG[: len(LONG) // 20])
    child = start(
        "-m", tiny, "--kv-budget", "768K", "--sparsity", 0.9, "--kv-dtype", "auto", "--sinks", 0
    )
    held = say(child, "/read half.txt")[4]
    command(child, "/sparsity 0.1", r"--kv-budget.*; the cache stays as it was, sparsity K 0\.90")
    assert say(child, "Still here?")[2] == held


@pytest.mark.parametrize("shift", [False, True])
def test_a_file_beyond_the_context(start: Callable[..., Any], tmp_path: Path, shift: bool) -> None:
    """The demo model holds 1024 tokens: a file of 300 KB can't be read, and that is said."""
    child = start("-m", DEMO, *(["--context-shift"] if shift else []))
    first = say(child, "What does os.path.join do?")
    before = saved(child, tmp_path)
    command(
        child,
        "/read long.txt",
        r"the conversation needs \d{5} tokens, the context holds -c = 1024\. "
        r"The message alone is \d{5} tokens: send a part of it; the conversation is as it was\.",
    )
    assert saved(child, tmp_path) == before
    assert say(child, "And then?")[2] == first[4]  # the cache is as it was, too
    child = start("-m", DEMO, "-c", 64)
    command(child, "/read long.txt", r"set a larger context with -c \(this model's is 1024\)")
