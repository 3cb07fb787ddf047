"""What the session promises: positions, rewind, fork, cancelling, stop texts, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Session
from support.sessions import GREEDY, ids_of


def same(a: Session, b: Session, steps: int = 8) -> None:
    """Both sessions go on bit-identically."""
    for token in ids_of(steps, seed=9):
        assert np.array_equal(a.decode(token), b.decode(token))


def test_position_counts_tokens(model: mustafar.Model, kv: KVConfig) -> None:
    session = Session(model, kv)
    assert session.position == 0 and session.tokens == []
    session.prefill(ids_of(100))
    session.decode(5)
    assert session.position == len(session.tokens) == 101
    assert session.tokens == ids_of(100) + [5]
    result = session.generate("and then", max_new_tokens=20, **GREEDY)
    assert len(result.token_ids) == 20
    assert session.tokens[-20:] == result.token_ids
    assert session.position == len(session.tokens)


def test_generate_adds_bos_only_at_the_start(model: mustafar.Model) -> None:
    session = Session(model)
    session.generate("Once", max_new_tokens=1)
    assert session.tokens[0] == model.config["bos_token_id"]
    before = session.position
    session.generate(" upon", max_new_tokens=1)
    assert model.config["bos_token_id"] not in session.tokens[before:-1]


def test_text_and_ids_are_the_same_prompt(model: mustafar.Model, kv: KVConfig) -> None:
    text = "Once upon a time there was"
    by_text = Session(model, kv).generate(text, max_new_tokens=40, **GREEDY)
    by_ids = Session(model, kv).generate(model.tokenizer.encode(text), max_new_tokens=40, **GREEDY)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.text == by_ids.text
    assert by_text.finish_reason == "length"


def test_stream_equals_generate(model: mustafar.Model, kv: KVConfig) -> None:
    params = {"max_new_tokens": 60, "seed": 3, "temperature": 1.0}
    whole = Session(model, kv).generate("Once upon a time", **params)
    session = Session(model, kv)
    stream = session.stream("Once upon a time", **params)
    assert "".join(stream) == whole.text
    assert stream.result.token_ids == whole.token_ids


def test_closing_a_stream_stops_and_keeps_what_was_made(model: mustafar.Model) -> None:
    session = Session(model)
    stream = session.stream("Once upon a time", max_new_tokens=400, **GREEDY)
    for _, _piece in zip(range(5), stream):
        pass
    stream.close()
    position = session.position
    assert list(stream) == []
    assert session.position == position == len(session.tokens)
    assert stream.result.finish_reason == "cancelled"
    assert session.tokens[-len(stream.result.token_ids) :] == stream.result.token_ids
    session.decode(7)  # still usable


def test_using_the_session_under_a_stream_is_refused(model: mustafar.Model) -> None:
    session = Session(model)
    stream = session.stream("Once upon a time", max_new_tokens=50, **GREEDY)
    first = next(stream)
    with pytest.raises(mustafar.StateError, match="in use by a generation"):
        session.decode(3)
    assert first + "".join(stream) == stream.result.text


def test_same_seed_same_tokens(model: mustafar.Model) -> None:
    params = {"max_new_tokens": 50, "temperature": 1.2, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    a = Session(model).generate("Once", seed=11, **params)
    b = Session(model).generate("Once", seed=11, **params)
    c = Session(model).generate("Once", seed=12, **params)
    assert a.token_ids == b.token_ids != c.token_ids


def test_stop_text_is_cut_and_rewound(model: mustafar.Model, kv: KVConfig) -> None:
    free = Session(model, kv).generate("Once upon a time", max_new_tokens=120, **GREEDY)
    stop = free.text[40:46]
    at = free.text.index(stop)
    session = Session(model, kv)
    prompt = len(model.tokenizer.encode("Once upon a time"))
    cut = session.generate("Once upon a time", max_new_tokens=120, stop=[stop], **GREEDY)
    assert cut.text == free.text[:at]
    assert cut.finish_reason == "stop"
    assert session.position == prompt + len(cut.token_ids)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert stop not in model.tokenizer.decode(session.tokens)


def test_end_of_sequence_is_in_the_cache(model: mustafar.Model) -> None:
    session = Session(model)
    processor_calls = []

    def force_end(ids: np.ndarray, logits: np.ndarray) -> None:
        processor_calls.append(len(ids))
        if len(processor_calls) == 6:
            logits[:] = -np.inf
            logits[model.config["eos_token_ids"][0]] = 0

    result = session.generate("Once", max_new_tokens=50, logits_processor=force_end)
    assert result.finish_reason == "stop"
    assert len(result.token_ids) == 6
    assert session.tokens[-1] == model.config["eos_token_ids"][0] == result.token_ids[-1]


def test_rewind_within_the_tail_is_exact(model: mustafar.Model) -> None:
    kv = KVConfig(sparsity=0.5, window=64, value_dtype="auto")
    a, b = Session(model, kv), Session(model, kv)
    a.prefill(ids_of(140))
    b.prefill(ids_of(140))
    for token in ids_of(20, seed=2):
        a.decode(token)
    a.rewind(140)
    assert a.tokens == b.tokens
    same(a, b)


@pytest.mark.parametrize("position", [1, 3, 63, 64, 65, 130, 200, 299])
def test_rewind_equals_a_session_cut_there(
    model: mustafar.Model, kv: KVConfig, position: int
) -> None:
    """As the format has it: the store is cut, and the tokens after it are prefilled in one call."""
    ids = ids_of(300)
    a, b = Session(model, kv), Session(model, kv)
    a.prefill(ids)
    a.rewind(position)
    assert a.position == position and a.tokens == ids[:position]
    b.prefill(ids)
    b.rewind(position)
    c = b.fork()
    same(a, c)
    # The cache holds what the schedule says it holds at that length.
    compressed = 64 * (max(0, position + 8 - kv.sink_tokens - kv.window) // 64)
    assert a.memory().compressed_tokens == compressed


def test_rewind_to_the_dense_part_equals_a_fresh_session(model: mustafar.Model) -> None:
    """Nothing compressed is left at that position, so there is an exact reference."""
    kv = KVConfig(sparsity=0.7, value_dtype="auto", sink_tokens=0)
    a, fresh = Session(model, kv), Session(model, kv)
    ids = ids_of(300)
    a.prefill(ids)
    a.rewind(80)
    fresh.prefill(ids[:80])
    assert np.array_equal(a.logits(), fresh.logits())
    same(a, fresh)


def test_fork_shares_the_past_and_parts_ways(model: mustafar.Model, kv: KVConfig) -> None:
    a = Session(model, kv)
    a.prefill(ids_of(200))
    b = a.fork()
    assert np.array_equal(a.logits(), b.logits())
    same(a, b, steps=70)  # across a block boundary
    a.decode(3)
    b.decode(4)
    assert a.tokens[:-1] == b.tokens[:-1] and a.tokens[-1] != b.tokens[-1]
    a.close()
    b.decode(5)  # its pages live on


def test_reset_starts_anew(model: mustafar.Model, kv: KVConfig) -> None:
    a, b = Session(model, kv), Session(model, kv)
    a.prefill(ids_of(150))
    a.reset()
    assert a.position == 0
    assert np.array_equal(a.prefill(ids_of(90, 4)), b.prefill(ids_of(90, 4)))


def test_score_is_what_decode_sees(model: mustafar.Model, kv: KVConfig) -> None:
    ids = ids_of(260)
    scores = Session(model, kv).score(ids)
    assert scores.shape == (259,) and scores.dtype == np.float32
    session = Session(model, kv)
    for i in range(259):
        logits = session.decode(ids[i]).astype(np.float64)
        top = logits.max()
        expected = logits[ids[i + 1]] - top - np.log(np.exp(logits - top).sum())
        assert abs(scores[i] - expected) < 2e-3, i


def test_logprobs_are_those_of_the_model(model: mustafar.Model) -> None:
    session = Session(model)
    result = session.generate("Once upon", max_new_tokens=12, temperature=0, logprobs=3)
    prompt = model.tokenizer.encode("Once upon")
    scores = Session(model).score(prompt + result.token_ids)[len(prompt) - 1 :]
    assert len(result.logprobs) == 12
    for entry, token, score in zip(result.logprobs, result.token_ids, scores):
        assert entry.token_id == token
        assert abs(entry.logprob - score) < 2e-3
        assert len(entry.top) == 3 and max(entry.top.values()) == entry.logprob
    assert Session(model).generate("Once", max_new_tokens=2).logprobs == []


def test_memory_adds_up_and_follows_the_context(model: mustafar.Model, kv: KVConfig) -> None:
    before = model.memory().kv_bytes
    session = Session(model, kv)
    sizes = []
    for n in (10, 200, 200):
        session.prefill(ids_of(n))
        usage = session.memory()
        parts = usage.masks + usage.values + usage.scales + usage.padding + usage.tail
        assert usage.allocated == parts + usage.policy
        assert usage.compressed_tokens + usage.dense_tokens == session.position
        sizes.append(usage.allocated)
        held = model.memory().kv_bytes - before
        assert usage.allocated <= held <= usage.allocated + (256 << 10) + 64
    assert sizes[0] < sizes[1] < sizes[2]
    session.close()
    assert model.memory().kv_bytes == before


@pytest.mark.parametrize("bad", [[-1], [2048], [10**12], [3, 4, -5]])
def test_bad_ids_are_named(model: mustafar.Model, bad: list[int]) -> None:
    session = Session(model)
    session.prefill([3, 4, 5])
    with pytest.raises(ValueError, match="token id"):
        session.prefill(bad)
    assert session.position == 3


def test_bad_arguments(model: mustafar.Model) -> None:
    session = Session(model)
    with pytest.raises(ValueError, match="at least one token"):
        session.prefill([])
    with pytest.raises(ValueError, match="nothing to continue"):
        session.generate([])
    with pytest.raises(TypeError, match="integers"):
        session.prefill([1.5, 2.0])
    with pytest.raises(TypeError, match="text"):
        session.prefill("abc")  # type: ignore[arg-type]
    with pytest.raises(mustafar.StateError, match="empty"):
        session.logits()
    with pytest.raises(TypeError, match="temprature"):
        session.generate("x", temprature=1)
    with pytest.raises(ValueError, match="temperature"):
        session.generate("x", temperature=float("nan"))
    for field in ({"sparsity": 1.0}, {"sparsity": float("nan")}, {"window": -1}):
        with pytest.raises(ValueError, match=next(iter(field))):
            Session(model, KVConfig(**field))
    with pytest.raises(ValueError, match="rewind"):
        session.rewind(1)
    with pytest.raises(ValueError, match="max_tokens"):
        Session(model, max_tokens=10**6)


def test_numpy_ids_of_any_kind(model: mustafar.Model) -> None:
    expected = Session(model).prefill(ids_of(30))
    wide = np.zeros((30, 2), np.int64)
    wide[:, 1] = ids_of(30)
    strided = wide[:, 1]
    strided.flags.writeable = False
    assert np.array_equal(Session(model).prefill(strided), expected)
    assert np.array_equal(Session(model).prefill(np.array(ids_of(30), np.uint16)), expected)


def test_context_limit_is_exact(model: mustafar.Model) -> None:
    session = Session(model, max_tokens=50)
    session.prefill(ids_of(49))
    session.decode(3)
    with pytest.raises(mustafar.ContextOverflow, match="max_tokens = 50"):
        session.decode(4)
    assert session.position == 50
    with pytest.raises(mustafar.ContextOverflow):
        Session(model, max_tokens=50).prefill(ids_of(51))
    full = Session(model, max_tokens=50)
    result = full.generate(ids_of(45), max_new_tokens=20, **GREEDY)
    assert result.finish_reason == "context" and len(result.token_ids) == 5
    assert full.position == 50


def test_closed_sessions_and_models_say_so(model: mustafar.Model, story: Path) -> None:
    session = Session(model)
    session.close()
    session.close()
    with pytest.raises(mustafar.StateError, match="closed"):
        session.decode(3)
    other = mustafar.Model(story)
    kept = Session(other)
    other.close()
    with pytest.raises(mustafar.StateError, match="closed"):
        Session(other)
    kept.prefill([3, 4, 5])  # a session keeps what it needs


def test_failing_call_leaves_the_session_as_it_was(model: mustafar.Model, kv: KVConfig) -> None:
    a, b = Session(model, kv), Session(model, kv)
    for session in (a, b):
        session.prefill(ids_of(150))

    calls = []

    def fail_late(_: np.ndarray, logits: np.ndarray) -> None:
        calls.append(1)
        if len(calls) == 70:
            raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        a.generate("and", max_new_tokens=100, logits_processor=fail_late, **GREEDY)
    assert len(calls) == 70
    assert a.tokens == b.tokens
    assert np.array_equal(a.logits(), b.logits())
    same(a, b)


def test_all_masked_logits_are_an_error(model: mustafar.Model) -> None:
    session = Session(model)

    def mask(_: np.ndarray, logits: np.ndarray) -> None:
        logits[:] = -np.inf

    with pytest.raises(mustafar.Error):
        session.generate("Once", logits_processor=mask)
    assert session.position == 0


def test_logits_processor_constrains(model: mustafar.Model) -> None:
    allowed = [10, 20, 30]

    def only(_: np.ndarray, logits: np.ndarray) -> np.ndarray:
        out = np.full_like(logits, -np.inf)
        out[allowed] = logits[allowed]
        return out

    result = Session(model).generate("Once", max_new_tokens=20, logits_processor=only)
    assert set(result.token_ids) <= set(allowed) and len(result.token_ids) == 20


def test_kv_budget_is_kept(story: Path) -> None:
    with mustafar.Model(story, kv_budget=400_000) as small:
        session = Session(small, KVConfig.preset("dense"))
        with pytest.raises(mustafar.OutOfMemory, match="kv_budget = 400000"):
            for token in ids_of(500):
                session.decode(token)
        position = session.position
        assert 0 < position < 500
        assert small.memory().kv_bytes <= 400_000
        twin = Session(mustafar.Model(story), KVConfig.preset("dense"))
        for token in session.tokens:
            twin.decode(token)
        assert np.array_equal(session.logits(), twin.logits())
        with pytest.raises(mustafar.OutOfMemory):
            session.prefill(ids_of(512 - position))
        assert session.position == position
        assert np.array_equal(session.logits(), twin.logits())
