"""A server whose caches become smaller where memory is short."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx2 = pytest.importorskip("httpx2")

import mustafar
from mustafar import Engine, KVConfig, Session
from support.paths import DEMO
from support.server import serving

KV = KVConfig(value_dtype="auto", window=8)
N_TOKENS = 200


def test_more_is_served_and_the_metrics_say_how() -> None:
    with mustafar.Model(DEMO, dtype="f32", threads=1) as model:
        one = Session(model, KV)
        one.prefill([*range(5, 105), *range(5, 5 + N_TOKENS)])
        budget = 4 * one.memory().allocated
        del one
    with mustafar.Model(DEMO, dtype="f32", threads=1, kv_budget=budget) as model:
        with Engine(model, KV, on_pressure="sparser") as engine, serving(engine) as (url, _):

            def ask(i: int) -> tuple[int, dict[str, int]]:
                body = {
                    "prompt": [*range(5 + i, 105 + i)],
                    "max_tokens": N_TOKENS,
                    "ignore_eos": True,
                    "temperature": 0,
                }
                reply = httpx2.post(url + "/v1/completions", json=body, timeout=120)
                return reply.status_code, reply.json().get("usage", {})

            with ThreadPoolExecutor(8) as threads:
                replies = list(threads.map(ask, range(8)))
            assert [status for status, _ in replies] == [200] * 8
            assert [usage["completion_tokens"] for _, usage in replies] == [N_TOKENS] * 8
            page = httpx2.get(url + "/metrics").text
            repruned = int(page.split("\nmustafar_requests_repruned_total ")[1].split("\n")[0])
            assert repruned == engine.stats().repruned > 0
        assert model.memory().kv_peak_bytes <= budget
