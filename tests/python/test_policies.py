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

from mustafar import KVConfig, Model, Session, reference

oracle = pytest.importorskip("oracle")
torch = pytest.importorskip("torch")

from test_sparse_oracle import Schedule

PROMPT, STEPS = 300, 120
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
            kv.sparsity if sparsity is None else sparsity,  # a loaded state has it for each
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


def pages_of(session: Session, path: Path) -> np.ndarray:
    """Bytes of the compressed store, uint8 [pages, page_bytes], from a state file."""
    session.save(path)
    whole = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", whole, 16)
    header = json.loads(whole[64 : 64 + header_bytes])
    at = 64 + (header_bytes + 63) // 64 * 64
    for section in header["sections"]:
        if section["name"] == "pages":
            break
        at += (section["bytes"] + 63) // 64 * 64
    return np.frombuffer(whole, np.uint8, section["bytes"], at).reshape(-1, header["page_bytes"])


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
        store = Store(np.zeros(shape, np.float32), np.zeros(shape, bool))
        for layer, head, page in np.ndindex(shape[:3]):
            start = reference.slot_offset(*slots, heads, layer, head, slot.is_key)
            store.rows[layer, head, page], store.masks[layer, head, page] = reference.unpack_block(
                slot, pages[page][start : start + slot.slot_bytes]
            )
        out.append(store)
    return out[0], out[1]


def queries_of(model: Any, ids: list[int]) -> np.ndarray:
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
    model.set_attn_implementation("recording")
    oracle.logits(model, ids)
    return np.stack([seen[layer] for layer in sorted(seen)])


@dataclass
class Trained:
    """A model with what the reference needs of IDS."""

    model: Model
    transformers: Any
    queries: np.ndarray  # [layers, kv_heads, tokens, query heads of a KV head, head_dim]
    rows: dict[tuple[int, int], tuple[Store, Store]]  # dense, by window and sinks


@pytest.fixture(scope="module", params=["story", "stories260K", "demo"])
def trained(request: pytest.FixtureRequest) -> Iterator[Trained]:
    from conftest import model_folder

    folder = model_folder(request.param)
    with Model(folder, device="cpu", dtype="f32") as model:
        theirs = oracle.load(folder)
        q = queries_of(theirs, IDS)
        layers, heads, n, dim = q.shape
        q = q.reshape(layers, model.config["n_kv_heads"], -1, n, dim).swapaxes(2, 3)
        yield Trained(model, theirs, q, {})


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


def check_block(
    kv: KVConfig,
    slot: reference.Slot,
    block: tuple[np.ndarray, np.ndarray],
    rows: np.ndarray,
    keys: np.ndarray,
    queries: np.ndarray,
    where: tuple[int, ...],
    rtol: float = 0.0,
) -> None:
    """One stored block, rows and masks [64, head_dim], against numpy.

    rows, keys: the block's own and its keys, dense. queries: [tokens, query heads, head_dim], as
    many tokens as were cached when it was compressed. Near-ties at the cut may fall either way:
    scores within 1e-4 of it.
    """
    policy = kv.k_policy if slot.is_key else kv.v_policy
    weight = reference.query_weight(queries, kv.window)
    expected = reference.policy_masks(policy, slot, rows, weight, keys)
    stored, actual = block
    message = f"{policy} of {'keys' if slot.is_key else 'values'} {where}"
    scores = groups_of(policy, slot, score_of(policy, slot, rows, weight, keys))
    kept = groups_of(policy, slot, expected)
    assert (groups_of(policy, slot, actual).sum(-1) == kept.sum(-1)).all(), message
    cut = np.where(kept, scores, np.inf).min(-1, keepdims=True)
    moved = groups_of(policy, slot, actual ^ expected)
    assert (np.abs(scores - cut) <= 1e-4 * cut)[moved].all(), message
    if policy == "channel_structured":
        assert (actual == actual[0]).all(), message
    np.testing.assert_allclose(
        stored, np.where(actual, rows, 0), rtol=rtol, atol=rtol, err_msg=message
    )


