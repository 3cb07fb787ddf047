"""Pruning policies: the runtime's masks and values against the numpy reference.

Expected masks come from the rows that a dense session stores and the queries of a transformers
forward. Every row of a prompt's first prefill is exact, and so are the rows of layer 0 at any time.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Model, Session, reference

oracle = pytest.importorskip("oracle")
torch = pytest.importorskip("torch")

PROMPT, STEPS = 300, 140
IDS = [int(x) for x in np.random.default_rng(5).integers(3, 300, PROMPT + STEPS)]

CASES = [
    KVConfig(sparsity=s, k_policy=k, v_policy=v, window=window, sink_tokens=sinks, pattern=pattern,
             value_dtype="f32")
    for k, v, s, window, sinks, pattern in [
        ("magnitude", "channel_magnitude", 0.7, 32, 0, "group"),
        ("output_aware", "magnitude", 0.5, 32, 4, "group"),
        ("output_aware", "channel_output_aware", 0.7, 0, 0, "row"),
        ("channel_magnitude", "channel_output_aware", 0.5, 32, 0, "group"),
        ("channel_output_aware", "magnitude", 0.7, 48, 4, "row"),
        ("channel_output_aware", "channel_output_aware", 0.9, 128, 0, "group"),
        ("channel_structured", "channel_magnitude", 0.5, 32, 4, "group"),
        ("channel_structured", "channel_output_aware", 0.7, 0, 0, "group"),
    ]
]  # fmt: skip


def name_of(kv: KVConfig) -> str:
    return f"k-{kv.k_policy}-v-{kv.v_policy}-{kv.sparsity}-w{kv.window}-s{kv.sink_tokens}"


@dataclass
class Store:
    """Compressed rows and masks of one kind, [layers, kv_heads, blocks, 64, head_dim]."""

    rows: np.ndarray
    masks: np.ndarray


def slots_of(model: Model, kv: KVConfig) -> tuple[reference.Slot, reference.Slot]:
    k, v = (
        reference.Slot(
            model.config["head_dim"],
            "f32",
            kv.sparsity,
            kv.pattern,
            is_key,
            policy.startswith("channel"),
        )
        for is_key, policy in ((True, kv.k_policy), (False, kv.v_policy))
    )
    return k, v


def store_of(session: Session, path: Path) -> tuple[Store, Store]:
    """Keys and values of the compressed store, from a state file."""
    session.save(path)
    whole = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", whole, 16)
    header = json.loads(whole[64 : 64 + header_bytes])
    at = 64 + (header_bytes + 63) // 64 * 64
    for section in header["sections"]:
        if section["name"] == "pages":
            break
        at += (section["bytes"] + 63) // 64 * 64
    pages = np.frombuffer(whole, np.uint8, section["bytes"], at).reshape(-1, header["page_bytes"])
    config = session.model.config
    layers, heads = config["n_layers"], config["n_kv_heads"]
    slots = slots_of(session.model, session.kv)
    assert header["page_bytes"] == reference.page_bytes(*slots, layers, heads)
    out = []
    for slot in slots:
        shape = (layers, heads, len(pages), 64, slot.head_dim)
        store = Store(np.zeros(shape, np.float32), np.zeros(shape, bool))
        for layer, head, page in np.ndindex(shape[:3]):
            start = reference.slot_offset(*slots, heads, layer, head, slot.is_key)
            store.rows[layer, head, page], store.masks[layer, head, page] = reference.unpack_block(
                slot, pages[page][start : start + slot.slot_bytes]
            )
        out.append(store)
    return out[0], out[1]


def queries_of(folder: Path, ids: list[int]) -> np.ndarray:
    """Queries after RoPE by transformers, [layers, heads, tokens, head_dim]."""
    from transformers import AttentionInterface
    from transformers.models.llama.modeling_llama import eager_attention_forward

    seen = {}

    def attention(module: Any, query: Any, *args: Any, **options: Any) -> Any:
        seen[module.layer_idx] = query[0].numpy()
        n = query.shape[2]
        causal = torch.full((n, n), float("-inf")).triu(1)[None, None]
        return eager_attention_forward(module, query, args[0], args[1], causal, **options)

    AttentionInterface.register("recording", attention)
    model = oracle.load(folder)
    model.set_attn_implementation("recording")
    oracle.logits(model, ids)
    return np.stack([seen[layer] for layer in sorted(seen)])


@dataclass
class Trained:
    """A model with what the reference needs of IDS."""

    model: Model
    queries: np.ndarray  # [layers, kv_heads, tokens, query heads of a KV head, head_dim]
    rows: dict[tuple[int, int], tuple[Store, Store]]  # dense, by window and sinks


@pytest.fixture(scope="module", params=["story", "stories260K", "demo"])
def trained(request: pytest.FixtureRequest) -> Iterator[Trained]:
    from conftest import model_folder

    folder = model_folder(request.param)
    with Model(folder, device="cpu", dtype="f32") as model:
        q = queries_of(folder, IDS)
        layers, heads, n, dim = q.shape
        q = q.reshape(layers, model.config["n_kv_heads"], -1, n, dim).swapaxes(2, 3)
        yield Trained(model, q, {})


def dense_rows(trained: Trained, kv: KVConfig, path: Path) -> tuple[Store, Store]:
    """Rows of IDS in the blocks that kv would compress."""
    key = (kv.window, kv.sink_tokens)
    if key not in trained.rows:
        session = Session(
            trained.model,
            KVConfig(sparsity=0.0, window=kv.window, sink_tokens=kv.sink_tokens, value_dtype="f32"),
        )
        session.prefill(IDS)
        trained.rows[key] = store_of(session, path)
    return trained.rows[key]


def groups_of(policy: str, slot: reference.Slot, x: np.ndarray) -> np.ndarray:
    """What is ranked together in a block [64, head_dim], as [groups, values]."""
    if not slot.ragged:
        return x.reshape(-1, slot.group)
    if policy == "channel_structured" or (policy == "channel_output_aware" and slot.is_key):
        return x.reshape(1, -1)
    return x.T


def score_of(
    policy: str, slot: reference.Slot, rows: np.ndarray, weight: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """What the policy ranks a block's values by, [64, head_dim]."""
    x = np.abs(rows).astype(np.float64)
    if policy.endswith("magnitude"):
        return x
    if policy == "channel_structured":
        return np.broadcast_to(np.linalg.norm(x, axis=0) * weight, x.shape)
    if slot.is_key:
        return x * weight
    return x * (np.abs(keys) @ weight)[:, None]


