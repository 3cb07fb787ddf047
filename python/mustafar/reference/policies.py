"""Pruning policies: masks of one block, 64 tokens of one KV head, bool [64, head_dim].

Channel policies fix a block's count of kept values, not a row's: their slots are ragged.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .numbers import F32
from .slots import BLOCK_TOKENS, Slot, top_mask

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
