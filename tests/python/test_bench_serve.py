"""`mustafar bench-serve`: the load it makes, what it takes down, how it is started."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("h11")

import mustafar
from mustafar.bench_serve import load, options, report, traffic
from mustafar.bench_serve.command import main
from mustafar.bench_serve.http import Address
from mustafar.bench_serve.prompts import FolderTokenizer, Prompt, PromptMaker, ServerTokenizer
from mustafar.bench_serve.run import measure
from mustafar.bench_serve.watch import Watch, numbers_of, resident_bytes
from mustafar.server import Settings
from support.command import needs_command, run
from support.paths import DEMO
from support.server import serving

COMMAND = [sys.executable, "-m", "mustafar.bench_serve"]
SHORT = ("--prompt-tokens", "20", "--output-tokens", "6", "--output-sigma", "0")


@pytest.fixture(scope="module")
def model() -> Iterator[mustafar.Model]:
    with mustafar.Model(DEMO, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def url(model: mustafar.Model) -> Iterator[str]:
    with mustafar.Engine(model, max_batch=16) as engine, serving(engine) as (address, _):
        yield address


def measured(*arguments: str) -> dict[str, Any]:
    return asyncio.run(measure(options.read(arguments)))


def test_lengths_are_drawn_as_said() -> None:
    prompt, output = traffic.LogNormal(161, 1.3), traffic.LogNormal(338, 1.0)
    drawn = traffic.drawn_lengths(4000, prompt, output, 100_000, seed=1)
    assert drawn == traffic.drawn_lengths(4000, prompt, output, 100_000, seed=1)
    assert drawn != traffic.drawn_lengths(4000, prompt, output, 100_000, seed=2)
    # Medians of a log-normal distribution are its mean by exp(sigma^2 / 2).
    prompts = np.array([each.prompt_tokens for each in drawn])
    outputs = np.array([each.output_tokens for each in drawn])
    assert np.median(prompts) == pytest.approx(161 / np.exp(1.3**2 / 2), rel=0.1)
    assert np.median(outputs) == pytest.approx(338 / np.exp(0.5), rel=0.1)
    assert np.std(np.log(outputs)) == pytest.approx(1.0, rel=0.1)
    cut = traffic.drawn_lengths(300, prompt, output, 400, seed=1)
    assert all(each.prompt_tokens + each.output_tokens <= 400 for each in cut)
    same = traffic.drawn_lengths(9, traffic.LogNormal(50, 0), traffic.LogNormal(8, 0), 58, seed=0)
    assert same == [traffic.Lengths(50, 8)] * 9
    with pytest.raises(ValueError, match="context of 57"):
        traffic.drawn_lengths(1, traffic.LogNormal(50, 0), traffic.LogNormal(8, 0), 57, seed=0)


def test_arrivals_are_a_poisson_process() -> None:
    offsets = traffic.arrivals(5000, 4.0, seed=3)
    gaps = np.diff(offsets)
    assert offsets[0] == 0 and np.all(gaps >= 0)
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert np.std(gaps) == pytest.approx(0.25, rel=0.1)  # as an exponential distribution's
    assert offsets == traffic.arrivals(5000, 4.0, seed=3) != traffic.arrivals(5000, 4.0, seed=4)


def test_lengths_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(
        '{"prompt_tokens": 7, "output_tokens": 2}\n\n{"prompt": "Hi", "output_tokens": 3}\n'
    )
    first, second = traffic.Lengths(7, 2), traffic.Lengths(0, 3, "Hi")
    assert traffic.lengths_of_file(path, 3) == [first, second, first]
    for line in ("{", "[]", '{"prompt_tokens": 1}', '{"prompt_tokens": 0, "output_tokens": 1}',
                 '{"prompt": 3, "output_tokens": 1}', '{"output_tokens": 1, "prompt_len": 3}',
                 '{"prompt": "a", "prompt_tokens": 1, "output_tokens": 1}'):  # fmt: skip
        path.write_text('{"prompt_tokens": 7, "output_tokens": 2}\n' + line)
        with pytest.raises(ValueError, match="line 2"):
            traffic.lengths_of_file(path, 1)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no lines"):
        traffic.lengths_of_file(path, 1)


def test_prompts_have_their_lengths(url: str) -> None:
    text = "A text with words, numbers (3.14159) and letters: Grüße.\n" * 5

    async def make(tokenizer: Any) -> list[Prompt]:
        maker = await PromptMaker.of(tokenizer, text, 0, seed=5)
        return [await maker.make(traffic.Lengths(n, 1)) for n in (3, 5, 40, 300)]

    async def of_the_server() -> list[Prompt]:
        tokenizer = await ServerTokenizer.find(Address.of(url))
        assert tokenizer is not None
        return await make(tokenizer)

    tokenizer = mustafar.Tokenizer(DEMO)
    for prompts in (asyncio.run(make(FolderTokenizer(DEMO))), asyncio.run(of_the_server())):
        assert [len(tokenizer.encode(prompt.text)) for prompt in prompts] == [
            prompt.tokens for prompt in prompts
        ]
        for prompt, wanted in zip(prompts, (3, 5, 40, 300)):
            assert abs(prompt.tokens - wanted) <= 1
    with pytest.raises(ValueError, match="no tokens"):
        asyncio.run(PromptMaker.of(FolderTokenizer(DEMO), "", 0, 0))


def test_prompts_may_begin_alike() -> None:
    async def make() -> list[str]:
        text = " ".join(f"word{i}" for i in range(3000))
        maker = await PromptMaker.of(FolderTokenizer(DEMO), text, 30, seed=5)
        return [(await maker.make(traffic.Lengths(60, 1))).text for _ in range(4)]

    texts = asyncio.run(make())
    common = FolderTokenizer(DEMO)
    ids = [asyncio.run(common.encode(text)) for text in texts]
    assert all(some[:28] == ids[0][:28] for some in ids)  # the last ones may join what follows
    assert len({tuple(some[32:]) for some in ids}) == 4


@pytest.mark.parametrize("chat", [False, True])
def test_clients_that_wait(url: str, chat: bool) -> None:
    words = (*SHORT, "--requests", "8", "--clients", "3", *(["--chat"] * chat))
    found = measured("--url", url + "/v1/", *words)
    assert found["requests"] == {"sent": 8, "ok": 8, "refused": 0, "failed": 0, "errors": {}}
    assert found["tokens"]["output"] == 8 * 6 and found["tokens"]["counted_by"] == "server"
    assert found["load"]["clients"] == 3 and found["model"] == "demo"
    assert found["load"]["context"] == 1024
    assert 0 < found["time_to_first_token"]["p50"] <= found["request_time"]["p99"]
    assert found["server"]["running"]["most"] <= 3 and found["server"]["kv_budget"] == 0
    shown = report.table(found)
    assert "8 of 8 whole" in shown and "time between tokens" in shown and "caches, MiB" in shown


def test_the_same_load_again(url: str) -> None:
    words = ("--url", url, *SHORT, "--requests", "5", "--rate")
    first, second = measured(*words, "500"), measured(*words, "50")
    assert first["tokens"] == second["tokens"]  # another rate, the same prompts
    assert first["load"]["rate"] == 500 and first["requests"]["ok"] == 5
    other = measured(*words, "500", "--seed", "1")
    assert other["tokens"]["prompt"] != first["tokens"]["prompt"]


def test_what_the_server_refuses_is_counted(model: mustafar.Model) -> None:
    with mustafar.Engine(model) as engine:
        with serving(engine, Settings(max_streams=1)) as (url, app):
            words = ("--output-tokens", "60", "--output-sigma", "0", "--clients", "4")
            found = measured("--url", url, *words, "--requests", "4", "--prompt-tokens", "30")
            requests = found["requests"]
            assert requests["ok"] >= 1 and requests["ok"] + requests["refused"] == 4
            counted = app.service.metrics.refused.values.get((("code", "too_many_streams"),), 0)
            assert requests["refused"] == counted
            errors = requests["errors"]
            assert sum(errors.values()) == counted
            assert all(error.startswith("429 too_many_streams: ") for error in errors)
    with mustafar.Engine(model) as engine, serving(engine) as (url, _):
        with pytest.raises(ValueError, match="temperature"):
            measured("--url", url, *SHORT, "--extra", '{"temperature": -1}')


@asynccontextmanager
async def answering(data: bytes) -> AsyncIterator[load.Sender]:
    """A server that says the same to everyone, and closes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        address = Address.of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield load.Sender(address, "m", False, {}, 30)


