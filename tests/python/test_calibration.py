"""KV transforms: exact inverses, the statistics they come from, files, and what they are for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Session, _core

KINDS = ["hadamard", "klt", "balanced"]


@pytest.fixture(scope="module")
def model() -> Iterator[mustafar.Model]:
    from conftest import model_folder

    with mustafar.Model(model_folder("story"), device="cpu", dtype="f32") as loaded:
        yield loaded


def ids_of(n: int, seed: int = 1) -> list[int]:
    return [int(x) for x in np.random.default_rng(seed).integers(3, 2048, n)]


TEXT = "Once upon a time there was a little girl who liked to play with her dog in the park. "


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_power", [0.0, 0.5])
def test_forward_and_backward_are_inverse(
    model: mustafar.Model, kind: str, scale_power: float
) -> None:
    profile = mustafar.calibrate(model, [TEXT * 8], kind, scale_power=scale_power)
    eye = np.eye(profile.head_dim)
    for f, b in ((profile.k_forward, profile.k_backward), (profile.v_forward, profile.v_backward)):
        assert f.shape == (profile.n_layers, profile.n_kv_heads, *eye.shape)
        product = f.astype(np.float64) @ b.astype(np.float64)
        assert np.abs(product - eye).max() < 1e-3
    assert (profile.k_weight is not None) == (scale_power > 0 and kind != "hadamard")


def test_statistics_are_second_moments(model: mustafar.Model) -> None:
    """Against transformers: keys after RoPE, values, queries of the group, output slices."""
    torch = pytest.importorskip("torch")
    oracle = pytest.importorskip("oracle")
    reference = oracle.load(model.folder)
    ids = ids_of(90)
    with torch.no_grad():
        cache = reference(torch.tensor([ids]), use_cache=True).past_key_values
    sums = _core.kv_statistics(model._core, [ids], None)
    assert sums["tokens"] == 90
    for layer in range(model.config["n_layers"]):
        key = cache.layers[layer].keys[0].double().numpy()
        value = cache.layers[layer].values[0].double().numpy()
        for ours, x in ((sums["keys"], key), (sums["values"], value)):
            expected = np.einsum("hti,htj->hij", x, x)
            assert np.allclose(ours[layer], expected, rtol=1e-4, atol=1e-4 * expected.max())
        w = reference.model.layers[layer].self_attn.o_proj.weight.detach().double().numpy()
        w = w.reshape(w.shape[0], model.config["n_kv_heads"], -1, model.config["head_dim"])
        expected = np.einsum("ohgi,ohgj->hij", w, w)
        assert np.allclose(sums["outputs"][layer], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_at_sparsity_0_nothing_changes(model: mustafar.Model, kind: str) -> None:
    profile = mustafar.calibrate(model, [TEXT * 8], kind)
    ids = ids_of(200)
    plain = Session(model, KVConfig(sparsity=0.0)).score_logits(ids)
    turned = Session(model, KVConfig(sparsity=0.0, profile=profile)).score_logits(ids)
    assert np.abs(plain - turned).max() <= 1e-3
    plain_session = Session(model, KVConfig(sparsity=0.0))
    turned_session = Session(model, KVConfig(sparsity=0.0, profile=profile))
    for token in ids[:120]:
        assert np.abs(plain_session.decode(token) - turned_session.decode(token)).max() <= 1e-3


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence in nats of [n, vocab] logits."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_a_balanced_profile_cuts_the_error_of_pruning(story: Path) -> None:
    with mustafar.Model(story, dtype="f32") as model:
        session = Session(model, KVConfig(sparsity=0.0))
        text = session.generate("Once upon a time", max_new_tokens=400, temperature=0.9, seed=5)
        held = session.tokens
        other = Session(model, KVConfig(sparsity=0.0))
        other.generate("One day a", max_new_tokens=450, temperature=0.9, seed=6)
        assert len(text.token_ids) > 100
        profile = mustafar.calibrate(model, [other.tokens], "balanced")
        dense = Session(model, KVConfig(sparsity=0.0)).score_logits(held)
        without = Session(model, KVConfig(sparsity=0.7, window=0)).score_logits(held)
        with_it = Session(model, KVConfig(sparsity=0.7, window=0, profile=profile))
        assert divergence(dense, with_it.score_logits(held)) < divergence(dense, without)


def test_files_round_trip_and_bad_ones_are_named(model: mustafar.Model, tmp_path: Path) -> None:
    profile = mustafar.calibrate(model, [TEXT * 8], "balanced", scale_power=0.5)
    path = tmp_path / "p.safetensors"
    profile.save(path)
    again = mustafar.Profile.load(path)
    assert again.hash() == profile.hash()
    assert again.kind == "balanced" and again.model_fingerprint == model.fingerprint
    by_path = Session(model, KVConfig(profile=path))
    by_object = Session(model, KVConfig(profile=profile))
    ids = ids_of(150)
    assert np.array_equal(by_path.prefill(ids), by_object.prefill(ids))

    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(path)
    meta = {
        "format_version": "1",
        "kind": "klt",
        "model_fingerprint": "",
        "text_hash": "",
    }
    bad = tmp_path / "bad.safetensors"
    for change, what in [
        ({"k_forward": None}, "k_forward"),
        ({"v_backward": None}, "v_backward is missing"),
        ({"v_backward": tensors["v_backward"][:, :1]}, "expected F32"),
        ({"k_weight": -tensors["k_weight"]}, "k_weight"),
        ({"v_forward": tensors["v_forward"] * np.float32("nan")}, "v_forward"),
    ]:
        kept = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        safetensors.save_file(kept, bad, metadata=meta)
        with pytest.raises(mustafar.ModelError, match=what):
            mustafar.Profile.load(bad)
    safetensors.save_file(tensors, bad)
    with pytest.raises(mustafar.ModelError, match="not a KV profile"):
        mustafar.Profile.load(bad)
    safetensors.save_file(tensors, bad, metadata={**meta, "format_version": "9"})
    with pytest.raises(mustafar.ModelError, match="version 9"):
        mustafar.Profile.load(bad)


def test_a_profile_of_another_model_is_refused(model: mustafar.Model) -> None:
    from conftest import model_folder

    profile = mustafar.calibrate(model, [TEXT], "klt")
    with mustafar.Model(model_folder("stories260K")) as other:
        with pytest.raises(mustafar.ModelError, match="n_layers"):
            Session(other, KVConfig(profile=profile))


def test_bad_arguments(model: mustafar.Model) -> None:
    with pytest.raises(ValueError, match="kind"):
        mustafar.calibrate(model, [TEXT], "pca")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="balance"):
        mustafar.calibrate(model, [TEXT], balance=2)
    with pytest.raises(ValueError, match="needs text"):
        mustafar.calibrate(model, [])
    with pytest.raises(TypeError, match="list of texts"):
        mustafar.calibrate(model, "abc")
