"""Attention that prunes on the format's schedule, for the oracle: see test_sparse_oracle.py.

Written from the format alone, apart from `mustafar.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mustafar import KVConfig


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
        if getattr(module, "sliding_window", None):
            causal = causal.triu(1 - module.sliding_window)

        def expand(x: Any) -> Any:
            return x.repeat_interleave(groups, dim=1)

        dense_scores = query @ expand(key).transpose(-1, -2)
        pruned_scores = query @ expand(pruned[0]).transpose(-1, -2)
        scores = torch.where(is_old, pruned_scores, dense_scores) * scaling
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        old = weights * is_old
        out = old @ expand(pruned[1]) + (weights - old) @ expand(value)
        return out.transpose(1, 2), None