def record_of(data: bytes) -> load.Record:
    async def ask() -> load.Record:
        async with answering(data) as sender:
            return await sender.send(Prompt("a", 1, 2), 0.0)

    return asyncio.run(ask())


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def test_streams_of_other_servers() -> None:
    said, end = event(choices=[{"text": "a"}]), event(choices=[{"text": "", "finish_reason": "x"}])
    good = record_of(HEAD + b": a comment\n\n" + said + said + end + b"data: [DONE]\n\n")
    assert good.outcome == "ok" and (good.output_tokens, good.counted) == (2, False)
    assert good.prompt_tokens == 1 and len(good.pieces) == 2
    usage = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 9})
    counted = record_of(HEAD + said + usage + b"data: [DONE]\n\n")
    assert (counted.prompt_tokens, counted.output_tokens, counted.counted) == (7, 9, True)
    chunk = said.replace(b"\n", b"\r\n")
    chunked = HEAD.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")
    parts = b"".join(b"%x\r\n%b\r\n" % (len(x), x) for x in (chunk[:9], chunk[9:], end))
    assert record_of(chunked + parts + b"0\r\n\r\n").outcome == "ok"


@pytest.mark.parametrize(
    ("data", "outcome", "error"),
    [
        (HEAD + event(choices=[{"text": "a"}]), "failed", "ended before"),
        (HEAD + event(error={"code": "shutting_down"}), "failed", "shutting_down"),
        (HEAD.replace(b"\r\n\r\n", b"\r\nContent-Length: 90\r\n\r\n"), "failed", "cut"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n{}", "refused", "503"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno", "failed", "500"),
        (b"SSH-2.0\r\n\r\n", "failed", "HTTP"),
        (b"", "failed", "closed|cut"),
        (HEAD + b"data: {\n\n", "failed", "JSON"),
        (HEAD + b"data: [1]\n\n", "failed", "JSON"),
        (HEAD + event(choices=[3]), "failed", "none of a completion"),
        (HEAD + event(usage={"tokens": 3}), "failed", "none of a completion"),
    ],
)
def test_what_goes_wrong_is_told_apart(data: bytes, outcome: str, error: str) -> None:
    record = record_of(data)
    assert record.outcome == outcome and re.search(error, record.error), record.error


