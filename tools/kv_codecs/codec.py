"""What a codec is: two coders, for keys and for values, and a schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .model import BLOCK, Rope, Schedule


@dataclass(frozen=True)
class Rows:
    """Everything that a coder may look at in one layer.

    x: [kv_heads, T, D], what is to be coded: `k` or `v`. q: [heads, T, D]. All after RoPE.
    A coder must not look at what comes after a block's compression, except through the queries
    of `block_queries`, which are those that had been seen by then.
    """

    layer: int
    is_key: bool
    q: Tensor
    k: Tensor
    v: Tensor
    schedule: Schedule
    rope: Rope

    @property
    def x(self) -> Tensor:
        return self.k if self.is_key else self.v

    def blocks(self, x: Tensor | None = None) -> Tensor:
        """x (default: the rows) cut into whole blocks [kv_heads, blocks, 64, D]."""
        x = self.x if x is None else x
        count, first = self.schedule.blocks(x.shape[1]), self.schedule.sinks
        return x[:, first : first + count * BLOCK].unflatten(1, (count, BLOCK))

    def unblock(self, blocks: Tensor) -> Tensor:
        """The inverse of `blocks`; tokens outside whole blocks stay as they are."""
        count, first = blocks.shape[1], self.schedule.sinks
        out = self.x.clone()
        out[:, first : first + count * BLOCK] = blocks.flatten(1, 2)
        return out

    def block_ends(self) -> list[int]:
        """Tokens cached when each block is coded."""
        schedule, count = self.schedule, self.schedule.blocks(self.k.shape[1])
        first = schedule.sinks + schedule.window
        return [min(first + BLOCK * (b + 1), self.k.shape[1]) for b in range(count)]

    def block_queries(self, least: int = 1) -> list[Tensor]:
        """For each block the newest max(window, least) queries [kv_heads, group, n, D]."""
        grouped = self.q.unflatten(0, (self.k.shape[0], -1))
        size = max(self.schedule.window, least)
        return [grouped[:, :, max(0, end - size) : end] for end in self.block_ends()]


class Coder:
    """Codes rows and decodes them again. `bits`: stored per token and KV head, all included."""

    bits: float = 0.0

    def __call__(self, rows: Rows) -> Tensor:
        """The rows as they come back, [kv_heads, T, D]."""
        raise NotImplementedError

    def start(self) -> None:
        """Called before a text is scored, by coders whose bits are measured on it."""


class Exact(Coder):
    """Rows as they are, 2 bytes a value."""

    def __init__(self, dim: int) -> None:
        self.bits = 16.0 * dim

    def __call__(self, rows: Rows) -> Tensor:
        return rows.x


@dataclass
class Codec:
    """A named method with its settings.

    name: unique; also the row's name. family: heading of the table.
    """

    name: str
    family: str
    key: Coder
    value: Coder
    schedule: Schedule = field(default_factory=Schedule)
    note: str = ""

    def encode(
        self, layer: int, k: Tensor, v: Tensor, q: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """(k', v'): keys and values [kv_heads, T, D] as attention will read them once coded."""
        key = Rows(layer, True, q, k, v, self.schedule, rope)
        value = Rows(layer, False, q, k, v, self.schedule, rope)
        return self.key(key), self.value(value)

    def visible(self, layer: int, k: Tensor, v: Tensor, q: Tensor) -> Tensor | None:
        """Coded tokens that still exist: bool [spans, kv_heads, T], or None for all of them."""
        return None

    def start(self) -> None:
        """Called before a text is scored."""
        self.key.start()
        self.value.start()

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one coded token of one KV head, K and V, averaged over layers and heads."""
        return (self.key.bits + self.value.bits) / 8

    def share(self, dim: int) -> float:
        """Coded bytes as a fraction of 2-byte dense keys and values."""
        return self.bytes_per_token / (4 * dim)

    def share_at(self, tokens: int, dim: int) -> float:
        """The same for a whole cache of that many tokens: dense sinks and tail included."""
        coded = self.schedule.coded(tokens)
        return (coded * self.share(dim) + tokens - coded) / tokens


def accumulated_attention(rows: Rows, upto: list[int]) -> Tensor:
    """Attention that every token got from the queries before each end, summed over the group.

    Exact keys are used, and all tokens are present. Returns [len(upto), kv_heads, T].
    """
    kv_heads, tokens, dim = rows.k.shape
    q = rows.q.unflatten(0, (kv_heads, -1))
    sums, total, first = [], torch.zeros(kv_heads, tokens), 0
    for end in upto:
        scores = q[:, :, first:end].flatten(1, 2) @ rows.k[:, :end].transpose(1, 2) * dim**-0.5
        scores = scores.view(kv_heads, -1, end - first, end)
        future = torch.arange(end) > torch.arange(first, end)[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        total = total.clone()
        total[:, :end] += weights.sum((1, 2))
        sums.append(total)
        first = end
    return torch.stack(sums)
