"""Methods that drop tokens: by age, by accumulated attention, or in heads that need none."""

from __future__ import annotations

import torch
from torch import Tensor

from .calibration import Statistics
from .codec import Codec, Exact, Rows, accumulated_attention
from .model import BLOCK, Llama, Rope, Schedule, coded_attention, dense_attention


class Evicting(Codec):
    """Old tokens are kept exactly or not at all. Kept tokens need no mask: rows are compact."""

    def __init__(
        self, name: str, family: str, dim: int, share: float, schedule: Schedule, note: str = ""
    ) -> None:
        super().__init__(name, family, Exact(dim), Exact(dim), schedule, note)
        self.kept_share = share

    @property
    def bytes_per_token(self) -> float:
        return super().bytes_per_token * self.kept_share

    def _budget(self, layer: int, coded: int, kv_heads: int) -> list[int]:
        """Old tokens that each KV head keeps when `coded` are old."""
        return [round(coded * self.kept_share)] * kv_heads


class Streaming(Evicting):
    """StreamingLLM (arXiv 2309.17453, section 3.2): sinks and the newest tokens.

    Positions are not renumbered. The window grows with the text, so that bytes stay the share.
    """

    def visible(self, layer: int, k: Tensor, v: Tensor, q: Tensor) -> Tensor:
        tokens = k.shape[1]
        spans = self.schedule.spans(tokens)
        seen = torch.zeros(len(spans), len(k), tokens, dtype=torch.bool)
        for index, (_, _, coded) in enumerate(spans):
            for head, kept in enumerate(self._budget(layer, coded, len(k))):
                end = self.schedule.sinks + coded
                seen[index, head, end - kept : end] = True
        return seen


class HeavyHitters(Evicting):
    """H2O (arXiv 2306.14048, section 4): the tokens with most accumulated attention.

    Decided whenever a block leaves the window; what is gone stays gone. Attention is accumulated
    over exact keys of all tokens, which flatters the method a little.
    """

    def visible(self, layer: int, k: Tensor, v: Tensor, q: Tensor) -> Tensor:
        rows = Rows(layer, True, q, k, v, self.schedule, Rope(1.0, 2, 1))
        tokens, first = k.shape[1], self.schedule.sinks
        spans = self.schedule.spans(tokens)
        attention = accumulated_attention(rows, rows.block_ends())
        seen = torch.zeros(len(spans), len(k), tokens, dtype=torch.bool)
        present = torch.zeros(len(k), tokens, dtype=torch.bool)
        for index, (_, _, coded) in enumerate(spans):
            if not coded:
                continue
            present[:, first + coded - BLOCK : first + coded] = True
            score = attention[coded // BLOCK - 1].masked_fill(~present, -1.0)
            present = torch.zeros_like(present)
            for head, kept in enumerate(self._budget(layer, coded, len(k))):
                present[head, score[head].topk(kept).indices] = True
            seen[index] = present
        return seen


class EntropyHeavyHitters(HeavyHitters):
    """UNComp (arXiv 2410.03090, section 3), its cache part: more tokens for heads of high entropy.

    A head's budget is proportional to its rows' effective rank, exp of the entropy of the
    eigenvalues of the keys' second moment, by calibration. Left out: layer groups, the compression
    of hidden states, truncation of the spectrum.
    """

    def __init__(
        self, name: str, family: str, statistics: Statistics, share: float, schedule: Schedule
    ) -> None:
        super().__init__(name, family, statistics.k.shape[-1], share, schedule)
        moment = statistics.k.transpose(-1, -2) @ statistics.k
        energy = torch.linalg.eigvalsh(moment).clamp_min(1e-12)
        energy = energy / energy.sum(-1, keepdim=True)
        rank = (-(energy * energy.log()).sum(-1)).exp()  # [L, kv_heads]
        shares = rank / rank.mean() * share
        for _ in range(20):  # no head keeps more than all of its tokens
            shares = shares.clamp_max(1.0)
            shares = shares * (share / shares.mean())
        self.shares = shares.clamp_max(1.0)
        self.kept_share = self.shares.mean().item()

    def _budget(self, layer: int, coded: int, kv_heads: int) -> list[int]:
        return [round(coded * s) for s in self.shares[layer].tolist()]


class StreamingHeads(Evicting):
    """DuoAttention (arXiv 2410.10819, section 2): some heads keep sinks and window, others all.

    order: (layer, KV head), the least missed first; as many as the share asks become streaming. The
    paper learns a gate per head on synthetic retrieval; here `rank_heads` measures each.
    """

    def __init__(
        self,
        name: str,
        family: str,
        model: Llama,
        order: list[tuple[int, int]],
        share: float,
        schedule: Schedule,
    ) -> None:
        streaming = round(len(order) * (1 - share))
        super().__init__(name, family, model.head_dim, 1 - streaming / len(order), schedule)
        self.streaming = set(order[:streaming])

    def visible(self, layer: int, k: Tensor, v: Tensor, q: Tensor) -> Tensor:
        kept = [(layer, head) not in self.streaming for head in range(len(k))]
        spans = len(self.schedule.spans(k.shape[1]))
        return torch.tensor(kept)[None, :, None].expand(spans, -1, k.shape[1])


def rank_heads(model: Llama, ids: Tensor, schedule: Schedule) -> list[tuple[int, int]]:
    """(layer, KV head) by the KLD that a text loses when that head alone is made streaming."""
    before: list[Tensor] = [model.embed(ids)]
    for layer in range(model.layers):
        before.append(model.layer(layer, before[-1], dense_attention))
    first = schedule.sinks + schedule.window + BLOCK
    base = model.logits(before[-1][first:]).log_softmax(-1)
    losses: dict[tuple[int, int], float] = {}
    spans = len(schedule.spans(len(ids)))
    for layer in range(model.layers):
        for head in range(model.kv_heads):
            kept = (torch.arange(model.kv_heads) != head)[None, :, None]
            visible = kept.expand(spans, -1, len(ids))

            def attention(
                _: int, q: Tensor, k: Tensor, v: Tensor, visible: Tensor = visible
            ) -> Tensor:
                return coded_attention(schedule, q, k, v, k, v, visible)

            hidden = model.layer(layer, before[layer], attention)
            for later in range(layer + 1, model.layers):
                hidden = model.layer(later, hidden, dense_attention)
            got = model.logits(hidden[first:]).log_softmax(-1)
            losses[layer, head] = (base.exp() * (base - got)).sum(-1).mean().item()
    return sorted(losses, key=lambda place: losses[place])