def test_figures_without_a_reply() -> None:
    records = [load.Record(due=1.0, sent=1.0, ended=2.0, outcome="failed", error="x")]
    found = report.figures(records, Watch(Address.of("localhost:1")))
    assert found["time_to_first_token"] is None and found["output_tokens_per_second"] == 0
    assert "1 x x" in report.table(found)


def test_figures_of_known_times() -> None:
    records = [
        load.Record(0.0, 0.01, [0.1, 0.2, 0.4], 0.5, 10, 6, True, "ok"),
        load.Record(1.0, 1.0, [2.0], 2.0, 20, 1, True, "ok"),
    ]
    watch = Watch(Address.of("localhost:1"), gauges={"kv_bytes": [1.0, 3.0]}, lags=[0.5])
    found = report.figures(records, watch)
    assert found["seconds"] == 2.0 and found["output_tokens_per_second"] == 3.5
    assert found["time_to_first_token"]["mean"] == pytest.approx(0.55)
    assert found["time_between_tokens"]["p50"] == pytest.approx(0.15)
    assert found["time_per_output_token"]["mean"] == pytest.approx(0.3 / 5)
    assert found["server"]["kv_bytes"] == {"mean": 2.0, "most": 3.0}
    assert "bottleneck" in report.warnings(found)[0]


def test_numbers_of_metrics() -> None:
    text = '# HELP a b\na 3\nb{x="1"} 4\nc NaN-ish\nd 1.5e3\n'
    assert numbers_of(text) == {"a": 3.0, "d": 1500.0}
    assert resident_bytes(2**22 + 1) is None


def test_addresses() -> None:
    address = Address.of("https://[::1]:8443/base/v1/", "key")
    assert (address.host, address.port, address.tls, address.root) == ("::1", 8443, True, "/base")
    assert ("authorization", "Bearer key") in address.headers
    assert address.url == "https://[::1]:8443/base"
    assert Address.of("localhost:80").host == "localhost"
    for wrong in ("ftp://x", "http://"):
        with pytest.raises(ValueError, match="--url"):
            Address.of(wrong)


def called(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [*COMMAND, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_it_starts_a_server() -> None:
    words = (*SHORT, "--requests", "4", "--json", "--", "-t", "1", "--kv", "balanced")
    result = called(*words, "--kv-budget", "64M")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["requests"]["ok"] == 4 and found["server"]["kv_budget"] == 64 << 20
    assert found["server"]["resident_bytes"]["most"] > 1 << 20
    assert found["command"][:2] == ["mustafar", "serve"] and "balanced" in found["command"]
    wrong = called("-m", DEMO, "--", "--kv", "tiny")
    assert wrong.returncode == 1 and "lossless" in wrong.stderr


def test_wrong_words_are_refused() -> None:
    code: Any
    nobody = ("--url", "http://127.0.0.1:9")
    for words, status in (
        (("--rate", "1", "--clients", "2"), 2),
        (("--url", "x", "-m", "y"), 2),
        (("--url", "x", "--", "--kv", "small"), 2),
        (("--requests", "0"), 2),
        (("--rate", "0"), 2),
        (("--extra", "[]"), 2),
        (("--pid", "1"), 2),
        (("--lengths", "x", "--prompt-sigma", "1"), 2),
        (nobody, 1),
    ):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
        assert code == status, words


def test_the_extra_is_named_where_it_is_missing() -> None:
    without = "import sys, runpy; sys.modules['h11'] = None; sys.argv[1:] = {words}; "
    code = without + "runpy.run_module('mustafar.bench_serve', run_name='__main__')"
    for words, status, said in (([], 1, "pip install 'mustafar[server]'"), (["--help"], 0, "")):
        result = subprocess.run(
            [sys.executable, "-c", code.format(words=words)], capture_output=True, text=True
        )
        assert result.returncode == status and said in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


@needs_command
def test_the_command_hands_over_to_python() -> None:
    result = run("bench-serve", "--version", MUSTAFAR_PYTHON=sys.executable)
    assert result.stdout.strip() == mustafar.__version__
    assert "bench-serve" in run("--help").stdout
    script = run("completion", "bash").stdout
    listed = re.search(r"^    bench-serve\) options='(.*)' ;;$", script, re.MULTILINE)
    assert listed is not None
    known = {name for action in options.parser()._actions for name in action.option_strings}
    assert set(listed[1].split()) == known
