"""`mustafar chat` without a terminal: pipes, files and JSON; and what a shell completes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import mustafar
from support.command import COMMAND, needs_command, run
from support.paths import DEMO

pytestmark = needs_command
GREEDY = ("--temp", 0, "-n", 8)


def chat(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return run("chat", *GREEDY, *arguments, stdin=stdin)


def answer(*arguments: object, stdin: str | None = None) -> dict[str, Any]:
    done = chat("--json", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_one_message_of_a_file(tmp_path: Path) -> None:
    text = "def add(a, b):\n\n/return what?"
    (tmp_path / "q.txt").write_text(text + "\n")
    by_file = answer("-f", tmp_path / "q.txt", stdin="not read\n")
    assert by_file["messages"] == [
        {"role": "user", "content": text},
        {"role": "assistant", "content": by_file["text"]},
    ]
    with mustafar.Model(DEMO) as model:
        expected = mustafar.Chat(model).send(text, temperature=0, max_new_tokens=8)
    assert by_file["token_ids"] == expected.token_ids
    assert by_file["finish_reason"] == expected.finish_reason
    for same in (answer("-f", "-", stdin=text), answer("-p", text)):
        assert same["text"] == by_file["text"]
    plain = chat("-f", "-", stdin=text)
    assert (plain.returncode, plain.stdout) == (0, by_file["text"] + "\n")


def test_a_list_of_messages() -> None:
    begun = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "def add(a, b):"},
    ]
    reply = answer("-f", "-", stdin=json.dumps(begun))
    assert reply["messages"] == [*begun, {"role": "assistant", "content": reply["text"]}]
    cut = reply["text"][:6].rstrip()
    more = answer("-f", "-", stdin=json.dumps([*begun, {"role": "assistant", "content": cut}]))
    assert more["messages"][-1] == {"role": "assistant", "content": cut + more["text"]}
    # A list of something else is a text.
    assert answer("-f", "-", stdin="[1, 2]")["messages"][0]["content"] == "[1, 2]"


def test_every_line_of_a_pipe_is_a_message() -> None:
    done = chat("--json", stdin="Hello\n/set temp=2\n")
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert [m["content"] for m in second["messages"][::2]] == ["Hello", "/set temp=2"]
    assert second["messages"][:2] == first["messages"]
    asked = chat("--commands", "-q", stdin="Hello\n/set top-k=3\n")
    assert len(asked.stdout.splitlines()) == len((first["text"] + "\n").splitlines())
    assert "top-k=3" in asked.stderr


def test_the_exit_status_says_whether_there_was_an_answer(tmp_path: Path) -> None:
    nothing = chat(stdin="")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "no message to answer" in nothing.stderr
    assert chat(stdin="\n  \n").returncode == 1
    assert chat("--commands", stdin="/set\n").returncode == 0
    long = chat("-c", 40, "--json", "-p", "word " * 100)
    assert (long.returncode, long.stdout) == (1, "")
    assert "-c = 40" in long.stderr
    assert chat("-c", 40, stdin="word " * 100 + "\nHi\n").returncode == 1
    assert chat("-f", tmp_path / "none").returncode == 1
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    refused = chat("-f", tmp_path / "latin")
    assert refused.returncode == 1
    assert "not UTF-8: 0xe9 at byte 3" in refused.stderr
    assert chat("-f", "-", "-p", "x").returncode == 2


def test_what_the_command_says_of_its_own_words() -> None:
    unknown = run("run", "llama")
    assert unknown.returncode == 2
    assert "no command 'run'; there are generate, chat, info," in unknown.stderr
    assert run("--help").stdout.count("\n  mustafar ") == 3
    for arguments, said in (
        (("generate", "-p", "x", "--temp", -1), "--temp must be finite"),
        (("generate", "-p", "x", "--sparsity", 1), "--sparsity must be"),
        (("generate", "-p", "x", "--top-p", 2), "--top-p must be"),
        (("generate", "-p", "x", "-c", 4, "-n", 2, "--kv-dtype", "int3"), "--kv-dtype must be one"),
        (("generate", "-p", "word " * 40, "-c", 16), "-c = 16"),
    ):
        refused = run(*arguments)
        assert refused.returncode != 0
        assert said in refused.stderr, refused.stderr
        assert "_" not in refused.stderr, refused.stderr


def test_models_that_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path, said in (
        (tmp_path / "model.gguf", "a GGUF file; mustafar reads the folder"),
        (DEMO / "model.safetensors", f"a file; give the folder it lies in, {DEMO}"),
        (DEMO / "README.md", "a file, where a model is a folder"),
        (tmp_path / "none", "no such folder; expected a model folder"),
        ("nobody/no-such-model", "hf download nobody/no-such-model"),
    ):
        refused = run("info", "-m", path, HF_HOME=str(tmp_path))
        assert refused.returncode == 1
        assert said in refused.stderr, refused.stderr


def options_of(*command: str) -> set[str]:
    """Every option that the help lists."""
    text = run(*command, "--help").stdout
    listed = re.findall(r"^  +((?:--?[\w-]+,? ?)+)", text, re.MULTILINE)
    return {name for names in listed for name in re.findall(r"--?[\w-]+", names)}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_every_option(shell: str) -> None:
    script = run("completion", shell).stdout
    commands = re.findall(r"^  (\w+) +[A-Z]", run("--help").stdout, re.MULTILINE)
    assert {"generate", "chat", "info", "completion"} <= set(commands)
    for command in commands:
        start = {"bash": f"    {command}) ", "zsh": f"    {command}) "}.get(shell)
        lines = [
            line
            for line in script.splitlines()
            if (line.startswith(start) if start else f"_from {command}'" in line)
        ]
        options = options_of(command)
        assert "--help" in options
        for option in options:
            name = (
                option
                if shell != "fish"
                else ("-l " if option[:2] == "--" else "-s ") + (option.lstrip("-"))
            )
            assert any(
                re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", line) for line in lines
            ), (
                command,
                option,
            )
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ch"], {"chat"}),
        (["--vers"], {"--version"}),
        (["chat", "--top"], {"--top-k", "--top-p"}),
        (["info", "--tens"], {"--tensors"}),
        (["chat", "-f", "file"], set()),
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    assert COMMAND is not None
    listed = " ".join(words)
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'source <("{COMMAND}" completion bash); COMP_WORDS=(mustafar {listed});'
            f" COMP_CWORD={len(words)}; _mustafar; echo ${{COMPREPLY[@]}}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == expected
