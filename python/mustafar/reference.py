"""The compressed KV cache in plain numpy: the definition to read, and to check other code against.

Nothing here is used by the runtime, and nothing here calls it. Functions follow the order of the
format: which values of a row are kept, how a block of 64 tokens is laid out in bytes, how blocks
make pages, when tokens are compressed, and attention over all of it.

A *row* is one token of one KV head, K or V: ``head_dim`` values. Ranking and quantising read rows
already rounded to the cache's tail type (`round_to`) and in stored order (`Slot.stored`): the dims
of a group are dealt round the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

BLOCK_TOKENS = 64
SLOT_ALIGNMENT = 128  # bytes
VALUE_DTYPES = ("f32", "f16", "bf16", "int8", "int4")
_VALUE_BITS = {"f32": 32, "f16": 16, "bf16": 16, "int8": 8, "int4": 4}
_LARGEST_CODE = {"int8": 127, "int4": 7}


# Number formats ---------------------------------------------------------------------------------


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


# One block of one KV head: a slot -----------------------------------------------------------------


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
        offsets = 132 if self.ragged and not self.dense else 0
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


# Pruning policies ---------------------------------------------------------------------------------
# Masks of one block, 64 tokens of one KV head, bool [64, head_dim]. Channel policies fix a block's
# count of kept values, not a row's: their slots are ragged.

K_POLICIES = (
    "magnitude",
    "output_aware",
    "channel_magnitude",
    "channel_output_aware",
    "channel_structured",
)
V_POLICIES = ("magnitude", "channel_magnitude", "channel_output_aware")


def query_weight(q: F32, window: int) -> F32:
    """What the newest queries weigh each channel by: sums of |q|, float32 [head_dim].

    q: float32 [tokens, query heads of the KV head, head_dim], after RoPE, ending with the newest
    token of the call that compresses the block. The newest `window` of them count, at least one.
    Output-aware ranking: MUSTAFAR (arXiv 2505.22913), after ThinK (arXiv 2407.21018).
    """
    weight: F32 = np.abs(q[-max(window, 1) :]).sum(axis=(0, 1), dtype=np.float32)
    return weight


def token_weight(keys: F32, weight: F32) -> F32:
    """What values of channel_output_aware are weighted by: |keys| @ weight, float32 [64].

    keys: [64, head_dim], of the values' own tokens, not pruned. weight: `query_weight`. It bounds
    the sum of |q . k| over the window's queries and stands in for the probabilities, which are
    never stored.
    """
    return np.abs(np.asarray(keys, np.float32)) @ np.asarray(weight, np.float32)


def channel_masks(rows: F32, keep: int, weight: F32 | None = None) -> NDArray[np.bool_]:
    """The `keep` tokens of every channel with the largest |x| (* weight [64])."""
    return top_mask(rows.T, BLOCK_TOKENS, keep, weight).T


def block_masks(rows: F32, keep: int, weight: F32) -> NDArray[np.bool_]:
    """The head_dim * keep largest |x| * weight [head_dim] of the whole block.

    A channel's weight is the same for all its tokens, so ranking inside channels would ignore it.
    """
    flat = np.broadcast_to(weight, rows.shape).reshape(-1)
    return top_mask(rows.reshape(-1), rows.size, rows.shape[1] * keep, flat).reshape(rows.shape)


def structured_masks(rows: F32, keep: int, weight: F32) -> NDArray[np.bool_]:
    """The `keep` channels with the largest l2 norm over the block * weight [head_dim], whole.

    ThinK, arXiv 2407.21018.
    """
    norms = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=0)).astype(np.float32)
    channels = top_mask(norms, norms.size, keep, weight)
    return np.broadcast_to(channels, rows.shape).copy()


def policy_masks(
    policy: str,
    slot: Slot,
    rows: F32,
    weight: F32 | None = None,
    keys: F32 | None = None,
    ranking: F32 | None = None,
) -> NDArray[np.bool_]:
    """Masks of a block by the name of the policy, as in KVConfig.

    slot: ragged for the channel policies. rows: keys or values, float32 [64, head_dim].
    weight: `query_weight`, for all policies but the two by magnitude. keys: [64, head_dim], for
    channel_output_aware of values. ranking: a profile's ranking weights [head_dim] of the slot's
    kind; they matter where values of different channels compete. With a profile rows, keys and
    queries are the transformed ones.
    """
    if policy not in (K_POLICIES if slot.is_key else V_POLICIES):
        raise ValueError(f"no policy {policy!r} for {'keys' if slot.is_key else 'values'}")
    if slot.dense:
        return np.ones(rows.shape, dtype=bool)
    if slot.ragged != policy.startswith("channel"):
        raise ValueError(f"policy {policy} with a slot of ragged={slot.ragged}")
    if policy == "magnitude":
        return slot.masks(rows, ranking)
    if policy == "channel_magnitude":
        return channel_masks(rows, slot.keep)
    if weight is None:
        raise ValueError(f"policy {policy} needs the window's query weight")
    if slot.is_key and ranking is not None:
        weight = weight * ranking
    if policy == "output_aware":
        return slot.masks(rows, weight)
    if policy == "channel_structured":
        return structured_masks(rows, slot.row_keep, weight)
    if slot.is_key:
        return block_masks(rows, slot.keep, weight)
    if keys is None:
        raise ValueError(f"policy {policy} of values needs the block's keys")
    return channel_masks(rows, slot.keep, token_weight(keys, weight))


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
        put(slot.values_offset - 132, offsets.astype("<u2").tobytes())
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


# Coded rows --------------------------------------------------------------------------------------
# In a profile's basis every dim has a fixed number of bits, by the energy that was seen in it. No
# masks: a row is its dims' codes end to end, a string of bits.

MAX_WIDTH = 7
# By width: the step in units of a dim's standard deviation, and the square error that is left of a
# Gaussian dim's energy.
CODED_STEP = np.array(
    [0, 1.72, 1.08, 0.65, 0.38, 0.2175, 0.1225, 0.068125],
    np.float32,
)
_CODED_ERROR = (1, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000642, 0.000163)
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
        return -1.0 if w == MAX_WIDTH else energy[d] * (_CODED_ERROR[w] - _CODED_ERROR[w + 1])

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


# Pages --------------------------------------------------------------------------------------------


def page_bytes(k: Slot, v: Slot, n_layers: int, n_kv_heads: int) -> int:
    """Bytes of one block of one sequence: all layers, all KV heads, K and V."""
    return n_layers * n_kv_heads * (k.slot_bytes + v.slot_bytes)


def slot_offset(k: Slot, v: Slot, n_kv_heads: int, layer: int, head: int, is_key: bool) -> int:
    """Bytes from a page's start to a slot: by layer, then head, K before V."""
    pair = (layer * n_kv_heads + head) * (k.slot_bytes + v.slot_bytes)
    return pair if is_key else pair + k.slot_bytes


