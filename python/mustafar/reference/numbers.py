"""Number formats: what rounding to them, and reading their bits, gives."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def f32_to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of x rounded to bfloat16, half to even. NaN stays NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16)


def bf16_to_f32(bits: NDArray[np.uint16]) -> F32:
    """Exact values of bfloat16 bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def round_to(x: NDArray[np.floating], dtype: str) -> F32:
    """x rounded to "f32", "f16" or "bf16", as float32."""
    x = np.asarray(x, dtype=np.float32)
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    return bf16_to_f32(f32_to_bf16(x)) if dtype == "bf16" else x