def check_blocks(
    trained: Trained,
    kv: KVConfig,
    stored: tuple[Store, Store],
    dense: tuple[Store, Store],
    ends: list[int],
    layers: int | None = None,
) -> None:
    """Every block against numpy; ends: tokens cached when each block was compressed.

    Near-ties at the cut may fall either way: scores within 1e-4 of it.
    """
    assert stored[0].masks.shape[2] == len(ends)
    slots = slots_of(trained.model, kv)
    for which, policy in enumerate((kv.k_policy, kv.v_policy)):
        slot, shape = slots[which], stored[which].masks.shape
        for layer, head, block in np.ndindex(layers or shape[0], shape[1], len(ends)):
            at = (layer, head, block)
            rows, keys = dense[which].rows[at], dense[0].rows[at]
            weight = reference.query_weight(trained.queries[layer, head, : ends[block]], kv.window)
            expected = reference.policy_masks(policy, slot, rows, weight, keys)
            actual = stored[which].masks[at]
            scores = groups_of(policy, slot, score_of(policy, slot, rows, weight, keys))
            kept = groups_of(policy, slot, expected)
            where = f"{policy} of {'key' if slot.is_key else 'value'} {at}"
            assert (groups_of(policy, slot, actual).sum(-1) == kept.sum(-1)).all(), where
            cut = np.where(kept, scores, np.inf).min(-1, keepdims=True)
            moved = groups_of(policy, slot, actual ^ expected)
            assert (np.abs(scores - cut) <= 1e-4 * cut)[moved].all(), where
            if policy == "channel_structured":
                assert (actual == actual[0]).all(), where
            np.testing.assert_array_equal(
                stored[which].rows[at], np.where(actual, rows, 0), err_msg=where
            )


def prompt_ends(kv: KVConfig) -> list[int]:
    return [PROMPT] * (reference.compressed_tokens(PROMPT, kv.sink_tokens, kv.window) // 64)


@pytest.mark.parametrize("kv", CASES, ids=name_of)
def test_prompt_blocks(trained: Trained, kv: KVConfig, tmp_path: Path) -> None:
    session = Session(trained.model, kv)
    session.prefill(IDS[:PROMPT])
    stored = store_of(session, tmp_path / "state")
    dense = dense_rows(trained, kv, tmp_path / "dense")
    check_blocks(trained, kv, stored, dense, prompt_ends(kv))
