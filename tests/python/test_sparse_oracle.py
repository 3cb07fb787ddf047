"""The whole model against transformers in f32 with an attention that prunes on the format's schedule.

The oracle is teacher-forced: query i of a decode step sees the keys and values that would have been
compressed by then in pruned form, everything else dense. Rounding may break near-ties at the cut
either way, so the runtime's own masks are read from a state file, each is checked to be a valid
choice of the oracle's row within 1e-4, and the oracle then uses the same masks.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Session

oracle = pytest.importorskip("oracle")
torch = pytest.importorskip("torch")

PROMPT, STEPS = 40, 300


def keep_of(head_dim: int, is_key: bool, sparsity: float, pattern: str) -> tuple[int, int]:
    """Group size and kept values per group, f32 values."""
    group = head_dim
    if pattern == "group" and head_dim % 16 == 0:
        group = 32 if is_key and head_dim % 128 == 0 else 16
    return group, min(group, max(1, int(np.ceil(group * (1 - sparsity) - 1e-9))))


def dealt(dim: int, group: int) -> np.ndarray:
    """The dim at each stored index: group 0 is dims 0, n, 2n, ... of n groups, and so on."""
    return np.concatenate([np.arange(first, dim, dim // group) for first in range(dim // group)])


def compressed(n: int, kv: KVConfig) -> int:
    return 64 * (max(0, n - kv.sink_tokens - kv.window) // 64)


def masks_of(session: Session, kv: KVConfig, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Kept positions [layers, kv_heads, tokens, head_dim] of keys and values, from a state file."""
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
    layers, heads, dim = config["n_layers"], config["n_kv_heads"], config["head_dim"]
    words = (dim + 31) // 32
    slots = []
    for is_key, sparsity in ((True, kv.sparsity), (False, kv.sparsity)):
        group, keep = keep_of(dim, is_key, sparsity, kv.pattern)
        payload = 64 * (4 * words + 4 * keep * (dim // group))
        slots.append((payload + 127) // 128 * 128)
    out = []
    for which in range(2):
        masks = np.zeros((layers, heads, len(pages) * 64, dim), bool)
        for p, page in enumerate(pages):
            for layer in range(layers):
                for head in range(heads):
                    start = (layer * heads + head) * sum(slots) + which * slots[0]
                    bits = np.unpackbits(page[start : start + 256 * words], bitorder="little")
                    rows = bits.reshape(64, 32 * words)[:, :dim].astype(bool)
                    group, _ = keep_of(dim, which == 0, kv.sparsity, kv.pattern)
                    order = dealt(dim, group)
                    masks[layer, head, p * 64 : p * 64 + 64, order] = rows.T
        out.append(masks)
    return out[0], out[1]


@dataclass
class Schedule:
    """What the oracle's attention needs to know."""

    kv: KVConfig
    masks: tuple[np.ndarray, np.ndarray]
    prompt: int

    def check(self, rows: np.ndarray, masks: np.ndarray, is_key: bool) -> None:
        """Every mask keeps as many as it should, and nothing smaller than what it drops."""
        dim = rows.shape[-1]
        group, keep = keep_of(dim, is_key, self.kv.sparsity, self.kv.pattern)
        order = dealt(dim, group)
        x = np.abs(rows)[..., order].reshape(-1, group)
        m = masks[..., order].reshape(-1, group)
        assert (m.sum(-1) == keep).all()
        smallest_kept = np.where(m, x, np.inf).min(-1)
        largest_dropped = np.where(m, -np.inf, x).max(-1)
        assert (smallest_kept >= largest_dropped * (1 - 1e-4) - 1e-7).all()

    def attention(
        self, module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float, **_: Any
    ) -> tuple[Any, None]:
        heads, n = query.shape[1], query.shape[2]
        groups = heads // key.shape[1]
        sinks = self.kv.sink_tokens
        pruned = []
        for x, masks, is_key in ((key, self.masks[0], True), (value, self.masks[1], False)):
            kept = masks[module.layer_idx]
            stored = kept.shape[1]
            rows = x[0, :, sinks : sinks + stored].numpy()
            if self.kv.sparsity > 0:
                self.check(rows, kept, is_key)
                out = x.clone()
                out[0, :, sinks : sinks + stored] = torch.from_numpy(np.where(kept, rows, 0))
            else:
                out = x
            pruned.append(out)
        is_old = torch.zeros(n, n, dtype=torch.bool)  # [query, key]: seen in pruned form
        for i in range(self.prompt, n):
            is_old[i, sinks : sinks + compressed(i, self.kv)] = True
        causal = torch.ones(n, n, dtype=torch.bool).tril()

        def expand(x: Any) -> Any:
            return x.repeat_interleave(groups, dim=1)

        dense_scores = query @ expand(key).transpose(-1, -2)
        pruned_scores = query @ expand(pruned[0]).transpose(-1, -2)
        scores = torch.where(is_old, pruned_scores, dense_scores) * scaling
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        old = weights * is_old
        out = old @ expand(pruned[1]) + (weights - old) @ expand(value)
        return out.transpose(1, 2), None


def compare(folder: Path, kv: KVConfig, tmp_path: Path, drop: bool = False) -> float:
    """Largest difference of logits over the decode steps."""
    from transformers import AttentionInterface

    reference = oracle.load(folder)
    vocab = reference.config.vocab_size
    ids = [int(x) for x in np.random.default_rng(3).integers(3, vocab, PROMPT + STEPS)]
    ours = []
    with mustafar.Model(folder, device="cpu", dtype="f32") as model:
        session = Session(model, kv)
        session.prefill(ids[:PROMPT])
        for token in ids[PROMPT:]:
            ours.append(session.decode(token))
        no_masks = np.zeros((model.config["n_layers"], model.config["n_kv_heads"], 0, 1), bool)
        masks = (
            masks_of(session, kv, tmp_path / "state") if kv.sparsity > 0 else (no_masks, no_masks)
        )
    schedule = Schedule(kv, masks, PROMPT)
    if drop:  # a planted fault: one kept value of one key
        layer, head, token, dim = np.argwhere(masks[0])[len(np.argwhere(masks[0])) // 2]
        masks[0][layer, head, token, dim] = False
        schedule.check = lambda *_: None  # type: ignore[method-assign]
    AttentionInterface.register("pruned", schedule.attention)
    reference.set_attn_implementation("pruned")
    expected = oracle.logits(reference, ids)[PROMPT:]
    return float(np.abs(np.array(ours) - expected).max())


CASES = [
    KVConfig(sparsity=sparsity, pattern=pattern, window=window, sink_tokens=sinks,
             value_dtype="f32")
    for sparsity, pattern, window, sinks in [
        (0.0, "group", 32, 0),
        (0.0, "group", 0, 4),
        (0.5, "group", 0, 0),
        (0.5, "group", 32, 4),
        (0.5, "row", 32, 0),
        (0.5, "row", 128, 4),
        (0.7, "group", 32, 0),
        (0.7, "group", 128, 4),
        (0.7, "row", 0, 4),
        (0.7, "row", 32, 0),
        (0.9, "group", 0, 4),
        (0.9, "group", 32, 0),
        (0.9, "row", 32, 4),
        (0.9, "row", 128, 0),
    ]
]  # fmt: skip


def name_of(kv: KVConfig) -> str:
    return f"{kv.sparsity}-{kv.pattern}-w{kv.window}-s{kv.sink_tokens}"


@pytest.mark.parametrize("kv", CASES, ids=name_of)
def test_logits_match(trained: Path, kv: KVConfig, tmp_path: Path) -> None:
    assert compare(trained, kv, tmp_path) <= 1e-4


def test_one_dropped_value_is_noticed(story: Path, tmp_path: Path) -> None:
    kv = KVConfig(sparsity=0.5, window=0, value_dtype="f32")
    assert compare(story, kv, tmp_path, drop=True) > 1e-4
