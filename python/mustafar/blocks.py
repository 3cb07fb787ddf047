"""Compressing numpy arrays to the cache's block format, natively, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import _core
from .types import Pattern, ValueType

_TAIL: dict[str, ValueType] = {"float16": "f16", "float32": "f32"}


@dataclass(frozen=True)
class CompressedBlocks:
    """An array in the block format: 64 tokens of one KV head to a slot of bytes.

    data: uint8 [..., tokens / 64, slot_bytes], byte for byte what the cache holds.
    shape: of the array that was compressed, (..., tokens, head_dim).
    layout: where masks, values and scales lie in a slot, and what a row keeps.
    sigma: float32 [head_dim], of coded rows.
    """

    data: NDArray[np.uint8]
    shape: tuple[int, ...]
    layout: _core.SlotLayout
    sigma: NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, padding included."""
        return int(self.data.nbytes)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """Which values are kept, bool of the array's shape."""
        if self.layout.dense:
            return np.ones(self.shape, dtype=bool)
        words = self.data[..., : 64 * self.layout.mask_words * 4]
        bits = np.unpackbits(
            words.reshape(-1, self.layout.mask_words * 4), axis=1, bitorder="little"
        )
        kept = np.empty((len(bits), self.shape[-1]), dtype=bool)
        kept[:, self.layout.order] = bits[:, : self.shape[-1]]
        return kept.reshape(self.shape)

    @property
    def sparsity(self) -> float:
        """Fraction of values that was pruned."""
        return 1.0 - float(self.masks.mean())

    def decompress(self) -> NDArray[np.float32]:
        """Dequantised values, zero where pruned: float32 of the array's shape."""
        return decompress(self)


def compress(
    array: NDArray[np.floating],
    *,
    sparsity: float = 0.5,
    pattern: Pattern = "group",
    value_dtype: ValueType = "auto",
    is_key: bool = True,
    weight: NDArray[np.float32] | None = None,
    mask: NDArray[np.bool_] | None = None,
    bits: float = 3.0,
    sigma: NDArray[np.floating] | None = None,
) -> CompressedBlocks:
    """Prunes and packs rows as the cache does.

    array: float32 or float16 [..., tokens, head_dim], tokens a multiple of 64; ranked and quantised
        as it is (the cache rounds keys and values to its tail type before).
    sparsity: fraction pruned of every group, in [0, 1); 0 stores every value and no masks.
    pattern: "group" (the same count in every group of dims, dealt round the row) or "row".
    value_dtype: "auto" (the array's), "f32", "f16", "bf16", "int8" or "int4"; or "coded": a fixed
        number of bits for every dim, nothing pruned (sparsity, pattern, is_key do not matter).
    is_key: keys and values have different group sizes where head_dim is a multiple of 128.
    weight: float32 [head_dim]; ranks by |x| * weight.
    mask: bool of the array's shape, instead of ranking; each block of 64 tokens may keep any values
        as long as their number fits the slot that `sparsity` sizes.
    bits: coded: of a dim on average, 1 to 7.
    sigma: coded: [head_dim] standard deviations that say which dims get them, not negative (a
        profile's k_sigma or v_sigma of a layer and KV head).

    Raises ValueError for a shape, name or range that does not fit, masks over a slot's capacity,
    and rows that are not finite with int8, int4 or coded.
    """
    rows = np.asarray(array)
    if rows.dtype.name not in _TAIL:
        raise ValueError(f"array must be float32 or float16, not {rows.dtype}")
    if rows.ndim < 2 or rows.shape[-2] % 64 or rows.size == 0:
        raise ValueError(
            "array must have shape (..., tokens, head_dim), tokens a multiple of 64, "
            f"not {rows.shape}"
        )
    if pattern not in ("group", "row"):
        raise ValueError(f'pattern must be "group" or "row", not {pattern!r}')
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must be in [0, 1), not {sparsity}")
    if value_dtype == "auto":
        value_dtype = _TAIL[rows.dtype.name]
    shape = tuple(int(n) for n in rows.shape)
    head_dim = shape[-1]
    flat = np.ascontiguousarray(rows.reshape(-1, head_dim), dtype=np.float32)
    if (sigma is not None) != (value_dtype == "coded"):
        raise ValueError(
            'value_dtype "coded" needs sigma'
            if sigma is None
            else f'sigma goes with value_dtype "coded", not with {value_dtype!r}'
        )
    if sigma is not None:
        sigma = np.ascontiguousarray(sigma, dtype=np.float32)
        if mask is not None or weight is not None:
            raise ValueError('value_dtype "coded" prunes nothing: no mask and no weight')
        if sigma.shape != (head_dim,) or not (np.isfinite(sigma) & (sigma >= 0)).all():
            raise ValueError(f"sigma must be {head_dim} finite numbers that are not negative")
        layout = _core.coded_layout(head_dim, bits)
        data = _core.pack_coded_rows(layout, flat, sigma)
        data = data.reshape(*shape[:-2], shape[-2] // 64, layout.slot_bytes)
        return CompressedBlocks(data, shape, layout, sigma)
    if mask is not None:
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != rows.shape or sparsity == 0.0 or weight is not None:
            raise ValueError("mask must have the array's shape, with sparsity > 0 and no weight")
        mask = np.ascontiguousarray(mask).reshape(-1, head_dim)
    if weight is not None:
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        if weight.shape != (head_dim,) or not (weight >= 0).all():
            raise ValueError(f"weight must be {head_dim} numbers that are not negative")
    layout = _core.SlotLayout(
        head_dim, is_key, sparsity, pattern == "group", value_dtype, mask is not None
    )
    order = layout.order  # masks of the caller's come with a layout that leaves rows as they are
    flat = np.ascontiguousarray(rows.reshape(-1, head_dim)[:, order], dtype=np.float32)
    if weight is not None:
        weight = weight[order]
    data = _core.pack_rows(layout, flat, mask, weight)
    return CompressedBlocks(
        data.reshape(*shape[:-2], shape[-2] // 64, layout.slot_bytes), shape, layout
    )


def decompress(blocks: CompressedBlocks) -> NDArray[np.float32]:
    """Dequantised values of compressed blocks, zero where pruned: float32 of the array's shape."""
    flat = np.ascontiguousarray(blocks.data.reshape(-1, blocks.layout.slot_bytes))
    if blocks.sigma is not None:
        return _core.unpack_coded_rows(blocks.layout, flat, blocks.sigma).reshape(blocks.shape)
    stored = _core.unpack_rows(blocks.layout, flat)
    rows = np.empty_like(stored)
    rows[:, blocks.layout.order] = stored
    return rows.reshape(blocks.shape)
