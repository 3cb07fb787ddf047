"""`mustafar chat` in a pseudo-terminal, as a person uses it, and in a pipe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.chat_terminal import ARROW_UP, FIGURES, PASTE, command, leave, saved, say, terminals
from support.command import COMMAND, needs_command
from support.paths import STORY

pexpect = pytest.importorskip("pexpect")
pytestmark = [
    needs_command,
    pytest.mark.skipif(not STORY.is_dir(), reason=f"no model at {STORY}"),
]

TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The story model with a chat template and room for long conversations."""
    path = tmp_path_factory.mktemp("model") / "story"
    shutil.copytree(STORY, path)
    path.chmod(0o755)
    for file in path.iterdir():
        file.chmod(0o644)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = 400_000
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a chat with the story model, 2000 tokens of context."""
    with terminals(tmp_path) as spawn:

        def start(*arguments: object, **environment: str) -> Any:
            return spawn("-m", folder, "-c", 2000, *arguments, **environment)

        yield start


def test_second_turn_is_cached_and_exit(start: Callable[..., Any]) -> None:
    child = start()
    first = say(child, "Hello")
    second = say(child, "And then")
    assert first[2] is None
    assert int(second[2]) == int(first[4])  # the context after turn one is cached in turn two
    child.send("/exit\r")
    leave(child)


def test_every_command(start: Callable[..., Any], tmp_path: Path) -> None:
    child = start("--system", "Be kind")
    command(child, "/help", r"/multiline .*Ctrl-C stops a reply")
    command(child, "/nope", "no command /nope; /help lists them")
    command(child, "/undo", "nothing to take back")
    command(child, "/regen", "no reply to make again")
    say(child, "One")
    one = saved(child, tmp_path)
    assert [m["role"] for m in one] == ["system", "user", "assistant"]
    say(child, "/regen")
    assert saved(child, tmp_path) == one  # greedy
    say(child, "Two")
    command(child, "/undo", "took back: Two")
    assert saved(child, tmp_path) == one
    command(child, "/stats", r"in all: prompt \d+ tokens")
    command(child, "/set", r"temp=0  top-k=40 .*max-tokens=8  seed=-1")
    command(child, "/set max-tokens=3", "max-tokens=3")
    assert say(child, "Three")[3] == "3"
    shown = command(child, "/set top-p=0.5 seed=1 top-k=3", r"(temp=0  [^\x1b]*seed=1)")[1]
    command(child, "/set " + shown, "top-k=3  top-p=0.5")  # takes what it prints
    command(child, "/set top-k=5 temp=-1", "--temp must be finite")
    command(child, "/set", "top-k=3  top-p=0.5")
    command(child, "/set temp=x", "is no number")
    command(child, "/set hat=1", "/set knows temp, ")
    command(child, "/sparsity", r"sparsity K 0\.\d\d V 0\.\d\d")
    command(child, "/sparsity 0.9", r"K 0\.90 V 0\.90 .*; computed again: \d+ tokens")
    command(child, "/sparsity 2", "sparsity")
    command(child, "/sparsity x", "'x' is no number")
    assert say(child, "Four")[2] is not None  # the new cache holds the conversation
    command(child, "/system Be brief", "system message set; the conversation is computed anew")
    assert saved(child, tmp_path)[0] == {"role": "system", "content": "Be brief"}
    command(child, "/clear", "cleared")
    assert len(saved(child, tmp_path)) == 1
    command(child, "/system", "no system message")
    (tmp_path / "note.txt").write_text("Once upon a time")
    say(child, "/read note.txt what next?")
    assert saved(child, tmp_path)[0]["content"] == "Once upon a time\n\nwhat next?"
    command(child, "/read none.txt", "none.txt")
    command(child, "/read", "usage: /read FILE")
    command(child, "/save other.json", "saved other.json")
    command(child, "/clear", "cleared")
    command(child, "/load other.json", "loaded 2 messages and their cache")
    assert say(child, "Go on")[2] is not None
    command(child, "/load none.json", "none.json")
    child.sendeof()
    leave(child)


def test_control_c_stops_the_reply_and_then_leaves(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    child = start("-n", 1900, "--ignore-eos")
    child.send("Tell me a story\r")
    child.expect(r"[a-z]+ [a-z]+ [a-z]+ [a-z]+ [a-z]+")
    child.sendintr()
    child.expect("stopped; Ctrl-C again leaves")
    child.expect("> ")
    assert len(saved(child, tmp_path)[1]["content"]) > 10  # what was said stays
    child.send("More\r")
    child.expect(r"[a-z]+ [a-z]+ [a-z]+ [a-z]+ [a-z]+")
    child.sendintr()
    child.expect("> ")
    child.sendintr()
    leave(child, 130)


def test_control_c_at_the_prompt(start: Callable[..., Any]) -> None:
    child = start()
    child.send("half a li")
    child.sendintr()
    child.expect("Ctrl-C again leaves")
    child.expect("> ")
    say(child, "whole")
    child.sendintr()
    child.expect("Ctrl-C again leaves")
    child.expect("> ")
    child.sendintr()
    leave(child, 130)


def test_several_lines(start: Callable[..., Any], tmp_path: Path) -> None:
    child = start()
    child.send("one\\\r")
    child.expect(r"\. ")
    say(child, "two")
    say(child, PASTE.format("three\rfo\tur\x1b[A\rfive") + "!")
    child.send(PASTE.format("eight\rnine\r"))  # its last line ends the message
    child.expect(FIGURES)
    child.expect("> ")
    command(child, "/multiline", "a line with a single . ends")
    child.send("six\r")
    child.expect(r"\. ")
    child.send("\r")
    child.expect(r"\. ")
    child.send("seven\r")
    child.expect(r"\. ")
    say(child, ".")
    command(child, "/multiline", "single lines")
    users = [m["content"] for m in saved(child, tmp_path) if m["role"] == "user"]
    assert users == ["one\ntwo", "three\nfo\tur[A\nfive!", "eight\nnine", "six\n\nseven"]


def test_history_editing_and_utf8(start: Callable[..., Any], tmp_path: Path) -> None:
    child = start()
    say(child, "Grüße 日本 x\x7f😀")  # with a backspace
    say(child, ARROW_UP + "!")
    users = [m["content"] for m in saved(child, tmp_path) if m["role"] == "user"]
    assert users == ["Grüße 日本 😀", "Grüße 日本 😀!"]
    child.send("/exit\r")
    leave(child)
    history = tmp_path / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    child = start()
    say(child, ARROW_UP * 4)
    assert saved(child, tmp_path)[0]["content"] == "Grüße 日本 😀"


def test_completion(start: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "apple pie.txt").write_text("x")
    (tmp_path / "banana.txt").write_text("Once")
    child = start()
    child.send("/he\t\r")
    child.expect("this list")
    child.expect("> ")
    child.send("/s\t")
    child.expect("/system  /save  /set  /stats  /sparsity")
    child.send("et te\t0.5\r")
    child.expect("temp=0.5 ")
    child.expect("> ")
    child.send("/read ba\t\r")
    child.expect("read banana.txt")
    child.expect(FIGURES)
    child.expect("> ")
    child.send("/read ap\tand a \x7f\x7f\x7f\x7f\x7f\x7fwhat is it?\r")
    child.expect("read apple pie.txt, 14 B")
    child.expect(FIGURES)
    child.expect("> ")
    assert saved(child, tmp_path)[-2]["content"] == "x\n\nwhat is it?"
    child.send("/read apple p\t\r")
    child.expect("read apple pie.txt, 1 B")
    child.expect(FIGURES)


def test_files_under_home(start: Callable[..., Any], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "note.txt").write_text("Once")
    child = start(HOME=str(home))
    say(child, "/read ~/no\t")
    command(child, "/save ~/chat.json", "saved ~/chat.json")
    assert json.loads((home / "chat.json").read_text())["messages"][0]["content"] == "Once"
    command(child, "/load ~/chat.json", "loaded 2 messages and their cache")


def test_colours_only_where_wanted(start: Callable[..., Any]) -> None:
    child = start()
    say(child, "Hello")
    child.send("/stats\r")
    child.expect("\x1b\\[2mmessages 2")
    child = start(NO_COLOR="1")
    child.send("/stats\r")
    child.expect("messages 0")
    assert "\x1b[2m" not in child.before
    assert "\x1b[1;32m" not in child.before


def test_long_file_shows_progress_and_can_be_interrupted(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("Once upon a time there was a little dog. " * 7500)
    child = start("-c", 400_000, MUSTAFAR_ISA="scalar")  # slow enough to be interrupted
    say(child, "Hello")
    child.send("/read long.txt\r")
    child.expect("read long.txt, 300.29 KiB")
    child.expect(r"reading \[[#.]+\] +\d+%")
    child.sendintr()
    child.expect("interrupted: the message was not sent")
    child.expect("> ")
    assert len(saved(child, tmp_path)) == 2
    assert say(child, "Still here?")[2] is not None


def test_full_context(start: Callable[..., Any]) -> None:
    child = start("-c", 60)
    command(child, "word " * 100, r"-c = 60\. The message alone is \d+ tokens")
    say(child, "Hi")
    command(
        child,
        "word " * 20,
        r"-c = 60.*/undo takes the last turn back.*--context-shift.*-c sets a larger context",
    )
    say(child, "Hi")
    child = start("-c", 80, "--context-shift", "-n", 16)
    for i in range(6):
        child.send(f"Tell me of number {i}\r")
        if child.expect([r"the oldest 1 turn\(s\) are dropped", FIGURES]) == 0:
            break
        child.expect("> ")
    else:
        pytest.fail("nothing was dropped")
    child.expect(FIGURES)


def piped(
    folder: Path, tmp_path: Path, text: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(COMMAND), "chat", "-m", str(folder), "--temp", "0", "-n", "8", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "MUSTAFAR_HISTORY": ""},
    )


def test_pipe(folder: Path, tmp_path: Path) -> None:
    result = piped(folder, tmp_path, "Hello\nAnd\\\nthen\n/save chat.json", "--commands")
    assert result.returncode == 0, result.stderr
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["Hello", "And\nthen"]
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    assert result.stdout == "".join(reply + "\n" for reply in replies)
    assert "\x1b" not in result.stdout + result.stderr
    assert result.stderr.count("| sparsity") == 2
    quiet = piped(folder, tmp_path, "Hello\n", "-q", "-p", "First")
    assert quiet.stderr == ""
    assert len(quiet.stdout.splitlines()) >= 2


def test_pipe_interrupted(folder: Path, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [str(COMMAND), "chat", "-m", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    )
    assert child.stdin is not None
    child.stdin.write("Hello\n")
    child.stdin.flush()
    assert child.stdout is not None
    child.stdout.read(1)
    assert child.stderr is not None
    while "sparsity" not in child.stderr.readline():
        pass
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130


def test_model_without_template_names_the_option(tmp_path: Path) -> None:
    result = piped(STORY, tmp_path, "Hello\n")
    assert result.returncode == 1
    assert "--chat-template" in result.stderr
    assert "chatml" in result.stderr
    result = piped(STORY, tmp_path, "Hello\n", "--chat-template", "vicuna")
    assert result.returncode == 0, result.stderr
    result = piped(STORY, tmp_path, "Hello\n", "--chat-template", "none such")
    assert result.returncode == 1
    assert "none such" in result.stderr
    (tmp_path / "t.jinja").write_text("{{ raise_exception('planted') }}")
    result = piped(STORY, tmp_path, "Hello\n", "--chat-template", "t.jinja")
    assert result.returncode == 1
    assert "planted" in result.stderr
