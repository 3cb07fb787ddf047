"""What a state file's compressed store holds, and masks of it checked against numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mustafar import KVConfig, Model, Session, reference
from support.state_file import pages_of


@dataclass
class Store:
    """The compressed store of one kind."""

    rows: np.ndarray  # float32 [layers, kv_heads, blocks, 64, head_dim]
    masks: np.ndarray  # bool, of the same shape
    slots: np.ndarray  # uint8 [layers, kv_heads, blocks, slot_bytes]


def slots_of(model: Model, kv: KVConfig) -> tuple[reference.Slot, reference.Slot]:
    k, v = (
        reference.Slot(
            model.config["head_dim"],
            kv.value_dtype,
            kv.sparsity if sparsity is None else sparsity,
            kv.pattern,
            is_key,
            policy.startswith("channel"),
        )
        for is_key, policy, sparsity in (
            (True, kv.k_policy, kv.k_sparsity),
            (False, kv.v_policy, kv.v_sparsity),
        )
    )
    return k, v


def store_of(session: Session, path: Path) -> tuple[Store, Store]:
    """Keys and values of the compressed store."""
    pages = pages_of(session, path)
    config = session.model.config
    layers, heads = config["n_layers"], config["n_kv_heads"]
    slots = slots_of(session.model, session.kv)
    assert pages.shape[1] == reference.page_bytes(*slots, layers, heads)
    out = []
    for slot in slots:
        shape = (layers, heads, len(pages), 64, slot.head_dim)
        store = Store(
            np.zeros(shape, np.float32),
            np.zeros(shape, bool),
            np.zeros((*shape[:3], slot.slot_bytes), np.uint8),
        )
        for at in np.ndindex(shape[:3]):
            layer, head, page = at
            start = reference.slot_offset(*slots, heads, layer, head, slot.is_key)
            store.slots[at] = pages[page][start : start + slot.slot_bytes]
            rows, masks = reference.unpack_block(slot, store.slots[at])
            store.rows[at], store.masks[at] = slot.natural(rows), slot.natural(masks)
        out.append(store)
    return out[0], out[1]


def groups_of(policy: str, slot: reference.Slot, x: np.ndarray) -> np.ndarray:
    """What is ranked together in a block [64, head_dim], as [groups, values]."""
    if not slot.ragged:
        return slot.stored(x).reshape(-1, slot.group)
    if policy == "channel_structured" or (policy == "channel_output_aware" and slot.is_key):
        return x.reshape(1, -1)
    return x.T


def score_of(
    policy: str,
    slot: reference.Slot,
    rows: np.ndarray,
    weight: np.ndarray,
    keys: np.ndarray,
    ranking: np.ndarray,
) -> np.ndarray:
    """What the policy ranks a block's values by, [64, head_dim]."""
    x = np.abs(rows).astype(np.float64)
    if policy == "magnitude":
        return x * ranking
    if policy == "channel_magnitude":
        return x
    if policy == "channel_structured":
        return np.broadcast_to(np.linalg.norm(x, axis=0) * weight * ranking, x.shape)
    if slot.is_key:
        return x * weight * ranking
    return x * (np.abs(keys) @ weight)[:, None]


def stored_masks(
    policy: str,
    slot: reference.Slot,
    rows: np.ndarray,
    weight: np.ndarray,
    keys: np.ndarray,
    ranking: np.ndarray | None = None,
) -> np.ndarray:
    """`reference.policy_masks` of rows, keys and weights in the row's own order, and so its masks."""
    order = slot.order
    ranking = None if ranking is None else ranking[order]
    masks = reference.policy_masks(
        policy, slot, rows[:, order], weight[order], keys[:, order], ranking
    )
    return slot.natural(masks)


def check_masks(
    kv: KVConfig,
    slot: reference.Slot,
    actual: np.ndarray,
    rows: np.ndarray,
    keys: np.ndarray,
    queries: np.ndarray,
    where: tuple[int, ...],
    ranking: np.ndarray | None = None,
) -> None:
    """Masks of one stored block, bool [64, head_dim], against numpy.

    rows, keys: the block's own and its keys, dense. queries: [tokens, query heads, head_dim], as
    many tokens as were cached when it was compressed. ranking: the profile's weights [head_dim].
    Near-ties at the cut may fall either way: scores within 1e-4 of it.
    """
    policy = kv.k_policy if slot.is_key else kv.v_policy
    weight = reference.query_weight(queries, kv.window)
    expected = stored_masks(policy, slot, rows, weight, keys, ranking)
    message = f"{policy} of {'keys' if slot.is_key else 'values'} {where}"
    factor = np.ones(slot.head_dim) if ranking is None else ranking
    scores = groups_of(policy, slot, score_of(policy, slot, rows, weight, keys, factor))
    kept = groups_of(policy, slot, expected)
    assert (groups_of(policy, slot, actual).sum(-1) == kept.sum(-1)).all(), message
    cut = np.where(kept, scores, np.inf).min(-1, keepdims=True)
    moved = groups_of(policy, slot, actual ^ expected)
    assert (np.abs(scores - cut) <= 1e-4 * cut)[moved].all(), message
    if policy == "channel_structured":
        assert (actual == actual[0]).all(), message


def check_rows(stored: np.ndarray, mask: np.ndarray, rows: np.ndarray, where: object) -> None:
    """Stored rows [64, head_dim] are the dense ones of another computation where they are kept."""
    np.testing.assert_allclose(stored, np.where(mask, rows, 0), 1e-4, 1e-4, err_msg=str(where))
