"""Families next to Llama, against transformers: logits, greedy tokens, and what a cache can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Model, Session

torch = pytest.importorskip("torch")
oracle = pytest.importorskip("support.oracle")
families = pytest.importorskip("support.families")

DENSE = KVConfig.preset("dense")
# Compresses without a loss in f32, after a change of basis.
LOSSLESS = KVConfig(sparsity=0.0, value_dtype="auto", profile="hadamard", window=16)
STEPS = 64


def some_ids(n: int, seed: int = 0) -> list[int]:
    return [int(x) for x in np.random.default_rng(seed).integers(3, 320, n)]


def compare(
    folder: Path,
    kv: KVConfig = DENSE,
    *,
    prompt: int = 150,
    steps: int = STEPS,
    max_tokens: int | None = None,
) -> None:
    """Logits of a prompt and the steps after it within 1e-4; dense, also greedy tokens the same."""
    reference = oracle.load(folder)
    ids = some_ids(prompt + steps)
    expected = oracle.logits(reference, ids)
    assert np.abs(expected).max() > 1  # 1e-4 is little beside them
    with Model(folder, device="cpu", dtype="f32") as model:
        with Session(model, kv, max_tokens=max_tokens) as session:
            assert np.abs(session.prefill(ids[:prompt]) - expected[prompt - 1]).max() <= 1e-4
            for i in range(prompt, prompt + steps):
                assert np.abs(session.decode(ids[i]) - expected[i]).max() <= 1e-4
        if kv is not DENSE:
            return
        with Session(model, kv, max_tokens=max_tokens) as session:
            ours = session.generate(
                ids[:prompt], max_new_tokens=steps, temperature=0, ignore_eos=True
            )
    assert ours.token_ids == oracle.greedy(reference, ids[:prompt], steps)


@pytest.mark.parametrize("layout", list(families.LAYOUTS))
@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_logits_and_greedy_tokens(family: str, layout: str, tmp_path: Path) -> None:
    compare(families.save_family(tmp_path, family, layout))


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_what_is_compressed_without_loss_changes_nothing(family: str, tmp_path: Path) -> None:
    compare(families.save_family(tmp_path, family), LOSSLESS)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
ROPES: dict[str, dict[str, Any]] = {
    "yarn": YARN,
    "yarn-own-factor": YARN | {"attention_factor": 0.9, "beta_fast": 16, "truncate": False},
    "yarn-mscale": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("layout", list(families.LAYOUTS))
@pytest.mark.parametrize("rope", list(ROPES))
def test_rope_scalings(rope: str, layout: str, tmp_path: Path) -> None:
    parameters = {"rope_theta": 10000.0} | ROPES[rope]
    folder = families.save_family(tmp_path, "llama", layout, rope_parameters=parameters)
    compare(folder)


def longrope(dims: int, original: int) -> dict[str, Any]:
    """Fields of a Phi-3 whose heads have `dims` dims that turn."""
    spread = np.linspace(1, 3, dims // 2)
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [float(x) for x in spread],
        "long_factor": [float(x) for x in spread**2],
    }
    return {"original_max_position_embeddings": original, "rope_parameters": scaling}


@pytest.mark.parametrize("layout", list(families.LAYOUTS))
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_longrope_takes_the_factors_of_what_the_session_may_hold(
    layout: str, partial: float, tmp_path: Path
) -> None:
    fields = longrope(int(families.LAYOUTS[layout]["head_dim"] * partial), original=256)
    fields["rope_parameters"]["partial_rotary_factor"] = partial
    folder = families.save_family(tmp_path, "phi3", layout, **fields)
    compare(folder, prompt=100, max_tokens=256)
    compare(folder, LOSSLESS, prompt=260, max_tokens=400)  # transformers turns all by the long ones
    ids = some_ids(240)
    with Model(folder, device="cpu", dtype="f32") as model:
        short = Session(model, DENSE, max_tokens=256)
        long = Session(model, DENSE, max_tokens=257)
        assert np.abs(short.prefill(ids) - long.prefill(ids)).max() > 1e-2
        assert np.array_equal(short.fork().decode(5), short.decode(5))
        assert np.array_equal(long.fork().decode(5), long.decode(5))
        # A batch knows how long each of its sequences may become.
        made = []
        for room, session in ((16, short), (17, long)):
            session.reset()
            options = {"max_new_tokens": room, "temperature": 0, "ignore_eos": True}
            made.append(session.generate(ids, **options).token_ids)
            batch = model.generate([ids, ids[:50]], kv=DENSE, **options)
            assert batch[0].token_ids == made[-1]
        assert made[0] != made[1][:16]


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_sessions_of_every_kind(family: str, tmp_path: Path) -> None:
    """Rewinding, forking and state files, over a cache that is pruned and rounded."""
    ids = some_ids(200)
    kv = KVConfig(sparsity=0.5, value_dtype="int8", window=16)
    folder = families.save_family(tmp_path / "model", family)
    with Model(folder, device="cpu", dtype="f32") as model:
        with Session(model, kv) as session:
            session.prefill(ids[:150])
            session.save(tmp_path / "state")
            with Session.load(model, tmp_path / "state") as loaded, session.fork() as fork:
                for token in ids[150:]:
                    logits = session.decode(token)
                    assert np.array_equal(loaded.decode(token), logits)
                    assert np.array_equal(fork.decode(token), logits)
        with Session(model, DENSE) as session:
            once = session.prefill(ids[:150])
            session.decode(7)
            session.rewind(90)
            assert np.abs(session.prefill(ids[90:150]) - once).max() <= 1e-4


def coded_error(folder: Path, n_prompt: int, n: int, n_text: int) -> float:
    """What seven coded bits a dim lose, calibrated on n_text tokens twice: NMSE of decoded logits."""
    ids = some_ids(n)
    with Model(folder, device="cpu", dtype="f32") as model:
        profile = mustafar.calibrate(model, [some_ids(n_text, seed=s) for s in (1, 2)], "balanced")
        kv = KVConfig(value_dtype="coded", bits=7.0, profile=profile, window=16)
        with Session(model, DENSE) as exact, Session(model, kv) as coded:
            exact.prefill(ids[:n_prompt])
            coded.prefill(ids[:n_prompt])
            ours = np.array([coded.decode(token) for token in ids[n_prompt:]])
            theirs = np.array([exact.decode(token) for token in ids[n_prompt:]])
    return float(oracle.nmse(ours, theirs))


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_calibrated_and_coded(family: str, tmp_path: Path) -> None:
    """A profile is of this model's own keys: with seven coded bits a dim little is lost."""
    assert coded_error(families.save_family(tmp_path, family), 150, 220, 400) < 1e-3


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_scores_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = families.save_family(tmp_path, family)
    ids = some_ids(180)
    logits = torch.from_numpy(oracle.logits(oracle.load(folder), ids))
    expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    with Model(folder, device="cpu", dtype="f32") as model:
        ours = Session(model, DENSE).score(ids)
    assert np.abs(np.asarray(ours) - expected.numpy()).max() <= 1e-4


