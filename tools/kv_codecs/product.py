"""The runtime's own codecs: magnitude sparsity, channel policies, integers, all in any basis.

Bytes follow docs of the block format: a bit of mask per value, bf16 scales, and for channel
policies 66 bytes of row offsets per 32 tokens (132 per block).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calibration import Basis
from .codec import Coder, Rows
from .model import BLOCK
from .primitives import affine, bf16, group_mask, half_steps, symmetric, top_mask

_ROW_OFFSETS = 132 * 8 / BLOCK  # bits per row of a ragged block


class InBasis(Coder):
    """A coder of single rows, run in another basis."""

    def __init__(self, basis: Basis) -> None:
        self.basis = basis
        self.dim = basis.forward.shape[-1]

    def __call__(self, rows: Rows) -> Tensor:
        basis, layer, x = self.basis, rows.layer, rows.x
        heads, _, dim = x.shape
        if basis.before_rope:
            x = rows.rope(x, inverse=True)
        if basis.joint:
            x = x.transpose(0, 1).flatten(1)[None]
        y = self.code((x - basis.mean[layer]) @ basis.forward[layer], basis.sigma[layer], rows)
        x = y @ basis.backward[layer] + basis.mean[layer]
        if basis.joint:
            x = x[0].unflatten(1, (heads, dim)).transpose(0, 1)
        return rows.rope(x) if basis.before_rope else x

    def code(self, y: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        """y [kv_heads, T, D] and its rms by dim [kv_heads, 1, D] -> y as decoded."""
        raise NotImplementedError


class Pruned(InBasis):
    """The largest `keep` of every group, as bf16, or as integers of `value_bits` with one scale.

    power: values are divided by sigma^power before they are quantised, ranking undone.
    MUSTAFAR (arXiv 2505.22913, section 3) with group = row.
    """

    def __init__(
        self,
        basis: Basis,
        group: int | None,
        keep: int,
        value_bits: int = 16,
        *,
        power: float = 0.0,
        search: bool = False,
        dealt: bool = True,
    ) -> None:
        super().__init__(basis)
        self.group, self.keep, self.value_bits = group or self.dim, keep, value_bits
        self.power, self.search, self.dealt = power, search, dealt
        kept = self.dim // self.group * keep
        self.bits = self.dim + kept * value_bits + (0 if value_bits == 16 else 16)

    def code(self, y: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        mask = group_mask(y.abs(), self.group, self.keep, dealt=self.dealt)
        if self.value_bits == 16:
            return bf16(y) * mask
        scale = sigma**self.power
        return symmetric(y / scale * mask, self.value_bits, search=self.search) * scale


class Integers(InBasis):
    """All values as integers with one bf16 scale a row; `half`: levels at half steps."""

    def __init__(
        self, basis: Basis, value_bits: int, *, search: bool = False, half: bool = False
    ) -> None:
        super().__init__(basis)
        self.value_bits, self.search, self.half = value_bits, search, half
        self.bits = self.dim * value_bits + 16

    def code(self, y: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        if self.half:
            return half_steps(y, self.value_bits)
        return symmetric(y, self.value_bits, search=self.search)


class Affine(InBasis):
    """All values as integers between the row's least and largest: a scale and a zero."""

    def __init__(self, basis: Basis, value_bits: int, clips: tuple[float, ...] = (1.0,)) -> None:
        super().__init__(basis)
        self.value_bits, self.clips = value_bits, clips
        self.bits = self.dim * value_bits + 32

    def code(self, y: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        return affine(y, self.value_bits, clips=self.clips)


class OutputAwareRow(Coder):
    """Keys: the largest |k| * sum of the window's |q| in every row (MUSTAFAR, section 3.1)."""

    def __init__(self, dim: int, keep: int) -> None:
        self.keep, self.bits = keep, dim + keep * 16

    def __call__(self, rows: Rows) -> Tensor:
        weighted = rows.blocks().abs() * _query_weight(rows)[:, :, None]
        return rows.unblock(bf16(rows.blocks()) * top_mask(weighted, self.keep))


class Channel(Coder):
    """The largest |x| of every channel over a block's 64 tokens (MUSTAFAR, per channel)."""

    def __init__(self, dim: int, keep_tokens: int, *, output_aware: bool = False) -> None:
        self.keep, self.output_aware = keep_tokens, output_aware
        self.bits = dim + dim * keep_tokens * 16 / BLOCK + _ROW_OFFSETS

    def __call__(self, rows: Rows) -> Tensor:
        x = rows.blocks()  # [kv_heads, blocks, 64, D]
        weight = x.abs()
        if self.output_aware and rows.is_key:  # the whole block competes
            weight = weight * _query_weight(rows)[:, :, None]
            mask = top_mask(weight.flatten(2), x.shape[-1] * self.keep).view_as(x)
            return rows.unblock(bf16(x) * mask)
        if self.output_aware:
            keys = rows.blocks(rows.k).abs() * _query_weight(rows)[:, :, None]
            weight = weight * keys.sum(-1, keepdim=True)
        mask = top_mask(weight.transpose(-1, -2), self.keep).transpose(-1, -2)
        return rows.unblock(bf16(x) * mask)


class ThinK(Coder):
    """Keys: whole channels of a block, by l2 norm times the window's |q|.

    ThinK (arXiv 2407.21018, section 3); its greedy score ||q_d k_d||_F as the product of norms, one
    mask a block (64 bits at 64 dims).
    """

    def __init__(self, dim: int, keep: int) -> None:
        self.keep, self.bits = keep, keep * 16 + dim / BLOCK

    def __call__(self, rows: Rows) -> Tensor:
        x = rows.blocks()
        channels = top_mask(x.pow(2).sum(2).sqrt() * _query_weight(rows), self.keep)
        return rows.unblock(bf16(x) * channels[:, :, None])


def _query_weight(rows: Rows) -> Tensor:
    """Sums of the |q| that each block's compression sees: [kv_heads, blocks, D]."""
    return torch.stack([q.abs().sum((1, 2)) for q in rows.block_queries()], 1)
