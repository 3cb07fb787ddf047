"""Logits against Hugging Face transformers: prefill, decode, every head layout, stored types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mustafar

oracle = pytest.importorskip("support.oracle")
torch = pytest.importorskip("torch")

DENSE = mustafar.KVConfig.preset("dense")
STEPS = 64


def some_ids(vocab: int, n: int, seed: int = 0) -> list[int]:
    return [int(x) for x in np.random.default_rng(seed).integers(3, vocab, n)]


def compare(folder: Path, *, dtype: str, check: Any, prompt: int = 150) -> None:
    """Runs prefill of `prompt` tokens and 64 decode steps through both; check(ours, theirs)."""
    reference = oracle.load(folder)
    ids = some_ids(reference.config.vocab_size, prompt + STEPS)
    expected = oracle.logits(reference, ids)
    with mustafar.Model(folder, device="cpu", dtype=dtype) as model:
        session = mustafar.Session(model, DENSE)
        check(session.prefill(ids[:prompt]), expected[prompt - 1])
        for i in range(prompt, prompt + STEPS):
            check(session.decode(ids[i]), expected[i])
        session.close()


def within(limit: float) -> Any:
    def check(ours: Any, theirs: Any) -> None:
        assert np.abs(ours - theirs).max() <= limit

    return check


def test_trained_checkpoints_match(trained: Path) -> None:
    compare(trained, dtype="f32", check=within(1e-4))


def test_trained_checkpoints_continue_identically(trained: Path) -> None:
    reference = oracle.load(trained)
    with mustafar.Model(trained, device="cpu", dtype="f32") as model:
        ids = model.tokenizer.encode("Once upon a time")
        ours = mustafar.Session(model, DENSE).generate(
            ids, max_new_tokens=256, temperature=0, ignore_eos=True
        )
    assert ours.token_ids == oracle.greedy(reference, ids, 256)


LAYOUTS = {
    "mha": {"heads": 4, "kv_heads": 4},
    "gqa4": {"heads": 8, "kv_heads": 2},
    "mqa": {"heads": 4, "kv_heads": 1},
    "head_dim_8": {"head_dim": 8, "hidden": 32},
    "head_dim_64": {"head_dim": 64, "hidden": 96},
    "head_dim_80": {"head_dim": 80, "hidden": 160},
    "head_dim_128": {"head_dim": 128, "hidden": 128},
    "tied": {"tied": True},
    "rope_linear": {"rope": {"rope_type": "linear", "factor": 4.0}},
    "rope_llama3": {
        "rope": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qkv_bias": {"qkv_bias": True},
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_head_layouts_match(layout: str, tmp_path: Path) -> None:
    folder = oracle.make_model(tmp_path, **LAYOUTS[layout])
    compare(folder, dtype="f32", check=within(1e-4))


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("heads", [(4, 2, 64), (8, 8, 16), (4, 1, 128)])
def test_half_weights_match(stored: str, heads: tuple[int, int, int], tmp_path: Path) -> None:
    n_heads, kv_heads, head_dim = heads
    folder = oracle.make_model(
        tmp_path,
        heads=n_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=128,
        dtype=getattr(torch, stored),
        spread=0.04,  # attention as sharp as in trained models: rounding is not blown up
    )

    def check(ours: Any, theirs: Any) -> None:
        assert oracle.nmse(ours, theirs) <= 1e-4

    compare(folder, dtype="auto", check=check)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_weights_in_f32_match(stored: str, tmp_path: Path) -> None:
    folder = oracle.make_model(tmp_path, dtype=getattr(torch, stored))
    compare(folder, dtype="f32", check=within(1e-4))


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    """The comparison can fail: one weight changed in one place shows."""
    from safetensors.torch import load_file, save_file

    folder = oracle.make_model(tmp_path)
    reference = oracle.load(folder)
    ids = some_ids(reference.config.vocab_size, 20)
    expected = oracle.logits(reference, ids)[-1]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with mustafar.Model(folder, device="cpu", dtype="f32") as model:
        ours = mustafar.Session(model, DENSE).prefill(ids)
    assert np.abs(ours - expected).max() > 1e-4


def test_long_prompt_in_one_call_matches(tmp_path: Path) -> None:
    """More rows than pass through a layer at once, more than one tile of attention."""
    folder = oracle.make_model(tmp_path, heads=4, kv_heads=2, head_dim=32, hidden=64)
    compare(folder, dtype="f32", check=within(1e-4), prompt=1200)
