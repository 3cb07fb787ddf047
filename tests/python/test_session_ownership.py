"""Whose a session is, seen from Python: streams own it, cancel and close, threads, signals, the end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import mustafar
from mustafar import Chat, Session
from support.sessions import GREEDY, ids_of


def in_thread(call: Callable[[], object]) -> BaseException | None:
    """What a call raises on another thread."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised[0] if raised else None


def test_a_call_beside_a_stream_is_refused_and_disturbs_nothing(model: mustafar.Model) -> None:
    expected = Session(model).generate("Once upon", max_new_tokens=30, **GREEDY)
    session = Session(model)
    stream = session.stream("Once upon", max_new_tokens=30, **GREEDY)
    text = next(stream)
    for call in (
        lambda: session.decode(5),
        lambda: session.generate("x"),
        lambda: session.rewind(0),
        session.reset,
        session.fork,
    ):
        error = in_thread(call)
        assert isinstance(error, mustafar.StateError) and "generation" in str(error)
    assert in_thread(lambda: (session.memory(), session.position, session.tokens)) is None
    assert session.memory().dense_tokens == session.position == len(session.tokens)
    assert text + "".join(stream) == expected.text
    assert stream.result.token_ids == expected.token_ids
    session.decode(5)


def test_a_stream_that_is_left_gives_the_session_back(model: mustafar.Model) -> None:
    session = Session(model)
    for _ in session.stream("Once", max_new_tokens=30, **GREEDY):
        break  # the stream is dropped
    session.decode(5)
    closed = session.stream("Once", max_new_tokens=30, **GREEDY)
    next(closed)
    closed.close()
    session.decode(5)
    with session.stream("Once", max_new_tokens=30, **GREEDY) as left:
        next(left)
    session.decode(5)
    circle = [session.stream("Once", max_new_tokens=30, **GREEDY)]
    circle.append(circle)  # type: ignore[arg-type]
    del circle
    gc.collect()
    session.decode(5)


def test_an_error_in_a_stream_ends_it_although_the_error_is_kept(model: mustafar.Model) -> None:
    session = Session(model)
    stream = session.stream("Once", max_new_tokens=30, **GREEDY)
    next(stream)
    held = session.tokens
    session.cancel()
    with pytest.raises(mustafar.Cancelled) as kept:
        next(stream)
    assert kept.traceback and session.tokens == held
    assert stream.result.finish_reason == "cancelled"
    session.decode(5)
    assert list(stream) == []


def test_cancel_is_nothing_to_later_calls(model: mustafar.Model) -> None:
    session = Session(model)
    session.prefill(ids_of(20))
    session.cancel()
    session.rewind(10)
    session.cancel()
    session.score(ids_of(20))
    session.cancel()
    assert session.generate("Once", max_new_tokens=2, **GREEDY).token_ids
    chat = Chat(session, chat_template="plain")
    chat.cancel()
    assert chat.send("Hello", max_new_tokens=2, **GREEDY).token_ids


def test_a_block_closes_a_session_whose_stream_has_not_ended(model: mustafar.Model) -> None:
    with Session(model) as session:
        stream = session.stream("Once", max_new_tokens=30, **GREEDY)
        next(stream)
    with pytest.raises(mustafar.StateError, match="closed"):
        next(stream)
    assert len(stream.result.token_ids) == 1
    with pytest.raises(RuntimeError, match="mine"), Session(model) as session:
        stream = session.stream("Once", max_new_tokens=30, **GREEDY)
        next(stream)
        raise RuntimeError("mine")


def test_close_refuses_while_a_call_runs(model: mustafar.Model) -> None:
    session = Session(model)
    inside, leave = threading.Event(), threading.Event()

    def hold(_ids: object, _logits: object) -> None:
        inside.set()
        leave.wait(60)

    made: list[mustafar.GenerateResult] = []
    thread = threading.Thread(
        target=lambda: made.append(
            session.generate("Once", max_new_tokens=3, logits_processor=hold, **GREEDY)
        )
    )
    thread.start()
    assert inside.wait(60)
    with pytest.raises(mustafar.StateError, match="another call"):
        session.close()
    assert session.memory().dense_tokens == session.position
    leave.set()
    thread.join(60)
    assert len(made[0].token_ids) == 3
    session.close()
    session.close()
    with pytest.raises(mustafar.StateError, match="closed"):
        session.memory()


def test_a_reply_owns_its_chat(model: mustafar.Model) -> None:
    chat = Chat(Session(model), chat_template="plain")
    stream = chat.stream("One", max_new_tokens=20, **GREEDY)
    next(stream)
    before = chat.messages
    for call in (lambda: chat.send("Two"), chat.undo, chat.clear, lambda: chat.add(before[0])):
        assert isinstance(in_thread(call), mustafar.StateError)
    assert chat.messages == before
    del stream
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.undo() == "One"


def test_a_signal_handler_may_ask_and_is_refused_the_rest(model: mustafar.Model) -> None:
    session = Session(model)
    answers: list[object] = []

    def handler(_number: int, _frame: object) -> None:
        answers.append(session.position)
        for call in (session.close, lambda: session.decode(5), session.reset):
            try:
                call()
            except mustafar.StateError as error:
                answers.append(error)
        session.cancel()

    old = signal.signal(signal.SIGUSR1, handler)
    inside = threading.Event()
    sender = threading.Thread(
        target=lambda: inside.wait(60) and os.kill(os.getpid(), signal.SIGUSR1)
    )
    sender.start()
    try:
        with pytest.raises(mustafar.Cancelled):
            session.generate(
                "Once",
                max_new_tokens=900,
                logits_processor=lambda _ids, _logits: inside.set(),
                **GREEDY,
            )
    finally:
        sender.join(60)
        signal.signal(signal.SIGUSR1, old)
    assert len(answers) == 4
    assert session.position == 0
    assert session.generate("Once", max_new_tokens=2, **GREEDY).token_ids


AT_THE_END = """
import sys, threading, time
import mustafar
model = mustafar.Model(sys.argv[1], device="cpu")
started = threading.Barrier(4)

def repeat(work):
    def run():
        work()
        started.wait()
        while True:
            work()
    threading.Thread(target=run, daemon=True).start()

greedy = dict(temperature=0.0, ignore_eos=True)
def processor(ids, logits): pass
a, b, c = mustafar.Session(model), mustafar.Session(model), mustafar.Session(model)
def generate(): a.reset(); a.generate("Once", max_new_tokens=20, **greedy)
def stream(): b.reset(); list(b.stream("Once", max_new_tokens=20, logits_processor=processor, **greedy))
def decode():
    if c.position > 100: c.reset()
    c.decode(5)
repeat(generate); repeat(stream); repeat(decode)
started.wait()
time.sleep(float(sys.argv[2]))
print("done")
"""


def test_the_interpreter_may_end_while_threads_are_in_native_work(story: Path) -> None:
    for pause in ("0", "0.05", "0.11"):
        run = subprocess.run(
            [sys.executable, "-c", AT_THE_END, str(story), pause],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")
