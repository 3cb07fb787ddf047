"""Quantised weights: which codes and scales a matrix gets when it is loaded as int8 or int4.

A group is ``group`` neighbouring inputs of a row (0: the whole row); the last one may be shorter.
``W[r, c] = scale[r, c // group] * code[r, c] + minimum[r, c // group]``. Sums run over inputs in
order, in float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .numbers import F32

F16 = NDArray[np.float16]
# The parts of a group's range that codes are spread over, as tried.
SHRINKS = {4: (1.0, 0.97, 0.94, 0.9, 0.86), 8: (1.0,)}


def _divide(x: F32 | np.float32, y: F32) -> F32:
    """x / y, 0 where that is not finite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.divide(x, y, dtype=np.float32)
    return np.where(np.isfinite(quotient), quotient, np.float32(0)).astype(np.float32)


def _sum(x: F32) -> F32:
    """Of each row, from the first column to the last."""
    total = np.zeros(len(x), np.float32)
    for column in x.T:
        total = total + column
    return total


def _line(x: F32, bits: int) -> tuple[F16, F16]:
    """Scale and minimum of each row of x [rows, inputs of one group]."""
    top, n = np.float32(2**bits - 1), np.float32(x.shape[1])
    half = top * np.float32(0.5)
    low = x.min(axis=1)
    spread = x.max(axis=1) - low
    middle = low + spread * np.float32(0.5)
    v = x - middle[:, None]
    v_sum = _sum(v)
    best, slope, level = (np.zeros(len(x), np.float32) for _ in range(3))
    for shrink in SHRINKS[bits]:
        factor = _divide(top / np.float32(shrink), spread)
        q = np.clip(np.rint(v * factor[:, None] + half), 0, top).astype(np.float32) - half
        q_sum, qq_sum, qv_sum = _sum(q), _sum(q * q), _sum(q * v)
        covariance = n * qv_sum - q_sum * v_sum
        mean = _divide(covariance, n * qq_sum - q_sum * q_sum)
        score = covariance * mean
        better = score > best
        best = np.where(better, score, best)
        slope = np.where(better, mean, slope)
        level = np.where(better, q_sum, level)
    scale = slope.astype(np.float16)
    stored = scale.astype(np.float32)
    first = middle + (v_sum - stored * level) / n - stored * half
    return scale, first.astype(np.float16)


def quantise_matrix(weights: F32, bits: int, group: int) -> tuple[NDArray[np.uint8], F16, F16]:
    """Codes [rows, cols], scales and minimums [rows, groups] of a matrix [rows, cols]."""
    rows, cols = weights.shape
    group = group or cols
    starts = range(0, cols, group)
    codes = np.empty((rows, cols), np.uint8)
    scales = np.empty((rows, len(starts)), np.float16)
    minimums = np.empty_like(scales)
    for i, start in enumerate(starts):
        x = np.ascontiguousarray(weights[:, start : start + group], dtype=np.float32)
        scales[:, i], minimums[:, i] = _line(x, bits)
        factor = _divide(np.float32(1), scales[:, i].astype(np.float32))
        q = np.rint((x - minimums[:, i].astype(np.float32)[:, None]) * factor[:, None])
        codes[:, start : start + group] = np.clip(q, 0, 2**bits - 1)
    return codes, scales, minimums


def dequantise_matrix(codes: NDArray[np.uint8], scales: F16, minimums: F16, group: int) -> F32:
    """The matrix [rows, cols] of codes, scales and minimums: rounded once to float32."""
    cols = codes.shape[1]
    scale, minimum = (
        np.repeat(x.astype(np.float64), group or cols, axis=1)[:, :cols] for x in (scales, minimums)
    )
    return (scale * codes + minimum).astype(np.float32)
