"""The model that ships with the package: its size, its text, its answers, its KV profile."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Session
from support.paths import DEMO

STDLIB = Path(sysconfig.get_path("stdlib"))

# Sizes of head_dim 64 that correspond to K 12/32 and V 4/16 of head_dim 128.
PRUNED = KVConfig(k_sparsity=0.625, v_sparsity=0.75, value_dtype="auto")


@pytest.fixture(scope="module")
def model() -> Iterator[mustafar.Model]:
    with mustafar.Model(DEMO, device="cpu") as loaded:
        yield loaded


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_it_is_small_and_of_the_promised_shape(model: mustafar.Model) -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 12_000_000
    config = model.config
    assert config["head_dim"] == 64
    assert config["n_kv_heads"] < config["n_heads"]
    assert config["max_position_embeddings"] >= 1024
    assert model.dtype == "bf16"
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())
    assert settings["chat_template"]
    assert (DEMO / "README.md").is_file()


def test_it_is_the_default_model() -> None:
    with mustafar.Model() as default:
        assert default.folder.parts[-3:] == ("mustafar", "models", "demo")
        for file in DEMO.iterdir():
            assert (default.folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_pruning_costs_less_in_its_own_basis(model: mustafar.Model) -> None:
    """KL divergence from the dense cache, with and without the shipped profile, on other text."""
    divergence = {}
    for name, kv in (
        ("without", PRUNED),
        ("with", KVConfig(k_sparsity=0.625, v_sparsity=0.75, profile="model", value_dtype="auto")),
    ):
        total = []
        for file in ("csv.py", "sched.py", "bisect.py", "colorsys.py"):
            ids = model.tokenizer.encode((STDLIB / file).read_text())[:600]
            dense = log_softmax(Session(model, KVConfig.preset("dense")).score_logits(ids))
            pruned = log_softmax(Session(model, kv).score_logits(ids))
            total.append((np.exp(dense) * (dense - pruned)).sum(-1).mean())
        divergence[name] = float(np.mean(total))
    assert divergence["with"] <= 0.7 * divergence["without"], divergence


def test_profile_changes_nothing_at_sparsity_0(model: mustafar.Model) -> None:
    ids = model.tokenizer.encode((STDLIB / "bisect.py").read_text())[:300]
    with mustafar.Model(DEMO, device="cpu", dtype="f32") as exact:
        plain = Session(exact, KVConfig.preset("dense")).score_logits(ids)
        turned = Session(
            exact, KVConfig(sparsity=0, profile="model", value_dtype="auto")
        ).score_logits(ids)
    assert np.abs(plain - turned).max() <= 1e-3
