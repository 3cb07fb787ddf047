"""The literal types of the package say what the native code takes."""

from __future__ import annotations

from typing import get_args

import pytest

import mustafar
from mustafar import KVConfig, Session, reference, types


@pytest.fixture(scope="module")
def model() -> mustafar.Model:
    return mustafar.Model(device="cpu")


def accepted(model: mustafar.Model, **fields: object) -> bool:
    """Whether a session takes a setting; a profile is asked for where one is needed."""
    try:
        Session(model, KVConfig(**fields)).close()  # type: ignore[arg-type]
    except ValueError as error:
        return "profile" in str(error)
    return True


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("pattern", types.Pattern),
        ("value_dtype", types.ValueType),
        ("k_policy", types.KPolicy),
        ("v_policy", types.VPolicy),
    ],
)
def test_every_name_is_taken_and_no_other(model: mustafar.Model, field: str, names: object) -> None:
    for name in get_args(names):
        assert accepted(model, sparsity=0.5 if name != "coded" else 0.0, **{field: name}), name
    assert not accepted(model, **{field: "none such"})


def test_presets_and_policies_are_the_documented_ones() -> None:
    assert set(get_args(types.Preset)) == set(mustafar.kv_presets())
    assert get_args(types.KPolicy) == reference.K_POLICIES
    assert get_args(types.VPolicy) == reference.V_POLICIES
