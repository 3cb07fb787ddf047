"""jinja2 as transformers sets it up: what the native template engine is compared with."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

import mustafar

hypothesis = pytest.importorskip("hypothesis")
oracle_module = pytest.importorskip("transformers.utils.chat_template_utils")
from hypothesis import strategies as st

NOW = datetime.datetime(2025, 3, 7, 14, 5, 9)
UNSUPPORTED = "not supported by this template engine"


class FrozenDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return NOW


@pytest.fixture(autouse=True)
def frozen_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle_module, "datetime", FrozenDatetime)


def oracle(source: str, **variables: Any) -> tuple[str, str]:
    """("ok", text) or ("error", message) from jinja2."""
    try:
        return "ok", oracle_module._compile_jinja_template(source).render(
            **{
                "messages": [],
                "tools": None,
                "documents": None,
                "add_generation_prompt": False,
                "bos_token": "",
                "eos_token": "",
                **variables,
            }
        )
    except Exception as e:  # noqa: BLE001 - whatever the oracle raises is an error there
        return "error", f"{type(e).__name__}: {e}"


def ours(source: str, **variables: Any) -> tuple[str, str]:
    messages = variables.pop("messages", [])
    try:
        return "ok", mustafar.ChatTemplate(source).render(messages, date=NOW, **variables)
    except mustafar.TemplateError as e:
        return "error", str(e)


def assert_same(source: str, **variables: Any) -> None:
    expected, actual = oracle(source, **variables), ours(source, **variables)
    if expected[0] == "error":
        assert actual[0] == "error", (source, expected, actual)
    else:
        assert actual == expected, source


def compare_many(sources: list[str], variables: dict[str, Any], allow_unsupported: bool) -> None:
    wrong = []
    for source in sources:
        expected, actual = oracle(source, **variables), ours(source, **variables)
        if actual[0] == "error" and UNSUPPORTED in actual[1] and allow_unsupported:
            continue
        if actual[0] != expected[0] or (actual[0] == "ok" and actual != expected):
            if " at 0x" in expected[1] and actual[0] == "error":
                continue  # an address: nothing to be equal to
            wrong.append((source, expected, actual))
    assert not wrong, f"{len(wrong)} of {len(sources)} differ: {wrong[:12]}"


VARIABLES: dict[str, Any] = {
    "s": "Hello, World",
    "t": "  spaced\tout \n",
    "u": "Straße ÉCOLE ǆ naïve ΑΣ",
    "n": 7,
    "f": 2.5,
    "neg": -3,
    "zero": 0,
    "yes": True,
    "no": False,
    "nothing": None,
    "words": ["b", "A", "c", "a"],
    "nums": [3, 1, 2, 10],
    "mixed": [1, "two", 3.0, None, True],
    "empty": [],
    "pair": (1, 2),
    "d": {"b": 1, "a": 2, "C": [1, 2]},
    "nested": {"x": {"y": [{"z": "deep"}]}},
    "users": [
        {"name": "bob", "age": 5, "on": True},
        {"name": "Al", "age": 3, "on": False},
        {"name": "cy", "age": 5},
    ],
    "html": "<a href='x'>\"&\"</a>",
    "big": 2**53 + 1,
    "tiny": 1e-7,
    "huge": 1e22,
    "multi": "a\nb\n\nc",
}

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=4), inner, max_size=3
        )
    ),
    max_leaves=10,
)
