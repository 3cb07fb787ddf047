"""Beginnings that requests share: computed once, by the same calls bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

import mustafar
from mustafar import Engine, GenerateResult, KVConfig, Session
from support.sessions import GREEDY, ids_of

SETTINGS = [
    KVConfig(sparsity=0.5, value_dtype="auto"),
    KVConfig(),
    KVConfig(value_dtype="int4", profile="hadamard"),
]


def by_calls(
    model: mustafar.Model, kv: KVConfig, ids: list[int], prefixes: list[int], **sampling: object
) -> GenerateResult:
    session = Session(model, kv)
    done = 0
    for end in prefixes:
        session.prefill(ids[done:end])
        done = end
    return session.generate(ids[done:], **sampling)


@pytest.mark.parametrize("kv", SETTINGS, ids=["pruned", "int8", "int4"])
def test_a_pinned_prefix_is_computed_once(story: Path, kv: KVConfig) -> None:
    system = ids_of(200)
    prompts = [system + ids_of(4 + i, seed=i) for i in range(8)]
    with mustafar.Model(story, dtype="f32") as model, Engine(model, kv) as engine:
        assert engine.pin(system) == 200
        requests = [engine.submit(ids, max_new_tokens=20, logprobs=1, **GREEDY) for ids in prompts]
        results = [request.result(60) for request in requests]
        for ids, result in zip(prompts, results):
            expected = by_calls(model, kv, ids, [200], max_new_tokens=20, logprobs=1, **GREEDY)
            assert (result.token_ids, result.logprobs) == (expected.token_ids, expected.logprobs)
            assert result.stats.prompt_tokens == len(ids)
        assert sorted(result.stats.cached_tokens for result in results) == [0] + 7 * [200]
        stats = engine.stats()
        assert stats.prompt_tokens == sum(map(len, prompts)) - 7 * 200
        assert (stats.reused_tokens, stats.prefixes) == (7 * 200, 1)
        assert 0 < stats.prefix_bytes <= stats.kv_bytes
        assert engine.unpin(system) and not engine.unpin(system)
        whole = engine.submit(prompts[0], max_new_tokens=20, **GREEDY).result(60)
        assert whole.stats.cached_tokens == 0
        assert (
            whole.token_ids
            == by_calls(model, kv, prompts[0], [], max_new_tokens=20, **GREEDY).token_ids
        )


def test_a_request_says_where_its_calls_end(model: mustafar.Model) -> None:
    kv = SETTINGS[0]
    ids = ids_of(180)
    with Engine(model, kv) as engine, Engine(model, kv, prefix_cache="off") as off:
        for prefixes in ([], [150], [60, 150], [60], [60, 150]):
            expected = by_calls(model, kv, ids, prefixes, max_new_tokens=9, **GREEDY)
            for each in (engine, off):
                request = each.submit(ids, max_new_tokens=9, prefixes=prefixes, **GREEDY)
                assert request.result(60).token_ids == expected.token_ids
        assert engine.stats().reused_tokens == 60 + 150
        assert off.stats().reused_tokens == off.stats().prefixes == 0


def test_texts_are_pinned_as_they_are_submitted(model: mustafar.Model) -> None:
    with Engine(model, SETTINGS[0]) as engine:
        n = engine.pin("Once upon a time there was a dragon.\n")
        first, second = (
            engine.submit(
                "Once upon a time there was a dragon.\nIt " + more, max_new_tokens=3, **GREEDY
            ).result(60)
            for more in ("slept.", "flew.")
        )
        assert first.stats.cached_tokens == 0 and second.stats.cached_tokens == n


def test_approximate_reuse_is_asked_for_by_name(model: mustafar.Model) -> None:
    ids = ids_of(200)
    with Engine(model, SETTINGS[0], prefix_cache="approximate") as engine:
        first = engine.submit(ids, max_new_tokens=10, **GREEDY).result(60)
        longer = ids + first.token_ids + ids_of(5, seed=9)
        second = engine.submit(longer, max_new_tokens=10, **GREEDY).result(60)
        assert first.stats.cached_tokens == 0
        assert second.stats.cached_tokens == len(ids) + 9  # the last one made is in no cache
        session = Session(model, SETTINGS[0])
        session.generate(ids, max_new_tokens=9, **GREEDY)
        expected = session.generate(longer[209:], max_new_tokens=10, **GREEDY)
        assert second.token_ids == expected.token_ids
    session.close()
    assert model.memory().kv_bytes == 0


def test_what_is_wrong_is_named(model: mustafar.Model) -> None:
    with pytest.raises(ValueError, match="prefix_cache"):
        Engine(model, prefix_cache="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefix_bytes"):
        Engine(model, prefix_bytes=-1)
    with Engine(model) as engine:
        with pytest.raises(ValueError, match="prefix"):
            engine.submit([1, 2, 3], prefixes=[4])
        with pytest.raises(TypeError, match="prefixes"):
            engine.submit([1, 2, 3], prefixes=["1"])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="prefix"):
            engine.pin([])
