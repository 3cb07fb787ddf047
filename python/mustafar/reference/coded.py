"""Coded rows: in a profile's basis every dim has a fixed number of bits, by the energy seen in it.

No masks: a row is its dims' codes end to end, a string of bits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .numbers import F32, bf16_to_f32, f32_to_bf16
from .slots import BLOCK_TOKENS, SLOT_ALIGNMENT

MAX_WIDTH = 7
# By width: the step in units of a dim's standard deviation, and the square error that is left of a
# Gaussian dim's energy.
CODED_STEP = np.array(
    [0, 1.72, 1.08, 0.65, 0.38, 0.2175, 0.1225, 0.068125],
    np.float32,
)
CODED_ERROR = (1, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000642, 0.000163)
_SCALE_FACTORS = np.array(
    [0.70710678, 0.84089642, 1, 1.18920712, 1.41421356, 1.68179283, 2, 2.37841423], np.float32
)
_LEAST_SCALE = np.float32(2.0**-100)


def coded_row_bytes(head_dim: int, bits: float) -> int:
    """Bytes of a coded row of `bits` a dim on average, never fewer: whole 4-byte words."""
    return -(-math.ceil(head_dim * bits / 8 - 1e-9) // 4) * 4


def deal_widths(sigma: F32, row_bytes: int) -> NDArray[np.uint8]:
    """Bits of every dim, 0 to 7, that fill a row: uint8 [head_dim].

    One at a time to the dim whose square error it lowers most; of equals, to the first. Bits that
    no dim takes stay unused.
    """
    widths = [0] * len(sigma)
    energy = [float(s) * float(s) for s in sigma]

    def gain(d: int) -> float:
        w = widths[d]
        return -1.0 if w == MAX_WIDTH else energy[d] * (CODED_ERROR[w] - CODED_ERROR[w + 1])

    gains = [gain(d) for d in range(len(sigma))]
    for _ in range(8 * row_bytes):
        best = max(range(len(sigma)), key=lambda d: (gains[d], -d))
        if gains[best] < 0:
            break
        widths[best] += 1
        gains[best] = gain(best)
    return np.array(widths, np.uint8)


def _row_sum(x: F32) -> np.float32:
    """Sum in the order that packers keep to: dims i mod 16 in order, then halves of the lanes."""
    lanes = np.zeros(16, np.float32)
    for first in range(0, x.size, 16):
        part = x[first : first + 16]
        lanes[: part.size] += part
    for half in (8, 4, 2, 1):
        lanes[:half] += lanes[half : 2 * half]
    return np.float32(lanes[0])


def _inverse(x: F32 | np.float32) -> F32:
    x = np.asarray(x, np.float32)
    return np.where(x >= _LEAST_SCALE, np.float32(1) / np.maximum(x, _LEAST_SCALE), np.float32(0))


def code_row(x: F32, sigma: F32, widths: NDArray[np.uint8]) -> tuple[NDArray[np.uint32], int]:
    """Codes [head_dim] of one row and the bits of its bf16 scale.

    The scale is the row's root mean square in units of the sigmas times the factor that leaves the
    smallest sum of fourth powers of errors. Raises ValueError where that root mean square is not
    finite.
    """
    step = CODED_STEP[widths] * sigma
    inverse_step = _inverse(step)
    half = np.float32(0.5) * (1 << widths.astype(np.int64)).astype(np.float32)
    top = ((1 << widths.astype(np.int64)) - 1).astype(np.float32)

    def codes(scale: F32) -> F32:
        code = x * inverse_step * _inverse(scale) + half
        return np.trunc(np.minimum(np.maximum(code, np.float32(0)), top))

    with np.errstate(over="ignore", invalid="ignore"):
        rms = np.sqrt(_row_sum((x * _inverse(sigma)) ** 2) / np.float32(x.size))
        best = f32_to_bf16(rms)
        if not np.isfinite(bf16_to_f32(best)):
            raise ValueError("rows that are not finite can't be stored as coded")
        least, inverse_rms = np.float32(np.inf), _inverse(rms)
        for factor in _SCALE_FACTORS:
            bits = f32_to_bf16(rms * factor)
            scale = bf16_to_f32(bits)
            level = codes(scale) - (half - np.float32(0.5))
            error = x * inverse_rms - level * step * (scale * inverse_rms)
            total = _row_sum((error * error) * (error * error))
            if total < least:
                least, best = total, bits
        return codes(bf16_to_f32(best)).astype(np.uint32), int(best.item())


def pack_coded_block(rows: F32, sigma: F32, bits: float) -> NDArray[np.uint8]:
    """Bytes of one slot of coded rows. rows: float32 [64, head_dim]; sigma: float32 [head_dim]."""
    row_bytes = coded_row_bytes(rows.shape[1], bits)
    widths = deal_widths(sigma, row_bytes)
    values = np.zeros((BLOCK_TOKENS, row_bytes * 8), np.uint8)
    scales = np.zeros(BLOCK_TOKENS, "<u2")
    for token, row in enumerate(np.asarray(rows, np.float32)):
        codes, scales[token] = code_row(row, sigma, widths)
        string = [codes[d] >> bit & 1 for d in range(len(widths)) for bit in range(widths[d])]
        values[token, : len(string)] = string
    data = np.packbits(values, axis=1, bitorder="little").tobytes() + scales.tobytes()
    out = np.zeros(-(-len(data) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT, np.uint8)
    out[: len(data)] = np.frombuffer(data, np.uint8)
    return out


def unpack_coded_block(data: NDArray[np.uint8], sigma: F32, bits: float) -> F32:
    """Dequantised rows, float32 [64, head_dim]."""
    row_bytes = coded_row_bytes(len(sigma), bits)
    widths = deal_widths(sigma, row_bytes)
    at = BLOCK_TOKENS * row_bytes
    string = np.unpackbits(data[:at].reshape(BLOCK_TOKENS, -1), axis=1, bitorder="little")
    scales = bf16_to_f32(np.ascontiguousarray(data[at : at + 2 * BLOCK_TOKENS]).view("<u2"))
    rows = np.zeros((BLOCK_TOKENS, len(sigma)), np.float32)
    first = 0
    for d, width in enumerate(widths.tolist()):
        code = string[:, first : first + width].astype(np.float32) @ (
            2.0 ** np.arange(width, dtype=np.float32)
        )
        level = code - np.float32((1 << width) * 0.5 - 0.5)
        if width:
            rows[:, d] = level * (CODED_STEP[width] * sigma[d]) * scales
        first += width
    return rows
