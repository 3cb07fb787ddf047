"""A process that forks, as multiprocessing does: the child has the model, but none of its threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings

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
