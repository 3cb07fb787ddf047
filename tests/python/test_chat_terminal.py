"""What people do at the prompt of `mustafar chat`, in a pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.chat_terminal import FIGURES, PASTE, command, leave, saved, say, terminals
from support.command import COMMAND, needs_command

pexpect = pytest.importorskip("pexpect")
pytestmark = needs_command


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    with terminals(tmp_path) as spawn:
        yield spawn


def users(child: Any, tmp_path: Path) -> list[str]:
    return [m["content"] for m in saved(child, tmp_path) if m["role"] == "user"]


def test_lines_typed_while_a_reply_runs_stay_lines(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    child = start("-n", 40, "--ignore-eos", MUSTAFAR_ISA="scalar")
    child.send("one\r")
    child.send("two\r")
    child.send("/set top-k=7\r")
    child.send("three\r")
    for _ in range(2):
        child.expect(FIGURES)
    child.expect("top-k=7")
    child.expect(FIGURES)
    child.expect("> ")
    assert users(child, tmp_path) == ["one", "two", "three"]
    # A paste that comes in the meantime is one message.
    child.send("four\r")
    child.send(PASTE.format("five\r/six\rseven") + "\r")
    for _ in range(2):
        child.expect(FIGURES)
    child.expect("> ")
    assert users(child, tmp_path)[3:] == ["four", "five\n/six\nseven"]


def test_blocks_in_quotes_and_bye(start: Callable[..., Any], tmp_path: Path) -> None:
    child = start()
    child.send('"""\r')
    child.expect(r"\. ")
    child.send("/first\r")
    child.expect(r"\. ")
    say(child, 'second"""')
    say(child, '"""one line"""')
    say(child, '"""begins\rgoes on\r"""')
    assert users(child, tmp_path) == ["/first\nsecond", "one line", "begins\ngoes on"]
    child.send("/bye\r")
    leave(child)


def test_undo_and_regen(start: Callable[..., Any], tmp_path: Path) -> None:
    child = start()
    say(child, "One")
    one = saved(child, tmp_path)
    command(child, "/undo", "took back: One")
    child.send("/regen\r")
    child.expect("sending again: One")
    child.expect(FIGURES)
    child.expect("> ")
    assert saved(child, tmp_path) == one
    say(child, "Two")
    command(child, "/undo", "took back: Two")
    say(child, "/regen")
    assert saved(child, tmp_path) == one
    command(child, "/clear", "cleared")
    command(child, "/regen", "no reply to make again")


def test_continue(start: Callable[..., Any], tmp_path: Path) -> None:
    child = start("--ignore-eos")
    command(child, "/continue", "not a text of the assistant's")
    child.send("def add(a, b):\r")
    child.expect(r"the reply was cut after 8 tokens \(-n\); /continue goes on")
    child.expect("> ")
    first = saved(child, tmp_path)
    say(child, "/continue")
    both = saved(child, tmp_path)
    assert len(both) == len(first) == 2
    assert both[1]["content"].startswith(first[1]["content"])
    assert len(both[1]["content"]) > len(first[1]["content"])


def test_a_reply_cut_by_the_context_says_so(start: Callable[..., Any]) -> None:
    child = start("-c", 48, "-n", 200, "--ignore-eos")
    command(child, "Hello", r"the reply was cut: the context of 48 tokens is full\..*/undo")


def test_bytes_that_are_no_text(start: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "half.txt").write_bytes("Grüße".encode()[:3])
    (tmp_path / "zero.bin").write_bytes(b"MZ\0\0")
    (tmp_path / "wide.txt").write_bytes(b"\xff\xfe" + "Grüße 😀".encode("utf-16-le"))
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf" + "Grüße".encode())
    child = start()
    command(child, "/read latin.txt", r"latin.txt: not UTF-8: 0xe9 at byte 3; .*iconv")
    command(child, "/read half.txt", r"half.txt: not UTF-8: 0xc3 at byte 2")
    command(child, "/read zero.bin", r"zero.bin: not a text: a zero byte at byte 2")
    assert users(child, tmp_path) == []
    child.send("/read wide.txt\r")
    child.expect(r"read wide.txt, 12 B of UTF-16 text")
    child.expect(FIGURES)
    child.expect("> ")
    child.send("/read mark.txt\r")
    child.expect(r"read mark.txt, 7 B of UTF-8 text")
    child.expect(FIGURES)
    child.expect("> ")
    # A Latin-1 keyboard: the byte is lost, and nothing else.
    child.ptyproc.write("caf\xe9 au lait\r".encode("latin-1"))
    child.expect(FIGURES)
    child.expect("> ")
    assert users(child, tmp_path) == ["Grüße 😀", "Grüße", "caf\ufffd au lait"]


def test_a_resized_terminal_shows_the_line_again(start: Callable[..., Any], tmp_path: Path) -> None:
    child = start()
    child.send("half of a li")
    child.expect("half of a li")
    child.setwinsize(30, 60)
    child.expect("> (?:\x1b\\[0m)?half of a li")
    say(child, "ne")
    assert users(child, tmp_path) == ["half of a line"]


def test_history_that_cannot_be_kept_is_said_once(tmp_path: Path) -> None:
    child = pexpect.spawn(
        COMMAND,
        ["chat", "--temp", "0", "-n", "8"],
        env={**os.environ, "TERM": "xterm", "MUSTAFAR_HISTORY": "/no/such/folder/history"},
        cwd=tmp_path,
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 300),
    )
    child.expect("no history is kept: /no/such/folder/history: No such file")
    child.expect("> ")
    say(child, "One")
    child.send("/bye\r")
    child.expect(pexpect.EOF)
    assert "history" not in child.before
    child.close()
    assert child.exitstatus == 0


def test_the_banner_and_stats_say_what_the_cache_is(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    child = start()
    assert "cache int8, nothing pruned |" in child.banner
    command(child, "/sparsity", r"sparsity K 0\.00 V 0\.00")
    child = start("--sparsity", 0.55, "--kv-dtype", "auto")
    assert re.search(r"cache (bf16|f32|f16), sparsity K 0\.55 V 0\.55", child.banner)
    # A group of 16 dims keeps a whole number of them.
    command(child, "/sparsity", r"sparsity K 0\.55 V 0\.55 \(as stored: K 0\.\d\d V 0\.\d\d\)")
    stored = command(child, "/sparsity", r"stored: (K 0\.\d\d V 0\.\d\d)\)")[1]
    command(child, "/stats", stored + " where compressed")


def test_json_of_a_conversation_is_kept(start: Callable[..., Any], tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "def add(a, b):"},
        {"role": "assistant", "content": "    return a"},
    ]
    (tmp_path / "chat-list.json").write_text(json.dumps(messages))
    child = start("-f", "chat-list.json")
    made = saved(child, tmp_path)
    assert made[0] == messages[0]
    assert made[1]["content"].startswith("    return a")
