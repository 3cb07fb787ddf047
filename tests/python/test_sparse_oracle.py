"""The whole model against transformers in f32 with an attention that prunes on the format's schedule.

The oracle is teacher-forced: query i of a decode step sees the keys and values that would have been
compressed by then in pruned form, everything else dense. Rounding may break near-ties at the cut
either way, so the runtime's own masks are read from a state file, each is checked to be a valid
choice of the oracle's row within 1e-4, and the oracle then uses the same masks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Session

oracle = pytest.importorskip("support.oracle")
families = pytest.importorskip("support.families")

from support.pruned_attention import Schedule, dealt, keep_of
from support.state_file import pages_of

PROMPT, STEPS = 40, 300


def masks_of(session: Session, kv: KVConfig, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Kept positions [layers, kv_heads, tokens, head_dim] of keys and values, from a state file."""
    pages = pages_of(session, path)
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


@pytest.mark.parametrize("window", [45, 100])
@pytest.mark.parametrize("kv", CASES[3:6], ids=name_of)
def test_logits_match_where_some_layers_have_a_window(
    kv: KVConfig, window: int, tmp_path: Path
) -> None:
    fields = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    folder = families.save_family(tmp_path / "model", "qwen2", **fields)
    assert compare(folder, kv, tmp_path) <= 1e-4


@pytest.mark.parametrize("kv", CASES, ids=name_of)
def test_logits_match(trained: Path, kv: KVConfig, tmp_path: Path) -> None:
    assert compare(trained, kv, tmp_path) <= 1e-4


def test_one_dropped_value_is_noticed(story: Path, tmp_path: Path) -> None:
    kv = KVConfig(sparsity=0.5, window=0, value_dtype="f32")
    assert compare(story, kv, tmp_path, drop=True) > 1e-4
