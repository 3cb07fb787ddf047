"""Other people's codecs of rows and blocks, as their papers describe them, simplified as said.

None of them was checked against its authors' code; all run on blocks of 64 tokens and on 64 dims a
head, where scales and factors weigh more than at the 128 dims of the papers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calibration import Statistics
from .codec import Coder, Rows, accumulated_attention
from .model import BLOCK
from .primitives import affine, bf16, hadamard, top_mask


class Spark(Coder):
    """SparK, arXiv 2508.15212, sections 3.2 and 3.3: every token keeps its own key channels.

    Saliency k_d^2 * ||q_d|| over the window, the group's queries averaged; pruned entries come back
    as a per-row fill (a bf16 magnitude, the mean |k| of what was pruned; the sign is the mean sign
    of the channel in the block, a bit each). Values: |v|, filled with the pruned entries' mean. The
    paper draws the fill from a distribution; equal counts for all rows, no top-p.
    """

    def __init__(self, dim: int, keep: int, *, fill: bool = True) -> None:
        self.keep, self.fill = keep, fill
        self.bits = dim + keep * 16 + (16 + dim / BLOCK if fill else 0)

    def __call__(self, rows: Rows) -> Tensor:
        x = rows.blocks()
        saliency = x.abs()
        if rows.is_key:
            norms = torch.stack([q.mean(1).norm(dim=1) for q in rows.block_queries()], 1)
            saliency = x.pow(2) * norms[:, :, None]
        mask = top_mask(saliency, self.keep)
        out = bf16(x) * mask
        if self.fill:
            pruned = x * ~mask
            if rows.is_key:
                magnitude = bf16(pruned.abs().sum(-1, keepdim=True) / (x.shape[-1] - self.keep))
                fill = magnitude * pruned.sum(2, keepdim=True).sign()
            else:
                fill = bf16(pruned.sum(-1, keepdim=True) / (x.shape[-1] - self.keep))
            out = torch.where(mask, out, fill)
        return rows.unblock(out)


class Kivi(Coder):
    """KIVI, arXiv 2402.02750, section 3: keys by channel, values by token, both affine.

    Groups of 32 tokens for keys and of 32 dims for values; a bf16 scale and a bf16 zero each.
    """

    def __init__(self, dim: int, bits: int, group: int = 32) -> None:
        self.value_bits, self.group = bits, group
        self.bits = dim * (bits + 32 / group)

    def __call__(self, rows: Rows) -> Tensor:
        x = rows.blocks()
        axis = 2 if rows.is_key else 3
        grouped = x.unflatten(axis, (-1, self.group))
        return rows.unblock(affine(grouped, self.value_bits, axis + 1).flatten(axis, axis + 1))


class Gear(Coder):
    """GEAR, arXiv 2403.05527, section 3: integers + a low-rank residual + sparse outliers.

    Outliers: the share of a block farthest from its vectors' means (bf16 and a 12-bit place each).
    The rest is affine by channel (keys) or token (values) over the block; the residual's best rank
    by SVD, bf16 factors, per block of 64 tokens. The paper's factors span a whole prompt, which
    makes them cheaper: at 64 tokens a rank costs 0.5 bit a value.
    """

    def __init__(self, dim: int, bits: int, rank: int = 4, outliers: float = 0.02) -> None:
        self.value_bits, self.rank = bits, rank
        self.outliers = round(outliers * dim * BLOCK)
        place = (dim * BLOCK - 1).bit_length()
        scales = 32 * dim / BLOCK  # of keys; values have 32 a row, which is no more
        self.bits = (
            dim * bits
            + max(scales, 32)
            + rank * (dim + BLOCK) * 16 / BLOCK
            + self.outliers * (16 + place) / BLOCK
        )

    def __call__(self, rows: Rows) -> Tensor:
        x = rows.blocks()
        axis = 2 if rows.is_key else 3
        mean = x.mean(axis, keepdim=True)
        far = (x - mean).abs().flatten(2)
        mask = top_mask(far, self.outliers).view_as(x)
        base = affine(torch.where(mask, mean, x), self.value_bits, axis)
        u, s, vh = torch.linalg.svd((x - base) * ~mask, full_matrices=False)
        r = self.rank
        low = bf16(u[..., :r] * s[..., None, :r].sqrt()) @ bf16(
            s[..., :r, None].sqrt() * vh[..., :r, :]
        )
        return rows.unblock(torch.where(mask, bf16(x), base + low))


class MixedTokens(Coder):
    """Tokens by importance: a share of every block at `high` bits, the others at `low`.

    balancer "query": MiKV (arXiv 2402.18096, section 3): accumulated attention; keys are divided by
    sqrt(max |k_d| / max |q_d|) first. "channel": ZipCache and ZipVL (arXiv 2405.14256, section 4;
    2410.08584, section 3): attention divided by the number of queries that saw the token; channels
    are divided by sqrt(max |x_d|). Both: affine per token, a bf16 scale and zero, a bit that says
    which, and a bf16 per channel and block. ZipVL's share of tokens follows the attention's mass;
    here it is given.
    """

    def __init__(self, dim: int, share: float, high: int, low: int, balancer: str) -> None:
        self.important = round(share * BLOCK)
        self.high, self.low, self.balancer = high, low, balancer
        high_share = self.important / BLOCK
        self.bits = dim * (high * high_share + low * (1 - high_share)) + 32 + 1 + 16 * dim / BLOCK

    def __call__(self, rows: Rows) -> Tensor:
        x = rows.blocks()
        ends, first = rows.block_ends(), rows.schedule.sinks
        seen = accumulated_attention(rows, ends)  # [blocks, kv_heads, T]
        importance = torch.stack(
            [seen[b, :, first + b * BLOCK : first + (b + 1) * BLOCK] for b in range(len(ends))], 1
        )
        scale = x.abs().amax(2, keepdim=True).clamp_min(1e-6)
        if self.balancer == "channel":
            places = first + torch.arange(len(ends) * BLOCK).view(-1, BLOCK)
            importance = importance / (torch.tensor(ends)[:, None] - places).clamp_min(1)
        elif rows.is_key:
            queries = [q.abs().amax((1, 2)) for q in rows.block_queries()]
            scale = scale / torch.stack(queries, 1)[:, :, None].clamp_min(1e-6)
        else:
            scale = torch.ones_like(scale)
        scale = bf16(scale.sqrt())
        important = top_mask(importance, self.important)[..., None]
        y = torch.where(
            important, affine(x / scale, self.high), affine(x / scale, self.low)
        )  # fmt: skip
        return rows.unblock(y * scale)


class LowRank(Coder):
    """Rows projected on directions of most energy; the coefficients are kept as bf16.

    joint: all KV heads of a layer together, keys before RoPE: CSKV (arXiv 2409.10593, section 3)
    with the calibrated SVD that it starts from and without its fine-tuning. Otherwise by head, each
    with the rank that keeps the same share of its energy: MatryoshkaKV (arXiv 2410.14731, section
    3) before its training, with a threshold in place of its greedy search.
    """

    def __init__(self, statistics: Statistics, is_key: bool, share: float, *, joint: bool) -> None:
        self.joint = joint
        x = (statistics.k_before if joint else statistics.k) if is_key else statistics.v
        if joint:
            x = x.transpose(1, 2).flatten(2)[:, None]  # [L, 1, N, heads * D]
        moment = torch.stack([y.transpose(1, 2) @ y for y in (z.double() for z in x)])
        energy, axes = torch.linalg.eigh(moment)
        energy, axes = energy.flip(-1), axes.flip(-1).float()
        wanted = share * energy.shape[-1]
        if joint:
            kept = (torch.arange(energy.shape[-1]) < round(wanted)).expand_as(energy)
        else:
            lost = 1 - energy.cumsum(-1) / energy.sum(-1, keepdim=True)
            before = torch.cat([torch.ones_like(lost[..., :1]), lost[..., :-1]], -1)
            threshold = before.flatten().sort(descending=True).values[
                round(wanted * before[..., 0].numel()) - 1
            ]  # fmt: skip
            kept = before >= threshold
        self.axes = axes * kept[..., None, :]
        heads = statistics.k.shape[1] if joint else 1
        self.bits = kept.float().sum(-1).mean().item() * 16 / heads

    def __call__(self, rows: Rows) -> Tensor:
        axes, x = self.axes[rows.layer], rows.x
        if not self.joint:
            return bf16(x @ axes) @ axes.transpose(1, 2)
        if rows.is_key:
            x = rows.rope(x, inverse=True)
        flat = x.transpose(0, 1).flatten(1)
        flat = bf16(flat @ axes[0]) @ axes[0].T
        x = flat.unflatten(1, (len(x), -1)).transpose(0, 1)
        return rows.rope(x) if rows.is_key else x


class Kvarn(Coder):
    """KVarN, arXiv 2606.03458, section 4: Hadamard, then variances evened out on both axes.

    Blocks are divided by the standard deviations of their tokens and channels in turns (8 rounds);
    then affine per token, whose bf16 scale takes up the token's, and a bf16 per channel and block.
    """

    def __init__(self, dim: int, bits: int, rounds: int = 8) -> None:
        self.value_bits, self.rounds = bits, rounds
        self.matrix = hadamard(dim).float()
        self.bits = dim * bits + 32 + 16 * dim / BLOCK

    def __call__(self, rows: Rows) -> Tensor:
        x = rows.blocks() @ self.matrix
        token, channel = torch.ones_like(x[..., :1]), torch.ones_like(x[..., :1, :])
        for _ in range(self.rounds):
            channel = (x / token).pow(2).mean(2, keepdim=True).sqrt().clamp_min(1e-6)
            token = (x / channel).pow(2).mean(3, keepdim=True).sqrt().clamp_min(1e-6)
        channel = bf16(channel)
        y = affine(x / channel, self.value_bits) * channel
        return rows.unblock(y @ self.matrix.T)


def oscar_clips() -> tuple[float, ...]:
    """Fractions of a row's range that OSCAR's code tries.

    OSCAR, arXiv 2605.17757, section 3: `make_basis(kind="oscar")` with `product.Affine` at 2 bits.
    The paper calibrates clip thresholds once; here the best of these is taken row by row. Its
    permutation deals dims over groups; with one group of 64 dims it changes nothing.
    """
    return (1.0, 0.9, 0.8, 0.7, 0.6)
