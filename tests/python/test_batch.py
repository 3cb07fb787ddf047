"""Many sequences at a time: each gets what it gets alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Session
from support.sessions import GREEDY, KVS, ids_of


def test_batch_equals_one_by_one(story: Path) -> None:
    prompts = ["Once upon a time", "The", "A little dog went to the park and saw", "One day"] * 3
    with mustafar.Model(story, dtype="f32") as model:
        for kv in (KVConfig.preset("dense"), KVConfig(sparsity=0.5, window=16, value_dtype="auto")):
            params = {"max_new_tokens": 90, "temperature": 0.0}
            together = model.generate(prompts, kv=kv, **params)
            for prompt, result in zip(prompts, together):
                alone = Session(model, kv).generate(prompt, **params)
                assert result.token_ids == alone.token_ids
                assert result.text == alone.text
                assert result.finish_reason == alone.finish_reason
            narrow = model.generate(prompts, kv=kv, max_batch=2, **params)
            assert [r.token_ids for r in narrow] == [r.token_ids for r in together]


def test_decode_batch_equals_one_by_one(story: Path) -> None:
    with mustafar.Model(story, dtype="f32") as model:
        kvs = list(KVS.values())
        together = [Session(model, kv) for kv in kvs]
        alone = [Session(model, kv) for kv in kvs]
        for i, (a, b) in enumerate(zip(together, alone)):
            for session in (a, b):
                session.prefill(ids_of(30 + 40 * i))
        for step in range(70):
            tokens = ids_of(len(kvs), seed=step)
            logits = Session.decode_batch(together, tokens)
            expected = [s.decode(token) for s, token in zip(alone, tokens)]
            assert np.array_equal(logits, expected)
        assert [s.tokens for s in together] == [s.tokens for s in alone]
        assert np.array_equal(together[1].logits(), alone[1].logits())
        with pytest.raises(mustafar.StateError):
            Session.decode_batch([together[0], together[0]], [1, 2])
        with pytest.raises(ValueError, match="one token for each"):
            Session.decode_batch(together, [1])
        with pytest.raises(ValueError, match="token id"):
            Session.decode_batch(together[:2], [3, -1])
        assert [s.tokens for s in together] == [s.tokens for s in alone]


def test_batch_errors_name_the_prompt(story: Path) -> None:
    with mustafar.Model(story) as model:
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            model.generate(["a", []])
        with pytest.raises(mustafar.ContextOverflow, match="prompt 0"):
            model.generate([[3] * 513])
        with pytest.raises(TypeError, match="list of prompts"):
            model.generate("abc")
        assert model.generate([]) == []


def test_batch_waits_for_memory(story: Path) -> None:
    prompts = [ids_of(60, seed=i) for i in range(6)]
    kv = KVConfig(sparsity=0.5, value_dtype="auto")
    with mustafar.Model(story, dtype="f32") as model:
        expected = model.generate(prompts, kv=kv, max_new_tokens=100, **GREEDY)
        one = Session(model, kv)
        one.prefill(ids_of(160))
        need = one.memory().allocated
    with mustafar.Model(story, dtype="f32", kv_budget=5 * need) as model:
        results = model.generate(prompts, kv=kv, max_new_tokens=100, **GREEDY)
        assert [r.token_ids for r in results] == [r.token_ids for r in expected]
        assert model.memory().kv_bytes == 0
    with mustafar.Model(story, dtype="f32", kv_budget=need) as model:
        with pytest.raises(mustafar.OutOfMemory, match="prompt 0"):
            model.generate(prompts, kv=kv, max_new_tokens=100, **GREEDY)