def ends_of(kv: KVConfig, n: int, prompt: int = PROMPT) -> list[int]:
    """Tokens cached when each block was compressed: prefill of a prompt, then decode to n."""
    first = kv.sink_tokens + kv.window + 64
    return [max(prompt, end) for end in range(first, n + 1, 64)]


def next_end(kv: KVConfig) -> int:
    """Tokens cached when the first block after the prompt's is compressed."""
    return next(end for end in ends_of(kv, PROMPT + 64) if end > PROMPT)


@pytest.mark.parametrize("kv", CASES, ids=name_of)
def test_prompt_blocks(trained: Trained, kv: KVConfig, tmp_path: Path) -> None:
    session = Session(trained.model, kv)
    session.prefill(IDS[:PROMPT])
    stored = store_of(session, tmp_path / "state")
    dense = dense_rows(trained, kv, tmp_path / "dense")
    for kind, slot in enumerate(slots_of(trained.model, kv)):
        assert stored[kind].masks.shape[2] == len(ends_of(kv, PROMPT)) > 1
        for at in np.ndindex(stored[kind].masks.shape[:3]):
            check_block(
                kv,
                slot,
                (stored[kind].rows[at], stored[kind].masks[at]),
                dense[kind].rows[at],
                dense[0].rows[at],
                trained.queries[at[0], at[1], :PROMPT],
                at,
            )


@dataclass
class PolicySchedule(Schedule):
    """The teacher-forced oracle, which checks every layer's blocks as it goes."""

    slots: tuple[reference.Slot, reference.Slot]
    stored: tuple[Store, Store]

    def check(self, rows: np.ndarray, masks: np.ndarray, is_key: bool) -> None:
        pass

    def attention(
        self, module: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any
    ) -> tuple[Any, None]:
        heads, n, dim = key[0].shape
        queries = query[0].numpy().reshape(heads, -1, n, dim).swapaxes(1, 2)
        layer = module.layer_idx
        for block, end in enumerate(ends_of(self.kv, n, self.prompt)):
            first = self.kv.sink_tokens + 64 * block
            for head in range(heads):
                k, v = (x[0, head, first : first + 64].numpy() for x in (key, value))
                at = (layer, head, block)
                for rows, slot, store in zip((k, v), self.slots, self.stored):
                    found = (store.rows[at], store.masks[at])
                    check_block(self.kv, slot, found, rows, k, queries[head, :end], at, 1e-4)
        return super().attention(module, query, key, value, *args, **options)


@pytest.mark.parametrize("kv", CASES, ids=name_of)
def test_decode_blocks_and_logits(trained: Trained, kv: KVConfig, tmp_path: Path) -> None:
    from transformers import AttentionInterface

    session = Session(trained.model, kv)
    session.prefill(IDS[:PROMPT])
    ours = [session.decode(token) for token in IDS[PROMPT:]]
    stored = store_of(session, tmp_path / "state")
    layers, heads, blocks, _, dim = stored[0].masks.shape
    assert blocks == len(ends_of(kv, len(IDS))) > len(ends_of(kv, PROMPT))
    masks = [store.masks.reshape(layers, heads, blocks * 64, dim) for store in stored]
    schedule = PolicySchedule(kv, (masks[0], masks[1]), PROMPT, slots_of(trained.model, kv), stored)
    AttentionInterface.register("pruned_by_policy", schedule.attention)
    trained.transformers.set_attn_implementation("pruned_by_policy")
    expected = oracle.logits(trained.transformers, IDS)[PROMPT:]
    assert np.abs(np.array(ours) - expected).max() <= 1e-4


# What a policy keeps of the queries ---------------------------------------------------------------


