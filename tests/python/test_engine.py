"""The engine: every request gets what it gets alone, whatever else runs, waits or is cancelled."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import Engine, GenerateResult, KVConfig, Session
from support.sessions import GREEDY, ids_of

HALF = KVConfig(sparsity=0.5, value_dtype="auto")


@pytest.fixture
def engine(model: mustafar.Model) -> Engine:
    with Engine(model, HALF) as made:
        yield made


def alone(
    model: mustafar.Model, prompt: str | list[int], kv: KVConfig = HALF, **sampling: object
) -> GenerateResult:
    return Session(model, kv).generate(prompt, **sampling)


def same(result: GenerateResult, expected: GenerateResult) -> bool:
    return (
        result.token_ids == expected.token_ids
        and result.text == expected.text
        and result.finish_reason == expected.finish_reason
    )


def test_requests_get_what_they_get_alone(story: Path) -> None:
    random = np.random.default_rng(5)
    with mustafar.Model(story, dtype="f32") as model:
        # Some prompts are longer than a round's tokens, and there are more than slots.
        cases = [
            (ids_of(int(random.integers(1, 200)), seed=i), int(random.integers(1, 90)))
            for i in range(18)
        ]
        expected = [
            alone(model, ids, max_new_tokens=n, seed=i, temperature=0.7, ignore_eos=True)
            for i, (ids, n) in enumerate(cases)
        ]
        with Engine(model, HALF, max_batch=5, prefill_tokens=64) as engine:
            requests = []
            for i, (ids, n) in enumerate(cases):
                requests.append(
                    engine.submit(ids, max_new_tokens=n, seed=i, temperature=0.7, ignore_eos=True)
                )
                cancelled = engine.submit(ids_of(50, seed=90 + i), max_new_tokens=300, **GREEDY)
                time.sleep(float(random.random()) * 0.01)
                cancelled.cancel()
                assert cancelled.result().finish_reason == "cancelled"
            for request, one, (ids, _) in zip(requests, expected, cases):
                assert same(request.result(60), one)
                assert "".join(request) == one.text
                assert request.done and request.prompt_tokens == len(ids)
            stats = engine.stats()
            assert (stats.finished, stats.failed, stats.running) == (18, 0, 0)
            assert stats.cancelled == 18 and stats.waiting == 0
        assert model.memory().kv_bytes == 0


def test_streams_are_the_result_in_pieces(engine: Engine) -> None:
    request = engine.submit("Once upon a time", max_new_tokens=60, **GREEDY)
    pieces = list(request)
    result = request.result()
    assert (
        "".join(pieces)
        == result.text
        == alone(engine.model, "Once upon a time", max_new_tokens=60, **GREEDY).text
    )
    assert result.stats.generated_tokens == 60 and result.stats.prompt_tokens > 0
    assert result.stats.prefill_seconds > 0 and result.stats.decode_seconds > 0
    # Text that waits for its reader comes in one piece: few tokens may be made before he looks.
    assert len(list(engine.submit("Once upon a time", max_new_tokens=400, **GREEDY))) > 1
    stop = result.text[40:46]
    stopped = engine.submit("Once upon a time", max_new_tokens=60, stop=[stop], **GREEDY)
    expected = result.text[: result.text.index(stop)]
    assert "".join(stopped) == stopped.result().text == expected
    assert stopped.result().finish_reason == "stop"


def solo_results(
    story: Path, kv: KVConfig, prompts: list[list[int]]
) -> tuple[list[GenerateResult], int]:
    """What each prompt gets alone, and the bytes that a sequence of 360 tokens holds."""
    with mustafar.Model(story, dtype="f32") as model:
        expected = [alone(model, ids, kv, max_new_tokens=250, **GREEDY) for ids in prompts]
        one = Session(model, kv)
        one.prefill(ids_of(360))
        return expected, one.memory().allocated


def test_memory_that_is_short_makes_requests_wait_and_pause(story: Path) -> None:
    prompts = [ids_of(40 + 9 * i, seed=i) for i in range(8)]
    expected, need = solo_results(story, HALF, prompts)
    with mustafar.Model(story, dtype="f32", kv_budget=3 * need) as model:
        with Engine(model, HALF) as engine:
            requests = [engine.submit(ids, max_new_tokens=250, **GREEDY) for ids in prompts]
            paused = 0
            while not all(request.done for request in requests):
                paused = max(paused, engine.stats().paused)
                time.sleep(0.001)
            for request, result in zip(requests, expected):
                assert same(request.result(), result)
                assert "".join(request) == result.text
            assert paused > 0
            assert engine.stats().prompt_tokens > sum(map(len, prompts))  # some were made again
        memory = model.memory()
        assert memory.kv_bytes == 0 and memory.kv_peak_bytes <= 3 * need


def test_short_memory_may_make_caches_sparser_instead(story: Path) -> None:
    wide = KVConfig(value_dtype="auto", window=8)
    prompts = [ids_of(40 + 9 * i, seed=i) for i in range(8)]
    expected, need = solo_results(story, wide, prompts)
    budget = 4 * need
    with mustafar.Model(story, dtype="f32", kv_budget=budget) as model:
        with Engine(model, wide, on_pressure="sparser") as engine:
            requests = [engine.submit(ids, max_new_tokens=250, **GREEDY) for ids in prompts]
            results = [request.result(120) for request in requests]
            stats = engine.stats()
        memory = model.memory()
        assert memory.kv_bytes == 0 and memory.kv_peak_bytes <= budget
    repruned = [result.stats.repruned for result in results]
    assert sum(repruned) == stats.repruned > 0
    assert stats.failed == 0 and stats.prompt_tokens == sum(map(len, prompts))  # nobody was paused
    assert [result.stats.generated_tokens for result in results] == [250] * 8
    for result, times, reference in zip(results, repruned, expected):
        assert times > 0 or same(result, reference)


def test_paused_caches_may_be_kept_beside_the_budget(story: Path) -> None:
    prompts = [ids_of(40 + 9 * i, seed=i) for i in range(8)]
    expected, need = solo_results(story, HALF, prompts)
    with mustafar.Model(story, dtype="f32", kv_budget=3 * need) as model:
        with Engine(model, HALF, swap_bytes=64 << 20) as engine:
            requests = [engine.submit(ids, max_new_tokens=250, **GREEDY) for ids in prompts]
            most = 0
            while not all(request.done for request in requests):
                most = max(most, engine.stats().swap_bytes)
                time.sleep(0.001)
            for request, result in zip(requests, expected):
                assert same(request.result(), result)
            stats = engine.stats()
            assert 0 < most <= 64 << 20 and stats.swap_bytes == 0
            assert stats.prompt_tokens == sum(map(len, prompts))  # nothing was computed again
        memory = model.memory()
        assert memory.kv_bytes == 0 and memory.kv_peak_bytes <= 3 * need
    with mustafar.Model(story, dtype="f32") as model:
        with pytest.raises(ValueError, match="swap_bytes is -1, must be at least 0"):
            Engine(model, HALF, swap_bytes=-1)


def test_making_caches_sparser_is_refused_where_it_can_not_be(model: mustafar.Model) -> None:
    with pytest.raises(ValueError, match="no preset|is none|smaller"):
        Engine(model, KVConfig.preset("small"), on_pressure="sparser")
    with pytest.raises(ValueError, match='on_pressure is "fail", must be "pause" or "sparser"'):
        Engine(model, HALF, on_pressure="fail")  # type: ignore[arg-type]


def test_what_can_never_fit_is_refused_and_what_grows_too_large_fails(story: Path) -> None:
    with mustafar.Model(story, dtype="f32") as model:
        one = Session(model, HALF)
        one.prefill(ids_of(160))
        need = one.memory().allocated
    with mustafar.Model(story, dtype="f32", kv_budget=need) as model:
        with Engine(model, HALF) as engine:
            with pytest.raises(mustafar.OutOfMemory, match="prompt of 500 tokens .* kv_budget"):
                engine.submit(ids_of(500))
            large = engine.submit(ids_of(60), max_new_tokens=400, **GREEDY)
            small = engine.submit(ids_of(10), max_new_tokens=20, **GREEDY)
            with pytest.raises(mustafar.OutOfMemory, match="kv_budget"):
                large.result(60)
            assert same(small.result(60), alone(model, ids_of(10), max_new_tokens=20, **GREEDY))
            assert engine.stats().failed == 1


def test_a_prompt_is_refused_by_the_byte(story: Path) -> None:
    ids = ids_of(300)
    with mustafar.Model(story, dtype="f32", kv_budget=1) as model, Engine(model, HALF) as engine:
        with pytest.raises(mustafar.OutOfMemory, match="kv_budget = 1:") as refused:
            engine.submit(ids, max_new_tokens=1)
        assert engine.submit(ids, max_new_tokens=0).result(60).token_ids == []
    found = re.search(r"a prompt of 300 tokens needs (\d+) bytes", str(refused.value))
    assert found is not None
    needed = int(found[1])
    with mustafar.Model(story, dtype="f32", kv_budget=needed) as model:
        with Engine(model, HALF) as engine:
            assert len(engine.submit(ids, max_new_tokens=1, **GREEDY).result(60).token_ids) == 1
        assert model.memory().kv_peak_bytes == needed
    with mustafar.Model(story, dtype="f32", kv_budget=needed - 1) as model:
        with Engine(model, HALF) as engine:
            with pytest.raises(mustafar.OutOfMemory, match=f"needs {needed} bytes"):
                engine.submit(ids, max_new_tokens=1)
            assert engine.stats().failed == 0


def test_cancel_and_timeout(engine: Engine) -> None:
    running = engine.submit("Once", max_new_tokens=400, **GREEDY)
    piece = next(iter(running))
    running.cancel()
    result = running.result(10)
    assert result.finish_reason == "cancelled" and result.text.startswith(piece)
    assert result.text == "".join(running)
    whole = alone(engine.model, "Once", max_new_tokens=400, **GREEDY)
    assert whole.token_ids[: len(result.token_ids)] == result.token_ids
    late = engine.submit("Once", timeout=1e-6, **GREEDY)
    assert late.result(10).finish_reason == "timeout" and late.result().text == ""
    with pytest.raises(TimeoutError, match="0.001 seconds"):
        engine.submit("Once", max_new_tokens=400, **GREEDY).result(0.001)
    assert engine.stats().cancelled == 2


def test_priorities_and_a_full_queue(model: mustafar.Model) -> None:
    started, go = threading.Event(), threading.Event()
    order: list[str] = []

    def hold(_ids: np.ndarray, _logits: np.ndarray) -> None:
        started.set()
        go.wait(30)

    def note(name: str):
        return lambda _ids, _logits: order.append(name)

    with Engine(model, HALF, max_batch=1, max_waiting=3) as engine:
        first = engine.submit("a", max_new_tokens=1, logits_processor=hold)
        assert started.wait(30)
        low = engine.submit("b", max_new_tokens=1, logits_processor=note("low"))
        high = engine.submit("c", max_new_tokens=1, priority=1, logits_processor=note("high"))
        gone = engine.submit("d", max_new_tokens=1, logits_processor=note("gone"))
        with pytest.raises(mustafar.QueueFull, match="max_waiting = 3"):
            engine.submit("e")
        gone.cancel()
        assert engine.stats().waiting == 3
        go.set()
        for request in (first, low, high, gone):
            request.result(30)
        assert order == ["high", "low"]
        engine.submit("e", max_new_tokens=1).result(30)


def test_errors_belong_to_their_request(engine: Engine) -> None:
    def broken(_ids: np.ndarray, _logits: np.ndarray) -> None:
        raise KeyError("mine")

    good = engine.submit("Once", max_new_tokens=30, **GREEDY)
    bad = engine.submit("Once", max_new_tokens=30, logits_processor=broken)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            bad.result(30)
    with pytest.raises(KeyError):
        list(bad)
    assert same(good.result(30), alone(engine.model, "Once", max_new_tokens=30, **GREEDY))
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit([])
    with pytest.raises(ValueError, match="token id 99999"):
        engine.submit([99999])
    with pytest.raises(mustafar.ContextOverflow, match="513 tokens"):
        engine.submit([3] * 513)
    with pytest.raises(ValueError, match="timeout"):
        engine.submit("a", timeout=0)
    with pytest.raises(TypeError, match="priority"):
        engine.submit("a", priority="high")
    for option in ("max_batch", "max_waiting", "prefill_tokens"):
        with pytest.raises(ValueError, match=option):
            Engine(engine.model, **{option: 0})


def test_close_ends_what_runs(model: mustafar.Model) -> None:
    engine = Engine(model, HALF, max_batch=2)
    requests = [engine.submit("Once", max_new_tokens=400, **GREEDY) for _ in range(5)]
    next(iter(requests[0]))
    engine.close()
    assert [request.result(1).finish_reason for request in requests] == ["cancelled"] * 5
    engine.close()
    with pytest.raises(mustafar.StateError, match="closed"):
        engine.submit("a")
    forgotten = Engine(model).submit("Once", max_new_tokens=400, **GREEDY)
    gc.collect()
    assert forgotten.result(10).finish_reason == "cancelled"


def test_a_full_context_and_nothing_to_do(engine: Engine) -> None:
    full = engine.submit([5] * 512, max_new_tokens=9, **GREEDY).result(30)
    assert full.finish_reason == "context" and full.token_ids == []
    almost = engine.submit([5] * 509, max_new_tokens=9, **GREEDY).result(30)
    assert same(almost, alone(engine.model, [5] * 509, max_new_tokens=9, **GREEDY))
    assert almost.finish_reason == "context"
    assert engine.submit("a", max_new_tokens=0).result(30).finish_reason == "length"


def test_asyncio(engine: Engine) -> None:
    expected = {n: alone(engine.model, "Once", max_new_tokens=n, **GREEDY) for n in (20, 60)}

    async def streamed(n: int) -> str:
        return "".join([p async for p in engine.stream("Once", max_new_tokens=n, **GREEDY)])

    async def run() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.ensure_future(tick())
        texts = await asyncio.gather(*(streamed(n) for n in (20, 60) * 4))
        assert texts == [expected[n].text for n in (20, 60)] * 4
        assert ticks > 5
        result = await engine.generate("Once", max_new_tokens=60, **GREEDY)
        assert same(result, expected[60])
        request = engine.submit("Once", max_new_tokens=60, **GREEDY)
        both = await asyncio.gather(request, request._ended())
        assert [r.text for r in both] == [expected[60].text] * 2
        assert "".join([p async for p in request]) == expected[60].text
        # Leaving the loop, and cancelling a task, cancel the request.
        async for _ in engine.stream("Once", max_new_tokens=400, **GREEDY):
            break
        task = asyncio.ensure_future(engine.generate("Once", max_new_tokens=400, **GREEDY))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while engine.stats().cancelled < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(ValueError):
            await engine.generate([])
        ticking.cancel()

    asyncio.run(run())
    asyncio.run(run_again(engine, expected[20]))


async def run_again(engine: Engine, expected: GenerateResult) -> None:
    """Another loop, after the first was closed."""
    assert same(await engine.generate("Once", max_new_tokens=20, **GREEDY), expected)


def test_closing_wakes_coroutines(model: mustafar.Model) -> None:
    async def run() -> None:
        engine = Engine(model, HALF)
        waiting = asyncio.ensure_future(engine.generate("Once", max_new_tokens=450, **GREEDY))
        await asyncio.sleep(0.02)
        engine.close()
        assert (await asyncio.wait_for(waiting, 10)).finish_reason == "cancelled"

    asyncio.run(run())


def test_sessions_run_beside_an_engine(engine: Engine) -> None:
    expected = alone(engine.model, "Once", max_new_tokens=60, **GREEDY)
    requests = [engine.submit("Once", max_new_tokens=60, **GREEDY) for _ in range(6)]
    assert same(alone(engine.model, "Once", max_new_tokens=60, **GREEDY), expected)
    assert all(same(request.result(30), expected) for request in requests)


def test_a_forked_child_is_told(engine: Engine) -> None:
    request = engine.submit("Once", max_new_tokens=30, **GREEDY)
    request.result(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        refused = 0
        for call in (lambda: engine.submit("a"), engine.stats, request.result):
            try:
                call()
            except mustafar.StateError:
                refused += 1
        engine.close()
        with Engine(engine.model) as own:
            made = len(own.submit("Once", max_new_tokens=3, **GREEDY).result(20).token_ids)
        os._exit(0 if (refused, made) == (3, 3) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert same(engine.submit("Once", max_new_tokens=30, **GREEDY).result(30), request.result())


LEFT_OPEN = """
import sys, threading, mustafar
engine = mustafar.Engine(mustafar.Model(sys.argv[1], threads=2))
slow = lambda ids, logits: None
requests = [engine.submit("Once", max_new_tokens=450, ignore_eos=True, logits_processor=slow)
            for _ in range(4)]
next(iter(requests[0]))
print("leaving")
"""


def test_the_interpreter_ends_with_an_engine_that_runs(story: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, story], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "leaving\n", "")
