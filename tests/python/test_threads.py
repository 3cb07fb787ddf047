"""Sessions and threads: cancelling, Ctrl-C, and who may use what at the same time."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Session
from support.sessions import GREEDY, ids_of


def test_cancel_from_another_thread(model: mustafar.Model, kv: KVConfig) -> None:
    session = Session(model, kv)
    session.prefill(ids_of(100))
    errors: list[BaseException] = []
    started = threading.Event()

    def processor(_ids: np.ndarray, _logits: np.ndarray) -> None:
        started.set()

    def run() -> None:
        try:
            session.generate("x", max_new_tokens=350, logits_processor=processor, **GREEDY)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    session.cancel()
    thread.join(30)
    assert [type(e) for e in errors] == [mustafar.Cancelled]
    assert session.tokens == ids_of(100)


def test_second_thread_is_refused(model: mustafar.Model) -> None:
    session = Session(model)
    inside, leave = threading.Event(), threading.Event()

    def hold(_ids: np.ndarray, _logits: np.ndarray) -> None:
        inside.set()
        leave.wait(30)

    thread = threading.Thread(
        target=lambda: session.generate("x", max_new_tokens=1, logits_processor=hold)
    )
    thread.start()
    assert inside.wait(30)
    with pytest.raises(mustafar.StateError, match="one thread"):
        session.decode(3)
    leave.set()
    thread.join(30)
    session.decode(3)


def test_other_threads_may_ask_for_the_tokens(model: mustafar.Model) -> None:
    session = Session(model)
    thread = threading.Thread(target=lambda: session.generate("Once", max_new_tokens=200, **GREEDY))
    thread.start()
    seen = []
    while thread.is_alive():
        seen.append((session.position, session.tokens))
    thread.join()
    for position, tokens in seen:
        assert position <= len(tokens) and tokens == session.tokens[: len(tokens)]
    assert len({len(tokens) for _, tokens in seen}) > 3


def test_sessions_on_several_threads_share_a_model(model: mustafar.Model) -> None:
    expected = Session(model).generate("Once upon", max_new_tokens=40, **GREEDY).token_ids
    results: list[list[int]] = []

    def run() -> None:
        results.append(Session(model).generate("Once upon", max_new_tokens=40, **GREEDY).token_ids)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_ctrl_c_stops_generate(model: mustafar.Model) -> None:
    session = Session(model)
    session.prefill(ids_of(50))
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))

    def slow(_ids: np.ndarray, _logits: np.ndarray) -> None:
        time.sleep(0.005)

    timer.start()
    with pytest.raises(KeyboardInterrupt):
        session.generate("x", max_new_tokens=400, logits_processor=slow, **GREEDY)
    assert session.position == 50
    session.decode(3)


def test_ctrl_c_stops_a_prefill(tmp_path: Path) -> None:
    oracle = pytest.importorskip("support.oracle")
    folder = oracle.make_model(
        tmp_path, hidden=512, heads=8, kv_heads=2, head_dim=64, layers=8, context=32768
    )
    with mustafar.Model(folder, dtype="f32") as slow:
        session = Session(slow)
        ids = [int(x) for x in np.random.default_rng(0).integers(3, 320, 30000)]
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            session.prefill(ids)
        assert session.position == 0 and session.memory().compressed_tokens == 0
        session.prefill(ids[:10])