@pytest.mark.parametrize("family", ["qwen3", "phi3", "granite", "smollm3", "olmo2"])
def test_half_weights(family: str, tmp_path: Path) -> None:
    """Stored and computed in bf16, as these models are published."""
    folder = families.save_family(
        tmp_path, family, dtype=torch.bfloat16, initializer_range=0.04, tie_word_embeddings=False
    )
    ids = some_ids(160)
    expected = oracle.logits(oracle.load(folder), ids)
    with Model(folder, device="cpu") as model, Session(model, DENSE) as session:
        assert oracle.nmse(session.prefill(ids[:150]), expected[149]) <= 3e-4
        for i in range(150, 160):
            assert oracle.nmse(session.decode(ids[i]), expected[i]) <= 3e-4


SLIDES = {"use_sliding_window": True}
# Of the config, beside sliding_window; and the layers, of three, that have a window then.
WINDOWS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "mistral": ({}, [0, 1, 2]),
    "qwen2": (SLIDES | {"max_window_layers": 1}, [1, 2]),
    "qwen2-all": (SLIDES | {"max_window_layers": 0}, [0, 1, 2]),
    "qwen3": (
        SLIDES | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        [0, 2],
    ),
    "phi3": ({}, [0, 1, 2]),
    "smollm3": (SLIDES, [1]),
}


def save_windowed(folder: Path, family: str, layout: str = "gqa", window: int = 96) -> Path:
    fields = WINDOWS[family][0] | {"sliding_window": window, "max_position_embeddings": 1024}
    return families.save_family(folder, family, layout, **fields)


