"""Coded caches: against transformers over the stored rows, and what a session can do with one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Profile, Session, reference
from support.paths import model_folder
from support.sessions import ids_of
from support.state_file import pages_of

PROMPT, STEPS = 40, 260


@pytest.fixture(scope="module")
def profile(model: mustafar.Model) -> Profile:
    return mustafar.calibrate(model, [ids_of(500), ids_of(500, 7)], "balanced")


def stored_rows(
    session: Session, kv: KVConfig, profile: Profile, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [layers, kv_heads, tokens, head_dim] of the store, in the profile's basis."""
    pages = pages_of(session, path)
    assert profile.k_sigma is not None and profile.v_sigma is not None
    layers, heads, dim = profile.k_sigma.shape
    row_bytes = row_bytes_of(kv, profile)
    out = [np.zeros((layers, heads, len(pages) * 64, dim), np.float32) for _ in range(2)]
    for p, page in enumerate(pages):
        start = 0
        for layer, head, which in np.ndindex(layers, heads, 2):
            size = int(row_bytes[which, layer])
            slot = page[start : start + 64 * (size + 2)]
            sigma = (profile.k_sigma, profile.v_sigma)[which][layer, head]
            out[which][layer, head, p * 64 : p * 64 + 64] = reference.unpack_coded_block(
                slot, sigma, 8 * size / dim
            )
            start += len(slot)
        assert start == len(page)
    return out[0], out[1]


def row_bytes_of(kv: KVConfig, profile: Profile) -> np.ndarray:
    """Bytes of rows, int [2 (K, V), layers], by the reference."""
    assert profile.k_sigma is not None and profile.v_sigma is not None
    layers, _, dim = profile.k_sigma.shape
    if kv.budget_bytes_per_token is None and kv.max_kld is None:
        bits = (kv.k_bits or kv.bits, kv.v_bits or kv.bits)
        return np.array([[reference.coded_row_bytes(dim, b)] * layers for b in bits])
    rows, _ = reference.deal_rows(
        np.stack([profile.k_sigma, profile.v_sigma]),
        np.stack([profile.k_cost, profile.v_cost]),
        kv.budget_bytes_per_token,
        kv.max_kld,
    )
    assert len(np.unique(rows)) > 1
    return rows


def bytes_per_token(model: mustafar.Model, bits: float) -> int:
    """Of coded rows that are alike in all layers."""
    rows = 2 * model.config["n_layers"] * model.config["n_kv_heads"]
    return rows * (reference.coded_row_bytes(model.config["head_dim"], bits) + 2)