# The schedule, and attention over it --------------------------------------------------------------


def compressed_tokens(n: int, sink_tokens: int, window: int) -> int:
    """Tokens in the compressed store when n are cached: whole blocks between sinks and window."""
    return max(0, n - sink_tokens - window) // BLOCK_TOKENS * BLOCK_TOKENS


def attend(q: F32, k: F32, v: F32) -> NDArray[np.float64]:
    """Softmax attention of queries q [n, head_dim] over keys and values [tokens, head_dim]."""
    scores = q.astype(np.float64) @ k.T.astype(np.float64) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = weights @ v.astype(np.float64)
    normalised: NDArray[np.float64] = result / weights.sum(axis=-1, keepdims=True)
    return normalised


@dataclass
class HeadCache:
    """Keys and values of one sequence, layer and KV head as decoding sees them.

    A call attends to the cache as it stood, plus its own tokens, all dense; then the blocks that
    left the window are compressed. A prompt's first prefill is therefore exact.
    """

    k_slot: Slot
    v_slot: Slot
    window: int = 32
    sink_tokens: int = 0
    tail_dtype: str = "f32"
    blocks: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = field(default_factory=list)
    k_dense: F32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    v_dense: F32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @property
    def position(self) -> int:
        """Tokens cached."""
        return len(self.blocks) * BLOCK_TOKENS + len(self.k_dense)

    def rows(self) -> tuple[F32, F32]:
        """Every key and value as attention reads it, in order of position: [tokens, head_dim]."""
        sinks = min(self.sink_tokens, len(self.k_dense))
        k_store = [self.k_slot.natural(unpack_block(self.k_slot, k)[0]) for k, _ in self.blocks]
        v_store = [self.v_slot.natural(unpack_block(self.v_slot, v)[0]) for _, v in self.blocks]
        return (
            np.concatenate([self.k_dense[:sinks], *k_store, self.k_dense[sinks:]]),
            np.concatenate([self.v_dense[:sinks], *v_store, self.v_dense[sinks:]]),
        )

    def call(self, q: F32, k: F32, v: F32) -> NDArray[np.float64]:
        """One forward call of n tokens: q [n, n_queries, head_dim], k and v [n, head_dim].

        Returns attention of every query, [n, n_queries, head_dim].
        """
        if self.k_dense.size == 0:
            self.k_dense = np.zeros((0, k.shape[1]), np.float32)
            self.v_dense = np.zeros((0, v.shape[1]), np.float32)
        before = self.position
        self.k_dense = np.concatenate([self.k_dense, round_to(k, self.tail_dtype)])
        self.v_dense = np.concatenate([self.v_dense, round_to(v, self.tail_dtype)])
        keys, values = self.rows()
        out = [
            attend(q[i], keys[: before + i + 1], values[: before + i + 1]) for i in range(len(q))
        ]
        self._commit()
        return np.stack(out)

    def _commit(self) -> None:
        stored = compressed_tokens(self.position, self.sink_tokens, self.window)
        while len(self.blocks) * BLOCK_TOKENS < stored:
            first, last = self.sink_tokens, self.sink_tokens + BLOCK_TOKENS
            k = self.k_slot.stored(self.k_dense[first:last])
            v = self.v_slot.stored(self.v_dense[first:last])
            self.blocks.append(
                (
                    pack_block(self.k_slot, k, self.k_slot.masks(k)),
                    pack_block(self.v_slot, v, self.v_slot.masks(v)),
                )
            )
            self.k_dense = np.delete(self.k_dense, np.s_[first:last], axis=0)
            self.v_dense = np.delete(self.v_dense, np.s_[first:last], axis=0)
