"""`mustafar serve`: its options, how it starts and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx2 = pytest.importorskip("httpx2")

import mustafar
from mustafar import KVConfig
from mustafar.server import Settings
from mustafar.server.options import kv_of, parser, settings_of
from support.command import needs_command, run
from support.paths import DEMO

SERVE = [sys.executable, "-m", "mustafar.server"]


@contextmanager
def started(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server as a process, and its address."""
    process = subprocess.Popen(
        [*SERVE, "--port", "0", "-t", "1", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stderr is not None
    try:
        seen = ""
        for line in process.stderr:
            seen += line
            if found := re.search(r"(http://\S+)/v1", line):
                break
        else:
            pytest.fail(f"it did not start: {seen}")
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def test_told_to_stop_it_ends_what_it_began() -> None:
    with started(MUSTAFAR_API_KEY="key") as (process, url):
        body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        headers = {"Authorization": "Bearer key"}
        route = url + "/v1/completions"
        assert httpx2.post(route, json=body).status_code == 401
        with httpx2.stream("POST", route, json=body, headers=headers, timeout=60) as reply:
            lines = (line.removeprefix("data: ") for line in reply.iter_lines() if line)
            next(lines)
            process.send_signal(signal.SIGTERM)
            *chunks, done = lines
        assert done == "[DONE]"
        assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(url + "/health")


def test_ctrl_c_ends_it() -> None:
    with started("--model-name", "mine") as (process, url):
        assert httpx2.get(url + "/v1/models").json()["data"][0]["id"] == "mine"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def failed(*arguments: object, **environment: str) -> tuple[int, str]:
    result = subprocess.run(
        [*SERVE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    return result.returncode, result.stderr


def test_what_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    code, said = failed("--sparsity", "2")
    assert code == 2 and "--sparsity" in said
    code, said = failed("--kv", "tiny")
    assert code == 2 and "lossless" in said
    code, said = failed("--max-streams", "0")
    assert code == 2 and "max_streams" in said
    code, said = failed("--port", "0", "-m", tmp_path / "nowhere")
    assert code == 1 and "nowhere" in said
    with started() as (_, url):
        port = url.rpartition(":")[2]
        code, said = failed("--port", port)
        assert code == 1 and port in said and "in use" in said


def test_the_extra_is_named_where_it_is_missing() -> None:
    without = "import sys, runpy; sys.modules |= {'starlette': None, 'uvicorn': None}; "
    code = without + "runpy.run_module('mustafar.server', run_name='__main__')"

    def told(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, capture_output=True, text=True)

    result = told()
    assert result.returncode == 1
    assert "pip install 'mustafar[server]'" in result.stderr and "Traceback" not in result.stderr
    for words in (["--help"], ["--version"]):  # need nothing
        result = told(*words)
        assert result.returncode == 0 and result.stderr == ""
    assert "--kv-budget" in told("-h").stdout


def read(*arguments: str) -> Any:
    return parser().parse_args(arguments)


def test_options_name_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("auto", "cpu", "cuda", "cuda:0", "cuda:12"):
        assert read("--device", device).device == device
    for device in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1\n"):
        with pytest.raises(SystemExit):
            read("--device", device)
        assert "--device: " in capsys.readouterr().err
    assert read().device == "auto"


def test_options_of_the_cache() -> None:
    assert kv_of(read()) == KVConfig()
    assert kv_of(read("--kv", "balanced")) == KVConfig.preset("balanced")
    changed = kv_of(
        read("--kv", "mustafar", "--k-sparsity", "0.25", "--window", "64", "--sinks", "2")
    )
    assert changed == KVConfig.preset("mustafar", k_sparsity=0.25, window=64, sink_tokens=2)
    assert kv_of(read("--kv-dtype", "f16", "--profile", "none")) == KVConfig(value_dtype="f16")
    assert kv_of(read("--kv", "balanced", "--profile", "none")).profile is None
    coded = kv_of(read("--kv", "small", "--kv-bytes-per-token", "4680"))
    assert coded == KVConfig.preset("small", budget_bytes_per_token=4680)
    with pytest.raises(ValueError, match="sparsity"):
        kv_of(read("--sparsity", "1"))


def test_options_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUSTAFAR_API_KEY", raising=False)
    usual = settings_of(read())
    assert usual.model_names == ("demo",) and usual.api_keys == ()
    assert set(usual.allowed_hosts) == {"localhost", "127.0.0.1", "[::1]"}
    assert "chat.home" in settings_of(read("--allow-host", "chat.home")).allowed_hosts
    assert settings_of(read("--host", "0.0.0.0")).allowed_hosts == ()
    assert settings_of(read("-m", "org/name")).model_names == ("org/name",)
    assert settings_of(read("-m", str(DEMO) + "/")).model_names == ("demo",)
    monkeypatch.setenv("MUSTAFAR_API_KEY", "b")
    keyed = settings_of(read("--api-key", "a", "--max-body", "1.5M", "-c", "128"))
    assert keyed.api_keys == ("a", "b") and keyed.allowed_hosts == ()
    assert keyed.max_body_bytes == 3 << 19 and keyed.context == 128
    assert read("--kv-budget", "512MiB").kv_budget == 512 << 20
    assert not usual.system_prefix and settings_of(read("--system-prefix")).system_prefix
    assert read("--prefix-cache", "approximate").prefix_cache == "approximate"
    assert read("--prefix-bytes", "64M").prefix_bytes == 64 << 20
    assert read("--swap-bytes", "2G").swap_bytes == 2 << 30
    assert read("--on-pressure", "sparser").on_pressure == "sparser"
    assert read("-m", "x").on_pressure == "pause"
    with pytest.raises(SystemExit):
        read("--on-pressure", "fail")
    with pytest.raises(ValueError, match="max_choices"):
        Settings(max_choices=0)
    with pytest.raises(SystemExit):
        read("--kv-budget", "much")


@needs_command
def test_the_command_hands_over_to_python() -> None:
    result = run("serve", "--help", MUSTAFAR_PYTHON=sys.executable)
    assert result.returncode == 0 and "--kv-budget" in result.stdout
    result = run("serve", "--version", MUSTAFAR_PYTHON=sys.executable)
    assert result.stdout.strip() == mustafar.__version__
    assert "serve" in run("--help").stdout
    missing = run("serve", "-m", "x", MUSTAFAR_PYTHON="/bin/false")
    assert missing.returncode == 1
    assert "/bin/false" in missing.stderr and "pip install 'mustafar[server]'" in missing.stderr


@needs_command
def test_shells_complete_the_options_that_there_are() -> None:
    script = run("completion", "bash").stdout
    listed = re.search(r"^    serve\) options='(.*)' ;;$", script, re.MULTILINE)
    assert listed is not None
    known = {name for action in parser()._actions for name in action.option_strings}
    assert set(listed[1].split()) == known