@pytest.mark.parametrize("window", [96, 200])
@pytest.mark.parametrize("layout", list(families.LAYOUTS))
@pytest.mark.parametrize("family", list(WINDOWS))
def test_sliding_windows(family: str, layout: str, window: int, tmp_path: Path) -> None:
    """Over several windows; without them the model would say something else."""
    folder = save_windowed(tmp_path, family, layout, window)
    prompt = 4 * window + 37
    compare(folder, prompt=prompt)
    compare(folder, prompt=window - STEPS // 2)  # which steps leave
    ids = some_ids(prompt)
    with Model(folder, device="cpu", dtype="f32") as model:
        assert model.config["max_position_embeddings"] == 1024
        assert model.config["sliding_window"] == window
        assert model.config["sliding_window_layers"] == WINDOWS[family][1]
        windowed = Session(model, DENSE).prefill(ids).copy()
    families.change_config(folder, sliding_window=None, layer_types=..., use_sliding_window=False)
    assert np.abs(oracle.logits(oracle.load(folder), ids)[-1] - windowed).max() > 1e-2


@pytest.mark.parametrize("family", list(WINDOWS))
def test_sliding_windows_over_a_store(family: str, tmp_path: Path) -> None:
    """Blocks that no layer sees any more are dropped; where a layer sees all, none are."""
    folder = save_windowed(tmp_path, family)
    compare(folder, LOSSLESS, prompt=411, steps=200)
    all_layers = len(WINDOWS[family][1]) == 3
    with Model(folder, device="cpu", dtype="f32") as model, Session(model, LOSSLESS) as session:
        session.prefill(some_ids(1000))
        assert session.memory().compressed_tokens == (192 if all_layers else 960)
        seen = 3 * 1000 - len(WINDOWS[family][1]) * (1000 - 96)
        assert session.memory().dense_equivalent == seen * 2 * 2 * 2 * 16


@pytest.mark.parametrize("layout", list(families.LAYOUTS))
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_generations_of_several_windows(family: str, layout: str, tmp_path: Path) -> None:
    compare(save_windowed(tmp_path, family, layout), prompt=60, steps=350)


@pytest.mark.parametrize("family", list(WINDOWS))
def test_windowed_sessions_of_every_kind(family: str, tmp_path: Path) -> None:
    """Rewinding near and far, forking, state files, batches and scores."""
    ids = some_ids(700)
    kv = KVConfig(sparsity=0.5, value_dtype="int8", window=16)
    folder = save_windowed(tmp_path / "model", family)
    with Model(folder, device="cpu", dtype="f32") as model:
        with Session(model, kv) as session:
            session.prefill(ids[:550])
            session.save(tmp_path / "state")
            with Session.load(model, tmp_path / "state") as loaded, session.fork() as fork:
                assert loaded.memory() == session.memory()
                for token in ids[550:]:
                    logits = session.decode(token)
                    assert np.array_equal(loaded.decode(token), logits)
                    assert np.array_equal(fork.decode(token), logits)
        with Session(model, LOSSLESS) as session:
            once = session.prefill(ids[:550]).copy()
            for token in ids[550:600]:
                session.decode(token)
            for position in (549, 500, 100):
                session.rewind(position)
                assert np.abs(session.prefill(ids[position:550]) - once).max() <= 1e-4
        options = {"max_new_tokens": 150, "temperature": 0, "ignore_eos": True}
        with Session(model, kv) as session:
            alone = session.generate(ids[:500], **options)
        batch = model.generate([ids[:500], ids[:20], ids[:500]], kv=kv, **options)
        assert batch[0].token_ids == batch[2].token_ids == alone.token_ids
        logits = torch.from_numpy(oracle.logits(oracle.load(folder), ids))
        expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[
            :, 0
        ]
        for exact in (DENSE, LOSSLESS):
            with Session(model, exact) as session:
                assert np.abs(np.asarray(session.score(ids)) - expected.numpy()).max() <= 1e-4


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_windowed_models_are_calibrated_and_coded(family: str, tmp_path: Path) -> None:
    assert coded_error(save_windowed(tmp_path, family), 600, 700, 900) < 1e-3


def test_a_windowed_model_in_half_precision(tmp_path: Path) -> None:
    fields = {"sliding_window": 96, "max_position_embeddings": 1024}
    folder = families.save_family(
        tmp_path, "mistral", dtype=torch.bfloat16, initializer_range=0.04, **fields
    )
    ids = some_ids(620)
    expected = oracle.logits(oracle.load(folder), ids)
    with Model(folder, device="cpu") as model, Session(model, DENSE) as session:
        assert oracle.nmse(session.prefill(ids[:600]), expected[599]) <= 3e-4
        for i in range(600, 620):
            assert oracle.nmse(session.decode(ids[i]), expected[i]) <= 3e-4


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("phi3", ("rms_norm_eps", "num_key_value_heads")),
        ("granite", ("attention_multiplier", "num_key_value_heads")),
        ("smollm3-bias", ("no_rope_layers", "rope_parameters", "layer_types")),
        ("olmo2", ("rms_norm_eps", "num_key_value_heads")),
    ],
)
def test_missing_fields_mean_what_they_mean_to_transformers(
    family: str, missing: tuple[str, ...], tmp_path: Path
) -> None:
    folder = families.save_family(tmp_path, family, "mha")
    families.change_config(folder, **dict.fromkeys(missing, ...))
    compare(folder)
