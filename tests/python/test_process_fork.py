"""A process that forks, as multiprocessing does: the child has the model, but none of its threads."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable

import pytest

import mustafar
from support.paths import model_folder


@pytest.fixture
def model() -> mustafar.Model:
    return mustafar.Model(model_folder("demo"), device="cpu", threads=2)


def test_a_forked_child_can_use_and_free_the_model(model: mustafar.Model) -> None:
    session = mustafar.Session(model)
    session.prefill(list(range(1, 90)))
    expected = session.fork().decode(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own warning of fork()
        child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that waits for threads it does not have
        status = 1
        try:
            same = bool((session.decode(5) == expected).all())
            several = len(model.generate(["a", "b"], max_new_tokens=3)) == 2
            session.close()
            del session
            model.close()
            status = 0 if same and several else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert (session.decode(5) == expected).all()  # the parent's is as it was


def count_tokens(text: str) -> int:
    assert SHARED is not None
    return len(mustafar.Session(SHARED).generate(text, max_new_tokens=4, ignore_eos=True).token_ids)


SHARED: mustafar.Model | None = None


def test_a_multiprocessing_pool(model: mustafar.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SHARED", model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(count_tokens, ["one", "two", "three"]).get(timeout=60) == [4] * 3


def run_in_child(body: Callable[[], bool]) -> None:
    """Forks; the child must come to its end, in time and with True."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            status = 0 if body() else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, status


def test_forks_while_threads_generate(model: mustafar.Model) -> None:
    idle, busy = mustafar.Session(model), mustafar.Session(model)
    idle.prefill(list(range(1, 90)))
    expected = idle.fork().decode(5)
    stop = threading.Event()

    def work(session: mustafar.Session) -> None:
        while not stop.is_set():
            session.generate("Once upon a time", max_new_tokens=30, ignore_eos=True)
            session.reset()

    def in_child() -> bool:
        if not (idle.decode(5) == expected).all():
            return False
        try:
            busy.decode(5)
        except mustafar.StateError as error:
            if "when this process was forked" not in str(error):
                return False
        made = mustafar.Session(model).generate("one", max_new_tokens=4, ignore_eos=True)
        idle.close()
        return len(made.token_ids) == 4 and len(model.tokenizer.encode("some text")) > 0

    threads = [threading.Thread(target=work, args=(busy,))]
    threads.append(threading.Thread(target=work, args=(mustafar.Session(model),)))
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            run_in_child(in_child)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_multiprocessing_process_beside_a_thread_that_generates(model: mustafar.Model) -> None:
    done: list[int] = []
    busy = threading.Thread(
        target=lambda: done.append(
            len(
                mustafar.Session(model).generate("a", max_new_tokens=400, ignore_eos=True).token_ids
            )
        )
    )
    busy.start()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work() -> None:
        session = mustafar.Session(model)
        results.put(len(session.generate("b", max_new_tokens=5, ignore_eos=True).token_ids))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        processes = [context.Process(target=work) for _ in range(3)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert [results.get() for _ in processes] == [5] * 3
    busy.join()
    assert done == [400]


def test_a_child_beside_an_engine_that_tells_coroutines(model: mustafar.Model) -> None:
    engine = mustafar.Engine(model)
    requests = [engine.submit("Once", max_new_tokens=400, ignore_eos=True)]

    async def end(request: mustafar.Request) -> None:
        await request

    def in_child() -> bool:
        nonlocal engine
        refused = 0
        for call in (requests[0].result, engine.stats, lambda: asyncio.run(end(requests[0]))):
            try:
                call()
            except mustafar.StateError:
                refused += 1
        engine.close()
        requests.clear()
        engine = None
        gc.collect()
        return refused == 3

    async def run() -> None:
        async for _ in requests[0]:
            break
        waiting = asyncio.ensure_future(end(requests[0]))
        await asyncio.sleep(0)  # a thread waits for changes now
        run_in_child(in_child)
        requests[0].cancel()
        await waiting

    asyncio.run(run())
    engine.close()


def test_a_child_while_a_grammar_is_compiled(model: mustafar.Model) -> None:
    pytest.importorskip("llguidance")
    from mustafar import grammar

    def in_child() -> bool:
        made = mustafar.Session(model).generate("a", max_new_tokens=5, regex="[ab]{3}")
        return set(made.text) <= {"a", "b"}

    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with grammar._compiling, grammar._lock:
            held.set()
            free.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        run_in_child(in_child)
    finally:
        free.set()
        thread.join()