def junk(session: Session, kv: KVConfig) -> None:
    """Other tokens as far as the block boundary, decoded and prefilled, then taken back."""
    n = session.position
    room = 63 - (n - kv.sink_tokens - kv.window) % 64
    assert room > 3
    other = [3 + (token + 7) % 290 for token in IDS[:room]]
    for token in other[: room // 2]:
        session.decode(token)
    session.prefill(other[room // 2 :])
    session.rewind(n)


@pytest.mark.parametrize("kv", CASES, ids=name_of)
def test_goes_on_as_if_undisturbed(trained: Trained, kv: KVConfig, tmp_path: Path) -> None:
    plain = Session(trained.model, kv)
    plain.prefill(IDS[: PROMPT - 3])
    forked_before = plain.fork()
    for session in (plain, forked_before):
        for token in IDS[PROMPT - 3 : PROMPT]:
            session.decode(token)
    rewound = plain.fork()
    plain.save(tmp_path / "state")
    sessions = {
        "forked before": forked_before,
        "forked": rewound.fork(),
        "state file": Session.load(trained.model, tmp_path / "state"),
        "rewound": rewound,
    }
    junk(rewound, kv)  # must not reach its fork either
    rewound.save(tmp_path / "state")
    sessions["state file of a rewound one"] = Session.load(trained.model, tmp_path / "state")
    before = len(pages_of(plain, tmp_path / "plain"))
    for token in IDS[PROMPT : next_end(kv) + 8]:
        expected = plain.decode(token)
        actual = Session.decode_batch(list(sessions.values()), [token] * len(sessions))
        for how, row in zip(sessions, actual):
            np.testing.assert_array_equal(row, expected, err_msg=how)
    pages = pages_of(plain, tmp_path / "plain")
    assert len(pages) > before
    for how, session in sessions.items():
        np.testing.assert_array_equal(pages_of(session, tmp_path / "other"), pages, err_msg=how)


@pytest.mark.parametrize("kv", CASES, ids=name_of)
def test_rewind_into_the_store(trained: Trained, kv: KVConfig, tmp_path: Path) -> None:
    """A block goes; the others stay, and layer 0 of the one made anew is as numpy has it."""
    end = next_end(kv) + 8
    session = Session(trained.model, kv)
    session.prefill(IDS[:PROMPT])
    for token in IDS[PROMPT:end]:
        session.decode(token)
    before = store_of(session, tmp_path / "before")
    position = next_end(kv) - 3
    session.rewind(position)
    left = len(pages_of(session, tmp_path / "rewound"))
    assert left == len(ends_of(kv, PROMPT)) == before[0].masks.shape[2] - 1
    for token in IDS[position:end]:
        session.decode(token)
    after = store_of(session, tmp_path / "after")
    dense = dense_rows(trained, kv, tmp_path / "dense")
    for kind, slot in enumerate(slots_of(trained.model, kv)):
        for new, old in (
            (after[kind].rows, before[kind].rows),
            (after[kind].masks, before[kind].masks),
        ):
            np.testing.assert_array_equal(new[:, :, :left], old[:, :, :left])
        for head in range(after[kind].masks.shape[1]):
            at = (0, head, left)
            found = (after[kind].rows[at], after[kind].masks[at])
            queries = trained.queries[0, head, : next_end(kv)]
            check_block(kv, slot, found, dense[kind].rows[at], dense[0].rows[at], queries, at, 1e-4)


def test_reference_refuses_what_does_not_fit() -> None:
    rows = np.ones((64, 16), np.float32)
    plain = reference.Slot(16, "f32", 0.5, is_key=False)
    ragged = reference.Slot(16, "f32", 0.5, is_key=False, ragged=True)
    for policy, slot, match in (
        ("output_aware", plain, "for values"),
        ("magnitude", ragged, "ragged"),
        ("channel_magnitude", plain, "ragged"),
        ("channel_output_aware", ragged, "query weight"),
    ):
        with pytest.raises(ValueError, match=match):
            reference.policy_masks(policy, slot, rows)
    with pytest.raises(ValueError, match="keys"):
        reference.policy_masks("channel_output_aware", ragged, rows, rows[0])
