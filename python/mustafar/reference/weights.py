"""Quantised weights: which codes and scales a matrix gets when it is loaded as int8 or int4.

A group is ``group`` neighbouring inputs of a row (0: the whole row); the last one may be shorter.
``W[r, c] = scale[r, c // group] * (code[r, c] - middle)``, middle 128 or 8. Sums run over inputs
in order, in float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .numbers import F32

MIDDLE = {4: 8, 8: 128}
RANGE = {4: (-8, 7), 8: (-127, 127)}
# What the value largest in size is tried at (4 bits).
DIVISORS = (-8, -7, -7.25, -7.5, -7.75, -8.25, -8.5, -8.75, -9.25, 7, 7.25, -6.5, -9.75)


def _divide(x: F32 | np.float32, y: F32) -> F32:
    """x / y, 0 where that is not finite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.divide(x, y, dtype=np.float32)
    return np.where(np.isfinite(quotient), quotient, np.float32(0)).astype(np.float32)


def _round(x: F32, bits: int) -> F32:
    return np.clip(np.rint(x), *RANGE[bits]).astype(np.float32)


def _scale(x: F32, bits: int) -> F32:
    """The scale of each row of x [rows, inputs of one group]."""
    largest: F32 = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    if bits == 8:
        return np.divide(np.abs(largest), np.float32(127), dtype=np.float32)
    best = np.zeros(len(x), np.float32)
    scale = np.zeros(len(x), np.float32)
    for divisor in DIVISORS:
        factor = _divide(np.float32(divisor), largest)
        q = _round(np.multiply(x, factor[:, None], dtype=np.float32), bits)
        a = np.zeros(len(x), np.float32)
        b = np.zeros(len(x), np.float32)
        for i in range(x.shape[1]):
            a = a + x[:, i] * q[:, i]
            b = b + q[:, i] * q[:, i]
        mean = _divide(a, b)
        score = a * mean
        better = score > best
        best = np.where(better, score, best)
        scale = np.where(better, mean, scale)
    return scale


def quantise_matrix(
    weights: F32, bits: int, group: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Codes [rows, cols] and scales [rows, groups] of a matrix [rows, cols]."""
    rows, cols = weights.shape
    group = group or cols
    starts = range(0, cols, group)
    codes = np.empty((rows, cols), np.uint8)
    scales = np.empty((rows, len(starts)), np.float16)
    for i, start in enumerate(starts):
        x = np.ascontiguousarray(weights[:, start : start + group], dtype=np.float32)
        scales[:, i] = _scale(x, bits)
        factor = _divide(np.float32(1), scales[:, i].astype(np.float32))
        q = _round(x * factor[:, None], bits)
        codes[:, start : start + group] = (q + MIDDLE[bits]).astype(np.uint8)
    return codes, scales


def dequantise_matrix(
    codes: NDArray[np.uint8], scales: NDArray[np.float16], bits: int, group: int
) -> F32:
    """The matrix [rows, cols] that codes and scales stand for."""
    cols = codes.shape[1]
    scale = np.repeat(scales.astype(np.float32), group or cols, axis=1)[:, :cols]
    return scale * (codes.astype(np.float32) - np.float32(MIDDLE[bits]))
