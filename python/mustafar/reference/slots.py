"""One block of one KV head, K or V: which values a row keeps, and the layout of a slot's bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .numbers import F32, bf16_to_f32, f32_to_bf16

BLOCK_TOKENS = 64
SLOT_ALIGNMENT = 128  # bytes
VALUE_DTYPES = ("f32", "f16", "bf16", "int8", "int4")
_VALUE_BITS = {"f32": 32, "f16": 16, "bf16": 16, "int8": 8, "int4": 4}
_LARGEST_CODE = {"int8": 127, "int4": 7}
# Ragged: where each of the 64 runs of values begins and where the last ends, uint16, in whole
# 4-byte words.
_RAGGED_OFFSETS_BYTES = -(-2 * (BLOCK_TOKENS + 1) // 4) * 4


# Which values are kept ---------------------------------------------------------------------------


def group_size(head_dim: int, is_key: bool, pattern: str) -> int:
    """Dims that are ranked together: the whole row where 16 does not divide it."""
    if pattern == "row" or head_dim % 16:
        return head_dim
    return 32 if is_key and head_dim % 128 == 0 else 16


def stored_order(head_dim: int, n_groups: int) -> NDArray[np.intp]:
    """Which dim of a row stands at each stored index: its dims are dealt to the groups in turn.

    After RoPE strong key dims are neighbours: groups of neighbours would have to drop some.
    """
    return np.arange(head_dim).reshape(head_dim // n_groups, n_groups).T.reshape(head_dim)


def keep_count(group: int, sparsity: float, value_dtype: str, whole_words: bool) -> int:
    """Values kept of a group: never fewer than asked; in pattern group whole 4-byte words."""
    keep = max(1, math.ceil(group * (1.0 - sparsity) - 1e-9))
    unit = max(1, 32 // _VALUE_BITS[value_dtype]) if whole_words else 1
    return min(group, -(-keep // unit) * unit)


def top_mask(x: F32, group: int, keep: int, weight: F32 | None = None) -> NDArray[np.bool_]:
    """Mask of the `keep` largest |x| (or |x| * weight) in every group of the last axis.

    Ties keep the lower index; NaN ranks above infinity.
    """
    magnitude = np.abs(np.asarray(x, dtype=np.float32))
    is_nan = np.isnan(magnitude)
    if weight is not None:
        with np.errstate(invalid="ignore", over="ignore"):
            magnitude = magnitude * np.asarray(weight, dtype=np.float32)
        magnitude = np.where(np.isnan(magnitude), np.float32(0), magnitude)  # inf * 0
    groups = np.where(is_nan, np.float32(0), magnitude).reshape(*magnitude.shape[:-1], -1, group)
    index = np.broadcast_to(np.arange(group), groups.shape)
    order = np.lexsort((index, -groups, ~is_nan.reshape(groups.shape)), axis=-1)
    mask = np.zeros(groups.shape, dtype=bool)
    np.put_along_axis(mask, order[..., :keep], True, axis=-1)
    return mask.reshape(magnitude.shape)


# The layout of a slot -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """Byte layout of 64 tokens of one KV head, K or V."""

    head_dim: int
    value_dtype: str
    sparsity: float
    pattern: str = "group"
    is_key: bool = True
    ragged: bool = False  # counts fixed per block, not per row: masks of the caller's

    @property
    def dense(self) -> bool:
        return self.sparsity == 0

    @property
    def group(self) -> int:
        return group_size(self.head_dim, self.is_key, self.pattern)

    @property
    def keep(self) -> int:
        """Values kept of each group; ragged: mean tokens of 64 kept of a channel."""
        if self.dense:
            return self.group
        if self.ragged:
            return keep_count(BLOCK_TOKENS, self.sparsity, self.value_dtype, False)
        whole_words = self.pattern == "group" and self.head_dim % 16 == 0
        return keep_count(self.group, self.sparsity, self.value_dtype, whole_words)

    @property
    def row_keep(self) -> int:
        """Values of a row (ragged: the mean that the slot has room for)."""
        if self.dense:
            return self.head_dim
        if self.ragged:
            return -(-self.head_dim * self.keep // BLOCK_TOKENS)
        return self.head_dim // self.group * self.keep

    @property
    def mask_words(self) -> int:
        return 0 if self.dense else -(-self.head_dim // 32)

    @property
    def row_bytes(self) -> int:
        return -(-self.row_keep * _VALUE_BITS[self.value_dtype] // 32) * 4

    @property
    def values_offset(self) -> int:
        offsets = _RAGGED_OFFSETS_BYTES if self.ragged and not self.dense else 0
        return BLOCK_TOKENS * self.mask_words * 4 + offsets

    @property
    def scales_offset(self) -> int:
        return self.values_offset + BLOCK_TOKENS * self.row_bytes

    @property
    def slot_bytes(self) -> int:
        scales = 2 * BLOCK_TOKENS if self.value_dtype in _LARGEST_CODE else 0
        return -(-(self.scales_offset + scales) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    @property
    def order(self) -> NDArray[np.intp]:
        """The dim at each stored index [head_dim]; rows, masks and weights below are stored so."""
        grouped = not self.dense and not self.ragged
        return stored_order(self.head_dim, self.head_dim // self.group if grouped else 1)

    def stored(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows [..., head_dim] in the order in which they are stored."""
        return np.asarray(rows)[..., self.order]

    def natural(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `stored`."""
        return np.asarray(rows)[..., np.argsort(self.order)]

    def masks(self, rows: F32, weight: F32 | None = None) -> NDArray[np.bool_]:
        """Per-token magnitude masks of stored rows [n, head_dim]."""
        if self.dense:
            return np.ones(rows.shape, dtype=bool)
        return top_mask(rows, self.group, self.keep, weight)


# The bytes of a slot ------------------------------------------------------------------------------


def quantise(values: F32, value_dtype: str) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """Codes of one row's kept values and the bits of its bf16 scale.

    The scale is absmax / 127 (int4: 7) in f32, rounded up to bf16; codes round half to even.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"rows that are not finite can't be stored as {value_dtype}")
    largest = np.float32(_LARGEST_CODE[value_dtype])
    absmax = np.abs(values).max(initial=np.float32(0))
    bits = np.asarray(absmax / largest, dtype=np.float32).view(np.uint32)
    scale_bits = ((bits >> 16) + ((bits & 0xFFFF) != 0)).astype(np.uint16)
    scale = bf16_to_f32(scale_bits)
    if scale == 0:
        return np.zeros(values.shape, np.int8), scale_bits
    codes = np.clip(np.rint(values / scale), -largest, largest)
    return codes.astype(np.int8), scale_bits


