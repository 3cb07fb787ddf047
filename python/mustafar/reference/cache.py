"""Blocks as pages, when tokens are compressed, and attention over all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .numbers import F32, round_to
from .slots import BLOCK_TOKENS, Slot, pack_block, unpack_block

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
    left the window are compressed. A prompt's first prefill is therefore exact. In a layer with a
    sliding window a query sees the newest `sees` tokens, its own among them; 0: all.
    """

    k_slot: Slot
    v_slot: Slot
    window: int = 32
    sink_tokens: int = 0
    tail_dtype: str = "f32"
    sees: int = 0
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
        out = []
        for i in range(len(q)):
            end = before + i + 1
            first = max(0, end - self.sees) if self.sees > 0 else 0
            out.append(attend(q[i], keys[first:end], values[first:end]))
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