@pytest.mark.parametrize(
    "kv",
    [
        KVConfig(value_dtype="coded", bits=3.0),
        KVConfig(value_dtype="coded", bits=1.5, v_bits=4.0, window=0, sink_tokens=4),
        KVConfig(value_dtype="coded", bits=6.0, window=64),
        2.0,  # bits that a budget would pay for if layers were alike
        3.5,
    ],
    ids=["3", "1.5-4", "6", "budget-2", "budget-3.5"],
)
def test_logits_match_attention_over_the_stored_rows(
    trained: Path, kv: KVConfig | float, tmp_path: Path
) -> None:
    oracle = pytest.importorskip("support.oracle")
    torch = pytest.importorskip("torch")
    from transformers import AttentionInterface

    plain = oracle.load(trained)
    vocab = plain.config.vocab_size
    ids = ids_of(PROMPT + STEPS, 3, vocab)
    ours = []
    with mustafar.Model(trained, device="cpu", dtype="f32") as model:
        budget = isinstance(kv, float)
        profile = mustafar.calibrate(model, [ids_of(400, 9, vocab)], "balanced", budget=budget)
        if isinstance(kv, float):
            two_words = 8 * model.config["n_kv_heads"]  # more, so that layers must differ
            kv = KVConfig(
                value_dtype="coded", budget_bytes_per_token=bytes_per_token(model, kv) + two_words
            )
        session = Session(model, replace(kv, profile=profile))
        session.prefill(ids[:PROMPT])
        for token in ids[PROMPT:]:
            ours.append(session.decode(token))
        rows = stored_rows(session, kv, profile, tmp_path / "state")
    row_bytes = row_bytes_of(kv, profile)
    sinks = kv.sink_tokens
    stored = rows[0].shape[2]
    assert stored >= 128
    forward = (profile.k_forward, profile.v_forward)
    backward = (profile.k_backward, profile.v_backward)
    sigmas = (profile.k_sigma, profile.v_sigma)
    codes = [0, 0]  # equal, all

    def attention(
        module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float, **_: Any
    ) -> tuple[Any, None]:
        layer, n = module.layer_idx, query.shape[2]
        groups = query.shape[1] // key.shape[1]
        seen = []
        for which, x in enumerate((key, value)):
            out = x.clone()
            for head in range(key.shape[1]):
                back = rows[which][layer, head] @ backward[which][layer, head]
                out[0, head, sinks : sinks + stored] = torch.from_numpy(back)
                # The stored rows are codes of these, but for rounding at the edges of steps.
                own = x[0, head, sinks : sinks + 64].numpy() @ forward[which][layer, head]
                sigma = sigmas[which][layer, head]
                bits = 8 * row_bytes[which, layer] / len(sigma)
                block = reference.pack_coded_block(own, sigma, bits)
                again = reference.unpack_coded_block(block, sigma, bits)
                same = np.isclose(again, rows[which][layer, head, :64], rtol=1e-3, atol=1e-6)
                codes[0] += int(same.sum())
                codes[1] += same.size
            seen.append(out)
        is_old = torch.zeros(n, n, dtype=torch.bool)
        for i in range(PROMPT, n):
            is_old[i, sinks : sinks + reference.compressed_tokens(i, sinks, kv.window)] = True
        causal = torch.ones(n, n, dtype=torch.bool).tril()

        def expand(x: Any) -> Any:
            return x.repeat_interleave(groups, dim=1)

        scores = torch.where(
            is_old,
            query @ expand(seen[0]).transpose(-1, -2),
            query @ expand(key).transpose(-1, -2),
        )
        weights = (scores * scaling).masked_fill(~causal, float("-inf")).softmax(-1)
        old = weights * is_old
        out = old @ expand(seen[1]) + (weights - old) @ expand(value)
        return out.transpose(1, 2), None

    AttentionInterface.register("coded", attention)
    plain.set_attn_implementation("coded")
    expected = oracle.logits(plain, ids)[PROMPT:]
    difference = np.array(ours) - expected
    assert np.square(difference).sum() / np.square(expected).sum() < 1e-6
    assert codes[0] / codes[1] > 0.98


@pytest.mark.parametrize("position", [1, 64, 100, 129, 200])
def test_rewind_fork_and_state_files_go_on_alike(
    model: mustafar.Model, profile: Profile, position: int, tmp_path: Path
) -> None:
    kv = KVConfig(value_dtype="coded", bits=2.5, k_bits=3.0, profile=profile)
    session = Session(model, kv)
    session.prefill(ids_of(230))
    session.rewind(position)
    session.save(tmp_path / "s")
    loaded = Session.load(model, tmp_path / "s", profile)
    assert replace(loaded.kv, profile=None) == replace(kv, profile=None)
    fork = session.fork()
    for token in ids_of(80, seed=2):
        expected = session.decode(token)
        np.testing.assert_array_equal(loaded.decode(token), expected)
        np.testing.assert_array_equal(fork.decode(token), expected)


