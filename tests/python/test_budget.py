"""Budgets of bytes over layers: how they are dealt, calibrated, kept and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Profile, Session, _core, reference
from support.command import needs_command, run
from support.sessions import ids_of


@pytest.fixture(scope="module")
def profile(model: mustafar.Model) -> Profile:
    return mustafar.calibrate(model, [ids_of(500), ids_of(300, 7)], scale_power=0.5, budget=True)


def random_profile(layers: int, heads: int, dim: int, seed: int) -> Profile:
    random = np.random.default_rng(seed)
    eye = np.broadcast_to(np.eye(dim, dtype=np.float32), (layers, heads, dim, dim))

    def positive(*shape: int) -> np.ndarray:
        return np.exp(random.normal(size=shape) * 1.5).astype(np.float32)

    return Profile(
        eye, eye, eye, eye, positive(layers, heads, dim), positive(layers, heads, dim),
        "balanced", "", "x", positive(layers, heads, dim), positive(layers, heads, dim),
        positive(layers), positive(layers),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 1, 32), (2, 2, 24)])
def test_dealing_is_the_references(shape: tuple[int, int, int]) -> None:
    layers, heads, dim = shape
    for seed in range(2):
        p = random_profile(*shape, seed)
        sigma = np.stack([p.k_sigma * p.k_weight, p.v_sigma * p.v_weight])
        cost = np.stack([p.k_cost, p.v_cost])
        least = 2 * layers * heads * 6
        most = 2 * layers * heads * (reference.coded_row_bytes(dim, 7) + 2)
        klds = []
        for budget in (least, least + 4 * heads - 1, (least + most) // 2, most, 2 * most):
            rows, kld = reference.deal_rows(sigma, cost, budget_bytes_per_token=budget)
            k, v, predicted = _core.deal_rows(p, budget, None)
            np.testing.assert_array_equal([k, v], rows)
            assert predicted == kld
            used = heads * int((rows + 2).sum())
            assert used <= budget < used + 4 * heads or used == most
            klds.append(kld)
        assert klds == sorted(klds, reverse=True)
        for kld in klds:
            rows, reached = reference.deal_rows(sigma, cost, max_kld=kld)
            k, v, predicted = _core.deal_rows(p, None, kld)
            np.testing.assert_array_equal([k, v], rows)
            assert predicted == reached <= kld
        with pytest.raises(ValueError, match="budget_bytes_per_token is .* the smallest rows take"):
            _core.deal_rows(p, least - 1, None)
        with pytest.raises(ValueError, match="max_kld is .* the largest rows predict"):
            _core.deal_rows(p, None, klds[-1] / 2)


def test_costs_are_part_of_a_profile(
    model: mustafar.Model, profile: Profile, tmp_path: Path
) -> None:
    assert profile.k_cost is not None and profile.v_cost is not None
    assert profile.k_cost.shape == (model.config["n_layers"],)
    assert (profile.k_cost > 0).all() and (profile.v_cost > 0).all()
    profile.save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    np.testing.assert_array_equal(loaded.k_cost, profile.k_cost)
    np.testing.assert_array_equal(loaded.v_cost, profile.v_cost)
    assert loaded.hash() == profile.hash()
    plain = mustafar.calibrate(model, [ids_of(500), ids_of(300, 7)], scale_power=0.5)
    assert plain.k_cost is None and plain.hash() != profile.hash()
    np.testing.assert_array_equal(plain.k_forward, profile.k_forward)


def test_progress_counts_every_scoring(model: mustafar.Model) -> None:
    seen = []
    mustafar.calibrate(
        model, [ids_of(250)], budget=True, progress=lambda done, total: seen.append((done, total))
    )
    total = 250 + 249 * (2 * model.config["n_layers"] + 2)
    assert all(all_ == total for _, all_ in seen) and seen[-1][0] == total
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_sessions_keep_the_budget(model: mustafar.Model, profile: Profile, tmp_path: Path) -> None:
    rows = 2 * model.config["n_layers"] * model.config["n_kv_heads"]
    budget = rows * (reference.coded_row_bytes(model.config["head_dim"], 2.5) + 2)
    kv = KVConfig(value_dtype="coded", budget_bytes_per_token=budget, profile=profile)
    session = Session(model, kv)
    session.prefill(ids_of(4 + 32 + 192))
    memory = session.memory()
    used = (memory.values + memory.scales) / memory.compressed_tokens
    assert budget - 4 * model.config["n_kv_heads"] < used <= budget
    session.save(tmp_path / "s")
    loaded = Session.load(model, tmp_path / "s", profile)
    assert replace(loaded.kv, profile=None) == replace(kv, profile=None)
    np.testing.assert_array_equal(loaded.decode(5), session.decode(5))
    assert _core.deal_rows(profile, budget, None)[2] < 10
    by_kld = KVConfig(
        value_dtype="coded", max_kld=_core.deal_rows(profile, budget, None)[2], profile=profile
    )
    other = Session(model, by_kld)
    other.prefill(ids_of(4 + 32 + 192))
    assert other.memory().values == memory.values


def test_errors_name_the_field(model: mustafar.Model, profile: Profile) -> None:
    coded = KVConfig(value_dtype="coded", profile=profile)
    plain = mustafar.calibrate(model, [ids_of(300)])
    for changes, message in [
        ({"budget_bytes_per_token": 9000, "k_bits": 2.0}, "takes the place of k_bits"),
        ({"budget_bytes_per_token": 9000, "bits": 2.0}, "takes the place of bits"),
        ({"budget_bytes_per_token": 1}, "budget_bytes_per_token is 1, but the smallest rows"),
        ({"budget_bytes_per_token": -5}, "budget_bytes_per_token must be more than 0"),
        ({"max_kld": float("nan")}, "max_kld must be more than 0"),
        ({"max_kld": 1e-300}, "max_kld is 1e-300, but the largest rows predict"),
        ({"max_kld": 0.1, "budget_bytes_per_token": 9000}, "give one of them"),
        ({"max_kld": 0.1, "value_dtype": "int8"}, 'max_kld applies to value_dtype "coded" alone'),
        ({"max_kld": 0.1, "profile": plain}, "max_kld needs a profile with .*calibrate --budget"),
        ({"max_kld": 0.1, "profile": None}, "max_kld needs a profile with .*none was given"),
    ]:
        with pytest.raises(ValueError, match=message):
            Session(model, replace(coded, **changes))
    with pytest.raises(ValueError, match="at least 200 tokens"):
        mustafar.calibrate(model, [ids_of(150)], budget=True)
    with pytest.raises(ValueError, match="budget needs kind"):
        mustafar.calibrate(model, [], "hadamard", budget=True)


@needs_command
def test_the_command_takes_budgets(model: mustafar.Model, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a small dog who ran to the park. " * 60)
    made = run("calibrate", "-m", model.folder, "-f", text, "-o", tmp_path / "p", "--budget")
    assert made.returncode == 0, made.stderr
    rows = 2 * model.config["n_layers"] * model.config["n_kv_heads"]
    budget = rows * (reference.coded_row_bytes(model.config["head_dim"], 3) + 2)
    scored = run(
        *("perplexity", "-m", model.folder, "-f", text, "-c", 300, "--chunks", 1, "--json"),
        *("--kv-dtype", "coded", "--kv-bytes-per-token", budget, "--profile", tmp_path / "p"),
    )
    assert scored.returncode == 0, scored.stderr
    (row,) = json.loads(scored.stdout)["results"]
    assert row["config"]["budget_bytes_per_token"] == budget
    assert "k_bits" not in row["config"]
    assert budget - 4 * model.config["n_kv_heads"] < row["bytes_per_token"] <= budget
    assert row["predicted_kld"] > 0 and row["kld_mean"] > 0
    refused = run(
        *("perplexity", "-m", model.folder, "-f", text, "--kv-dtype", "coded"),
        *("--max-kld", 0.01, "--bits", 2),
    )
    assert refused.returncode != 0
    assert "--max-kld takes the place of bits" in refused.stderr
