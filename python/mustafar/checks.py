"""Arguments of the wrong kind, refused by name; what is as good as the right kind, converted."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import numpy as np

INT32_MAX = 2**31 - 1


def integer(name: str, value: Any, low: int = -INT32_MAX - 1, high: int = INT32_MAX) -> int:
    """An int of anything that counts, numpy's scalars too, but not of bools.

    Raises TypeError for another kind and ValueError for a number outside low to high.
    """
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    number = operator.index(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low} to {high}, not {number}")
    return number


def number(name: str, value: Any) -> float:
    """A float of any real number, numpy's scalars too, but not of bools or text."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """A bool, numpy's too."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{name} must be True or False, not {value!r}")


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A text, or several."""
    if isinstance(value, str):
        return (value,)
    try:
        several = tuple(value)
    except TypeError:
        raise TypeError(f"{name} must be a text or several, not {value!r}") from None
    for one in several:
        if not isinstance(one, str):
            raise TypeError(f"{name} must hold texts, not {one!r}")
    return several