def test_the_profile_and_the_bits_are_the_files_own(
    model: mustafar.Model, profile: Profile, tmp_path: Path
) -> None:
    session = Session(model, KVConfig(value_dtype="coded", profile=profile))
    session.prefill(ids_of(200))
    session.save(tmp_path / "s")
    with pytest.raises(mustafar.StateError, match="pass that profile"):
        Session.load(model, tmp_path / "s")
    other = mustafar.calibrate(model, [ids_of(300, 11)], "balanced")
    with pytest.raises(mustafar.StateError, match="with hash"):
        Session.load(model, tmp_path / "s", other)
    assert Session.load(model, tmp_path / "s", profile).kv.bits == 3.0


def test_bytes_are_what_bits_say(model: mustafar.Model, profile: Profile) -> None:
    dim = model.config["head_dim"]
    used = {}
    for bits in (2.0, 4.0):
        session = Session(
            model, KVConfig(value_dtype="coded", bits=bits, sink_tokens=0, profile=profile)
        )
        session.prefill(ids_of(64 * 4 + 32))
        memory = session.memory()
        rows = 256 * 2 * model.config["n_layers"] * model.config["n_kv_heads"]
        assert memory.values == rows * reference.coded_row_bytes(dim, bits)
        assert memory.scales == rows * 2
        assert memory.masks == 0 and memory.k_sparsity == 0
        used[bits] = memory.values
    assert used[4.0] == 2 * used[2.0]


def test_more_bits_are_nearer_to_dense(model: mustafar.Model, profile: Profile) -> None:
    ids = ids_of(300, 4)

    def logits(kv: KVConfig) -> np.ndarray:
        session = Session(model, kv)
        session.prefill(ids[:-20])
        return np.stack([session.decode(token) for token in ids[-20:]])

    dense = logits(KVConfig.preset("dense"))
    errors = [
        float(
            np.square(logits(KVConfig(value_dtype="coded", bits=b, profile=profile)) - dense).sum()
        )
        for b in (1.0, 2.0, 4.0, 6.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.05 * errors[0]


def test_errors_name_the_field(model: mustafar.Model, profile: Profile) -> None:
    with pytest.raises(ValueError, match="profile: .*k_sigma.*none was given.*calibrate"):
        Session(model, KVConfig(value_dtype="coded"))
    with pytest.raises(ValueError, match="profile: .*kind hadamard has none"):
        Session(model, KVConfig(value_dtype="coded", profile="hadamard"))
    coded = KVConfig(value_dtype="coded", profile=profile)
    for field, value, message in [
        ("bits", 0.5, "bits must be between 1 and 7"),
        ("bits", 7.5, "bits must be between"),
        ("k_bits", float("nan"), "k_bits must be"),
        ("v_bits", 9.0, "v_bits must be"),
        ("sparsity", 0.7, "sparsity must be 0"),
        ("k_sparsity", 0.5, "sparsity must be 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Session(model, replace(coded, **{field: value}))
    with pytest.raises(ValueError, match='v_bits applies to value_dtype "coded" alone'):
        Session(model, KVConfig(v_bits=3.0))


def test_bits_go_where_errors_count_in_scaled_profiles() -> None:
    """Dims scaled for integers (scale_power) count as before: the weights undo the scaling."""
    with mustafar.Model(model_folder("story"), device="cpu", dtype="f32") as exact:
        scaled = mustafar.calibrate(exact, [ids_of(500), ids_of(500, 7)], scale_power=1.0)
        forgetful = Profile(
            scaled.k_forward, scaled.k_backward, scaled.v_forward, scaled.v_backward, None, None,
            "balanced", exact.fingerprint, "x", scaled.k_sigma, scaled.v_sigma,
        )  # fmt: skip

        def cost(profile: Profile) -> float:
            total = 0.0
            for seed in range(4, 8):
                ids = ids_of(400, seed)
                dense = Session(exact, KVConfig(value_dtype="f32", sparsity=0.0))
                coded = Session(exact, KVConfig(value_dtype="coded", profile=profile))
                errors = coded.score_logits(ids) - dense.score_logits(ids)
                total += float(np.square(errors).mean())
            return total

        ours, without = cost(scaled), cost(forgetful)
        assert ours < 0.9 * without, (ours, without)
