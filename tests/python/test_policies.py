"""Pruning policies: the runtime's masks and values against the numpy reference.

Expected masks come from the rows that a dense session stores, under the same profile where there is
one, and the queries of a transformers forward. Every row of a prompt's first prefill is exact, and
so are the rows of layer 0 at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mustafar import KVConfig, Model, Profile, Session, reference

oracle = pytest.importorskip("support.oracle")
torch = pytest.importorskip("torch")

from support.policy_stores import Store, check_masks, check_rows, slots_of, store_of
from support.pruned_attention import Schedule
from support.state_file import pages_of

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

# Integer values, and a profile ("ours": the fixture's own) whose ranking weights differ by channel.
PROFILED_AND_INTEGER_CASES = [
    KVConfig(sparsity=s, k_policy=k, v_policy=v, window=window, sink_tokens=sinks, pattern=pattern,
             value_dtype=dtype, profile=profile)
    for k, v, s, window, sinks, pattern, dtype, profile in [
        ("magnitude", "magnitude", 0.5, 32, 0, "group", "int4", None),
        ("magnitude", "channel_magnitude", 0.9, 32, 4, "group", "int8", None),
        ("output_aware", "channel_output_aware", 0.7, 32, 0, "row", "int4", None),
        ("channel_output_aware", "channel_output_aware", 0.5, 48, 0, "group", "int8", None),
        ("channel_structured", "channel_output_aware", 0.9, 32, 0, "group", "int4", None),
        ("magnitude", "magnitude", 0.5, 32, 0, "group", "f32", "ours"),
        ("magnitude", "magnitude", 0.7, 32, 4, "row", "int8", "ours"),
        ("output_aware", "channel_output_aware", 0.5, 32, 0, "group", "int4", "ours"),
        ("output_aware", "magnitude", 0.7, 32, 0, "group", "int8", "ours"),
        ("channel_magnitude", "channel_magnitude", 0.7, 0, 0, "group", "int8", "ours"),
        ("channel_output_aware", "channel_output_aware", 0.7, 48, 4, "group", "f32", "ours"),
        ("channel_output_aware", "magnitude", 0.5, 32, 0, "row", "int4", "ours"),
        ("channel_structured", "channel_magnitude", 0.5, 32, 0, "group", "f32", "ours"),
        ("channel_structured", "magnitude", 0.7, 32, 4, "group", "int8", "ours"),
    ]
]  # fmt: skip


def name_of(kv: KVConfig) -> str:
    name = f"k-{kv.k_policy}-v-{kv.v_policy}-{kv.sparsity}-w{kv.window}-s{kv.sink_tokens}"
    return f"{name}-{kv.value_dtype}" + ("-profile" if kv.profile else "")


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
    profile: Profile
    rows: dict[Any, tuple[Store, Store]]  # by what decides them

    def queries_under(self, kv: KVConfig) -> np.ndarray:
        """Queries as they meet the cached keys: q' = q B_k^T."""
        if kv.profile is None:
            return self.queries
        return np.einsum("lhtgd,lhed->lhtge", self.queries, self.profile.k_backward)

    def ranking(self, kv: KVConfig, is_key: bool) -> np.ndarray | None:
        """The profile's ranking weights [layers, kv_heads, head_dim]."""
        if kv.profile is None:
            return None
        return self.profile.k_weight if is_key else self.profile.v_weight


def profile_for(model: Model) -> Profile:
    """Invertible matrices and ranking weights at random."""
    config = model.config
    rng = np.random.default_rng(11)
    shape = config["n_layers"], config["n_kv_heads"], config["head_dim"]

    def pair() -> tuple[np.ndarray, np.ndarray]:
        rotation = np.linalg.qr(rng.normal(size=(*shape, shape[-1])))[0]
        scale = np.exp(rng.normal(size=shape) / 2)
        return rotation * scale[..., None, :], (rotation / scale[..., None, :]).swapaxes(-1, -2)

    weights = np.exp(rng.normal(size=(2, *shape)))
    return Profile(*pair(), *pair(), *weights, kind="random", model_fingerprint="", text_hash="")


@pytest.fixture(scope="module", params=["story", "stories260K", "demo"])
def trained(request: pytest.FixtureRequest) -> Iterator[Trained]:
    from support.paths import model_folder

    folder = model_folder(request.param)
    with Model(folder, device="cpu", dtype="f32") as model:
        theirs = oracle.load(folder)
        q = queries_of(theirs, IDS)
        layers, heads, n, dim = q.shape
        q = q.reshape(layers, model.config["n_kv_heads"], -1, n, dim).swapaxes(2, 3)
        yield Trained(model, theirs, q, profile_for(model), {})


def dense_rows(trained: Trained, kv: KVConfig, path: Path) -> tuple[Store, Store]:
    """Rows of IDS in the blocks that kv would compress, all values of them.

    By a cache that stores rows in the same order: sums over dims in another one round differently.
    """
    key = (kv.window, kv.sink_tokens, kv.profile is None, kv.pattern, kv.k_policy, kv.v_policy)
    if key not in trained.rows:
        everything = replace(kv, sparsity=1e-6, k_sparsity=None, v_sparsity=None, value_dtype="f32")
        session = Session(trained.model, everything)
        session.prefill(IDS)
        trained.rows[key] = store_of(session, path)
        assert all(store.masks.all() for store in trained.rows[key])
    return trained.rows[key]


def ends_of(kv: KVConfig, n: int, prompt: int = PROMPT) -> list[int]:
    """Tokens cached when each block was compressed: prefill of a prompt, then decode to n."""
    first = kv.sink_tokens + kv.window + 64
    return [max(prompt, end) for end in range(first, n + 1, 64)]


def next_end(kv: KVConfig) -> int:
    """Tokens cached when the first block after the prompt's is compressed."""
    return next(end for end in ends_of(kv, PROMPT + 64) if end > PROMPT)


@pytest.mark.parametrize("kv", CASES + PROFILED_AND_INTEGER_CASES, ids=name_of)
def test_prompt_blocks(trained: Trained, kv: KVConfig, tmp_path: Path) -> None:
    """Masks, and given these every byte: codes and scales of exactly the dense rows."""
    if kv.profile:
        kv = replace(kv, profile=trained.profile)
    session = Session(trained.model, kv)
    session.prefill(IDS[:PROMPT])
    dense = dense_rows(trained, kv, tmp_path / "dense")
    queries = trained.queries_under(kv)[:, :, :PROMPT]
    slots = slots_of(trained.model, kv)
    for slot, stored, own in zip(slots, store_of(session, tmp_path / "state"), dense):
        assert stored.masks.shape[2] == len(ends_of(kv, PROMPT)) > 1
        rankings = trained.ranking(kv, slot.is_key)
        for at in np.ndindex(stored.masks.shape[:3]):
            head, rows, masks = at[:2], own.rows[at], stored.masks[at]
            ranking = None if rankings is None else rankings[head]
            check_masks(kv, slot, masks, rows, dense[0].rows[at], queries[head], at, ranking)
            expected = reference.pack_block(slot, slot.stored(rows), slot.stored(masks))
            np.testing.assert_array_equal(stored.slots[at], expected, err_msg=str(at))


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
                    check_masks(self.kv, slot, store.masks[at], rows, k, queries[head, :end], at)
                    check_rows(store.rows[at], store.masks[at], rows, at)
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
            rows, mask = dense[kind].rows[at], after[kind].masks[at]
            queries = trained.queries[0, head, : next_end(kv)]
            check_masks(kv, slot, mask, rows, dense[0].rows[at], queries, at)
            check_rows(after[kind].rows[at], mask, rows, at)


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