def encode(values: NDArray[Any], value_dtype: str) -> bytes:
    """A run of float values or integer codes, as stored; int4: two to a byte, low nibble first."""
    if value_dtype == "f32":
        return np.asarray(values, dtype="<f4").tobytes()
    if value_dtype == "f16":
        with np.errstate(over="ignore"):
            return np.asarray(values, dtype=np.float32).astype("<f2").tobytes()
    if value_dtype == "bf16":
        return f32_to_bf16(values).astype("<u2").tobytes()
    codes = np.asarray(values, dtype=np.int8).view(np.uint8)
    if value_dtype == "int8":
        return codes.tobytes()
    nibbles = np.zeros(-(-codes.size // 2) * 2, np.uint8)
    nibbles[: codes.size] = codes & 0xF
    return (nibbles[0::2] | nibbles[1::2] << 4).tobytes()


def decode(data: NDArray[np.uint8], value_dtype: str, count: int) -> F32:
    """The inverse of `encode`: the first `count` values, integer codes unscaled."""
    raw = np.ascontiguousarray(data, dtype=np.uint8)
    if value_dtype == "f32":
        return raw[: 4 * count].view("<f4").astype(np.float32)
    if value_dtype == "f16":
        return raw[: 2 * count].view("<f2").astype(np.float32)
    if value_dtype == "bf16":
        return bf16_to_f32(raw[: 2 * count].view("<u2"))
    if value_dtype == "int8":
        return raw[:count].view(np.int8).astype(np.float32)
    nibbles = np.stack([raw & 0xF, raw >> 4], axis=-1).reshape(-1)[:count].astype(np.int8)
    return ((nibbles ^ 8) - 8).astype(np.float32)


def pack_block(slot: Slot, rows: F32, masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bytes of one slot. rows: float32 [64, head_dim]; masks: bool [64, head_dim].

    Raises ValueError where an integer type meets a value that is not finite, or where masks do not
    fit the slot.
    """
    out = np.zeros(slot.slot_bytes, np.uint8)

    def put(offset: int, data: bytes) -> None:
        out[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    if not slot.dense:
        words = np.zeros((BLOCK_TOKENS, slot.mask_words * 32), dtype=bool)
        words[:, : slot.head_dim] = masks
        put(0, np.packbits(words, axis=1, bitorder="little").tobytes())

    runs: list[NDArray[np.float32] | NDArray[np.int8]] = []
    for token in range(BLOCK_TOKENS):
        kept = rows[token][masks[token]]
        if slot.value_dtype in _LARGEST_CODE:
            if not np.isfinite(rows[token]).all():
                raise ValueError(f"row {token} is not finite: not for {slot.value_dtype}")
            codes, scale_bits = quantise(kept, slot.value_dtype)
            put(slot.scales_offset + 2 * token, scale_bits.astype("<u2").tobytes())
            runs.append(codes)
        else:
            runs.append(kept)

    if slot.ragged and not slot.dense:
        offsets = np.cumsum([0] + [run.size for run in runs])
        capacity = BLOCK_TOKENS * slot.row_bytes * 8 // _VALUE_BITS[slot.value_dtype]
        if offsets[-1] > capacity:
            raise ValueError(f"masks keep {offsets[-1]} values, the slot holds {capacity}")
        put(slot.values_offset - _RAGGED_OFFSETS_BYTES, offsets.astype("<u2").tobytes())
        put(slot.values_offset, encode(np.concatenate(runs), slot.value_dtype))
        return out
    for token, run in enumerate(runs):
        if run.size != slot.row_keep:
            raise ValueError(f"row {token} keeps {run.size} values, expected {slot.row_keep}")
        put(slot.values_offset + token * slot.row_bytes, encode(run, slot.value_dtype))
    return out


def unpack_block(slot: Slot, data: NDArray[np.uint8]) -> tuple[F32, NDArray[np.bool_]]:
    """Dequantised rows [64, head_dim], zero where pruned, and the masks."""
    data = np.asarray(data, np.uint8)
    rows = np.zeros((BLOCK_TOKENS, slot.head_dim), np.float32)
    masks = np.ones(rows.shape, dtype=bool)
    if not slot.dense:
        words = data[: BLOCK_TOKENS * slot.mask_words * 4].reshape(BLOCK_TOKENS, -1)
        masks = np.unpackbits(words, axis=1, bitorder="little")[:, : slot.head_dim].astype(bool)
    total = int(masks.sum())
    run_bytes = data[slot.values_offset : slot.scales_offset]
    ragged = decode(run_bytes, slot.value_dtype, total) if slot.ragged and not slot.dense else None
    first = 0
    for token in range(BLOCK_TOKENS):
        count = int(masks[token].sum())
        if ragged is not None:
            values = ragged[first : first + count]
        else:
            row = run_bytes[token * slot.row_bytes : (token + 1) * slot.row_bytes]
            values = decode(row, slot.value_dtype, count)
        if slot.value_dtype in _LARGEST_CODE:
            at = slot.scales_offset + 2 * token
            values = values * bf16_to_f32(data[at : at + 2].view("<u2"))
        rows[token][masks[token]] = values
        first += count
    return rows, masks
