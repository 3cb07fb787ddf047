"""KV transforms: exact inverses, the statistics they come from, files, and what they are for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Session, _core
from support.calibration_reference import Transform, transforms
from support.sessions import ids_of

OFFSETS = [0, 1024, 1536, 2048, 3072, 4096]  # of texts, in a context of 5,000 tokens
KINDS = ["hadamard", "klt", "balanced"]


@pytest.fixture(scope="module")
def model() -> Iterator[mustafar.Model]:
    from support.paths import model_folder

    with mustafar.Model(model_folder("story"), device="cpu", dtype="f32") as loaded:
        yield loaded


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
    for sigma in (profile.k_sigma, profile.v_sigma):
        assert (sigma is None) == (kind == "hadamard")
        if sigma is not None:
            assert sigma.shape == profile.k_forward.shape[:3]
            assert (sigma > 0).all() and (np.diff(sigma) <= 1e-6 * sigma[..., :1]).all()


def test_statistics_are_second_moments(model: mustafar.Model) -> None:
    """Against transformers: keys after RoPE, values, queries of the group, output slices."""
    torch = pytest.importorskip("torch")
    oracle = pytest.importorskip("support.oracle")
    reference = oracle.load(model.folder)
    ids = ids_of(90)
    with torch.no_grad():
        cache = reference(torch.tensor([ids]), use_cache=True).past_key_values
    skip = 4
    sums = _core.kv_statistics(model._core, [ids], skip)
    assert sums["tokens"] == 90 - skip
    for layer in range(model.config["n_layers"]):
        key = cache.layers[layer].keys[0, :, skip:].double().numpy()
        value = cache.layers[layer].values[0, :, skip:].double().numpy()
        for ours, x in ((sums["keys"], key), (sums["values"], value)):
            expected = np.einsum("hti,htj->hij", x, x)
            assert np.allclose(ours[layer], expected, rtol=1e-4, atol=1e-4 * expected.max())
        w = reference.model.layers[layer].self_attn.o_proj.weight.detach().double().numpy()
        w = w.reshape(w.shape[0], model.config["n_kv_heads"], -1, model.config["head_dim"])
        expected = np.einsum("ohgi,ohgj->hij", w, w)
        assert np.allclose(sums["outputs"][layer], expected, rtol=1e-4, atol=1e-6)


def test_sequences_add_up_and_short_ones_are_left_out(model: mustafar.Model) -> None:
    ids = ids_of(40)
    one = _core.kv_statistics(model._core, [ids], 4)
    both = _core.kv_statistics(model._core, [ids, ids_of(4), [], ids], 4)
    assert one["tokens"] == 36 and both["tokens"] == 72
    for name in ("keys", "values", "queries"):
        assert np.allclose(both[name], 2 * one[name], rtol=1e-12)
    assert np.array_equal(both["outputs"], one["outputs"])


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale_power", [0.0, 0.75])
def test_transforms_equal_those_of_numpy(
    model: mustafar.Model, balance: float, scale_power: float
) -> None:
    """Up to the signs of columns, and any basis of dims whose energies are the same."""
    ids = model.tokenizer.encode(TEXT * 20)
    profile = mustafar.calibrate(model, [ids], balance=balance, scale_power=scale_power)
    sums = _core.kv_statistics(model._core, [ids], 4)
    for name, moments, metrics in (("k", "keys", "queries"), ("v", "values", "outputs")):
        moment = sums[moments] / sums["tokens"]
        expected = transforms(moment, sums[metrics], balance, scale_power)
        weight = getattr(profile, f"{name}_weight")
        ours = Transform(
            *(getattr(profile, f"{name}_{part}").astype(float) for part in ("forward", "backward")),
            np.ones_like(expected.weight) if weight is None else weight.astype(float),
            getattr(profile, f"{name}_sigma").astype(float),
            expected.metric,
        )
        check_transforms(ours, expected, moment)


def test_keys_have_the_most_energy_of_any_position(model: mustafar.Model) -> None:
    """The basis is that of where the texts stand; sigmas and the order of dims are not."""
    ids = model.tokenizer.encode(TEXT * 20)
    sums = _core.kv_statistics(model._core, [ids], 4)
    moment, dim = sums["keys"] / sums["tokens"], sums["keys"].shape[-1]
    angles = np.outer(OFFSETS, 10000.0 ** (-np.arange(0, dim, 2) / dim))
    turns = np.zeros((len(OFFSETS), dim, dim))
    i, half = np.arange(dim // 2), dim // 2
    turns[:, i, i] = turns[:, i + half, i + half] = np.cos(angles)
    turns[:, i, i + half], turns[:, i + half, i] = np.sin(angles), -np.sin(angles)

    wide = mustafar.calibrate(model, [ids], context=5000)
    here = mustafar.calibrate(model, [ids], context=1)
    turned = np.einsum("oia,lhij,ojb->olhab", turns, moment, turns)
    energy = np.einsum("lhab,olhac,lhcb->olhb", wide.k_forward, turned, wide.k_forward)
    assert np.allclose(wide.k_sigma, np.sqrt(energy.max(0)), rtol=1e-3)
    assert (energy.max(0) > 1.05 * energy[0]).any()
    assert (np.diff(wide.k_sigma) <= 1e-6 * wide.k_sigma[..., :1]).all()
    for at in np.ndindex(*wide.k_sigma.shape[:2]):
        for ours, theirs in (
            (wide.k_forward[at].T, here.k_forward[at].T),
            (wide.k_backward[at], here.k_backward[at]),
        ):
            assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))
    assert np.array_equal(wide.v_forward, here.v_forward)
    assert np.array_equal(wide.v_sigma, here.v_sigma)
    # The model's own context, 512 tokens, ends before a text could begin elsewhere.
    assert mustafar.calibrate(model, [ids]).hash() == here.hash()


def check_transforms(ours: Transform, expected: Transform, moment: np.ndarray) -> None:
    def swapped(x: np.ndarray) -> np.ndarray:
        return np.swapaxes(x, -1, -2)

    assert np.abs(ours.forward @ ours.backward - np.eye(moment.shape[-1])).max() < 1e-3
    # Energies, and the transformed second moments: diagonal, falling, the same as numpy's.
    unscaled, top = ours.sigma * ours.weight, expected.sigma * expected.weight
    assert np.abs(unscaled - top).max() < 1e-5 * top.max()
    seen = swapped(ours.forward) @ moment @ ours.forward
    scale = ours.sigma[..., :, None] * ours.sigma[..., None, :]
    strong = unscaled > 1e-3 * unscaled[..., :1]  # float32 matrices hide what is weaker
    both = strong[..., :, None] & strong[..., None, :]
    off = np.abs(seen / scale - np.eye(moment.shape[-1]))[both]
    assert off.max() < 1e-2
    assert (np.diff(unscaled) <= 1e-6 * unscaled[..., :1]).all()
    assert np.allclose(ours.weight, expected.weight, rtol=1e-3)
    # Rows of B are orthonormal in the metric's inverse, and columns of F in it: B M^a B^T = 1.
    rows = ours.backward / ours.weight[..., :, None]
    gram = rows @ expected.metric @ swapped(rows)
    assert np.abs(gram - np.eye(moment.shape[-1])).max() < 1e-3
    # What the leading half of the dims keeps does not depend on signs.
    half = moment.shape[-1] // 2
    gap = unscaled[..., half - 1] - unscaled[..., half] > 1e-2 * unscaled[..., half - 1]
    assert gap.any()
    kept = [t.forward[..., :half] @ t.backward[..., :half, :] for t in (ours, expected)]
    assert np.abs(kept[0] - kept[1])[gap].max() < 1e-2


def eigen_cases() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)

    def gram(n: int, rank: int) -> np.ndarray:
        x = random.standard_normal((rank, n))
        return x.T @ x

    q, _ = np.linalg.qr(random.standard_normal((24, 24)))
    cases = {f"random {n}": random.standard_normal((n, n)) for n in (1, 2, 3, 16, 64, 128)}
    cases = {name: x + x.T for name, x in cases.items()}
    return {
        **cases,
        "gram 80": gram(80, 200),
        "rank 3 of 32": gram(32, 3),
        "zero": np.zeros((8, 8)),
        "identity": np.eye(9),
        "diagonal with equals": np.diag([3.0, 1, 3, -2, 0, 0, 1]),
        "two values": (q * np.repeat([2.0, -1.0], 12)) @ q.T,
        "graded": (q * np.logspace(0, -20, 24)) @ q.T,
        "tridiagonal": np.eye(30) * 2 - np.eye(30, k=1) - np.eye(30, k=-1),
        "off-diagonal alone": np.array([[0.0, 1], [1, 0]]),
        "huge": gram(12, 20) * 1e300,
        "tiny": gram(12, 20) * 1e-300,
        "all one": np.ones((40, 40)),
    }


@pytest.mark.parametrize("name", list(eigen_cases()))
def test_eigenvalues_equal_those_of_numpy(name: str) -> None:
    matrix = eigen_cases()[name]
    matrix = (matrix + matrix.T) / 2
    values, vectors = _core.symmetric_eigen(matrix)
    size = np.abs(matrix).max() or 1.0
    assert (np.diff(values) <= 0).all()
    assert np.abs(values - np.linalg.eigvalsh(matrix)[::-1]).max() <= 1e-10 * size
    assert np.abs(vectors @ vectors.T - np.eye(len(matrix))).max() <= 1e-10
    assert np.abs(vectors @ (matrix / size) - (values / size)[:, None] * vectors).max() <= 1e-10


def test_eigenvalues_of_what_is_not_finite_are_refused() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(mustafar.Error, match="not finite"):
            _core.symmetric_eigen([[1.0, bad], [bad, 1.0]])


@pytest.mark.parametrize("kind", KINDS)
def test_at_sparsity_0_nothing_changes(model: mustafar.Model, kind: str) -> None:
    profile = mustafar.calibrate(model, [TEXT * 8], kind)
    ids = ids_of(200)
    plain = Session(model, KVConfig.preset("dense")).score_logits(ids)
    turned = Session(model, KVConfig(profile=profile, value_dtype="auto")).score_logits(ids)
    assert np.abs(plain - turned).max() <= 1e-3
    plain_session = Session(model, KVConfig.preset("dense"))
    turned_session = Session(model, KVConfig(profile=profile, value_dtype="auto"))
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
        session = Session(model, KVConfig.preset("dense"))
        text = session.generate("Once upon a time", max_new_tokens=400, temperature=0.9, seed=5)
        held = session.tokens
        other = Session(model, KVConfig.preset("dense"))
        other.generate("One day a", max_new_tokens=450, temperature=0.9, seed=6)
        assert len(text.token_ids) > 100
        profile = mustafar.calibrate(model, [other.tokens], "balanced")
        dense = Session(model, KVConfig.preset("dense")).score_logits(held)
        without = Session(model, KVConfig(sparsity=0.7, window=0, value_dtype="auto")).score_logits(
            held
        )
        with_it = Session(
            model, KVConfig(sparsity=0.7, window=0, profile=profile, value_dtype="auto")
        )
        assert divergence(dense, with_it.score_logits(held)) < divergence(dense, without)


def test_files_round_trip_and_bad_ones_are_named(model: mustafar.Model, tmp_path: Path) -> None:
    profile = mustafar.calibrate(model, [TEXT * 8], "balanced", scale_power=0.5)
    path = tmp_path / "p.safetensors"
    profile.save(path)
    again = mustafar.Profile.load(path)
    assert again.hash() == profile.hash()
    assert again.kind == "balanced" and again.model_fingerprint == model.fingerprint
    assert np.array_equal(again.k_sigma, profile.k_sigma)
    assert np.array_equal(again.v_sigma, profile.v_sigma)
    by_path = Session(model, KVConfig(profile=path))
    by_object = Session(model, KVConfig(profile=profile))
    ids = ids_of(150)
    assert np.array_equal(by_path.prefill(ids), by_object.prefill(ids))

    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(path)
    meta = {
        "format_version": "2",
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
        ({"v_sigma": 0 * tensors["v_sigma"]}, "v_sigma"),
        ({"k_sigma": tensors["k_sigma"][..., :1]}, "k_sigma is F32"),
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
    safetensors.save_file(tensors, bad, metadata={**meta, "format_version": "1"})
    with pytest.raises(mustafar.ModelError, match="version 1, .* calibrate again"):
        mustafar.Profile.load(bad)
    without = {k: v for k, v in tensors.items() if not k.endswith("sigma")}
    safetensors.save_file(without, bad, metadata=meta)
    bare = mustafar.Profile.load(bad)
    assert bare.k_sigma is None and bare.hash() != profile.hash()


def test_a_profile_of_another_model_is_refused(model: mustafar.Model) -> None:
    from support.paths import model_folder

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
    with pytest.raises(ValueError, match="needs text"):
        mustafar.calibrate(model, [ids_of(5)])
    with pytest.raises(ValueError, match="skip_tokens"):
        mustafar.calibrate(model, [TEXT], skip_tokens=-1)
    with pytest.raises(ValueError, match="scale_power"):
        mustafar.calibrate(model, [TEXT], scale_power=float("nan"))
    with pytest.raises(ValueError, match="vocabulary"):
        mustafar.calibrate(model, [[1, 2, 3, 1 << 30] * 3])
    with pytest.raises(TypeError, match="list of texts"):
        mustafar.calibrate(model, "abc")


def test_progress_sees_all_tokens_and_may_stop_the_work(model: mustafar.Model) -> None:
    seen: list[tuple[int, int]] = []
    mustafar.calibrate(model, [ids_of(50), ids_of(30)], progress=lambda *x: seen.append(x))
    assert seen[-1] == (80, 80) and seen == sorted(seen)

    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        mustafar.calibrate(model, [ids_of(50)], progress=stop)


def test_texts_are_cut_to_context_and_count(model: mustafar.Model) -> None:
    """Pieces of the model's context; max_tokens cuts the last one."""
    context = model.config["max_position_embeddings"]
    ids = ids_of(context + 60)
    whole = mustafar.calibrate(model, [ids], "klt", max_tokens=None)
    parts = mustafar.calibrate(model, [ids[:context], ids[context:]], "klt", max_tokens=None)
    assert whole.hash() == parts.hash() and whole.text_hash == parts.text_hash
    cut = mustafar.calibrate(model, [ids], "klt", max_tokens=100)
    assert cut.text_hash == mustafar.calibrate(model, [ids[:100]], "klt").text_hash
    assert cut.hash() != whole.hash()
