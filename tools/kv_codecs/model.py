"""A Llama of the Hugging Face layout, with the attention of every layer left to the caller."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

BLOCK = 64  # tokens that are coded together

# (layer, q [heads, T, D], k [kv_heads, T, D], v [kv_heads, T, D]) -> outputs [heads, T, D]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Which tokens are coded when: the rule of the runtime's cache.

    Query i sees positions sinks .. sinks + coded(i) - 1 coded, all others up to itself exact.
    """

    sinks: int = 4
    window: int = 32

    def coded(self, position: int) -> int:
        """Tokens that are coded when the token at `position` is decoded."""
        return BLOCK * max(0, (position - self.sinks - self.window) // BLOCK)

    def blocks(self, tokens: int) -> int:
        """Whole blocks among `tokens` tokens, coded or about to be."""
        return max(0, tokens - self.sinks) // BLOCK

    def spans(self, tokens: int) -> list[tuple[int, int, int]]:
        """(first query, end, coded tokens) of runs of queries that see equally many coded."""
        end = min(tokens, self.sinks + self.window + BLOCK)
        spans = [(0, end, 0)]
        while end < tokens:
            first, end = end, min(tokens, end + BLOCK)
            spans.append((first, end, self.coded(first)))
        return spans


class Rope:
    """Rotary positions, halves paired as in Hugging Face checkpoints."""

    def __init__(self, theta: float, head_dim: int, length: int = 16384) -> None:
        frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        self.cos, self.sin = angle.cos().float(), angle.sin().float()  # [length, D / 2]

    def __call__(self, x: Tensor, first: int = 0, *, inverse: bool = False) -> Tensor:
        """x [..., T, D] turned by its positions first .. first + T - 1, or turned back."""
        end = first + x.shape[-2]
        cos, sin = self.cos[first:end], self.sin[first:end]
        if inverse:
            sin = -sin
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Llama:
    """One forward pass over a whole sequence, batch of one, weights in float32."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = json.loads((folder / "config.json").read_text())
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if config.get("model_type") != "llama" or kind != "default":
            raise ValueError(
                f"{folder}: model_type {config.get('model_type')!r} with RoPE of type {kind!r};"
                " the lab knows plain Llama alone"
            )
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads", self.heads)
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.heads
        self.epsilon: float = config["rms_norm_eps"]
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        self.rope = Rope(theta, self.head_dim)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """All tensors by name, float32, read when they are first needed."""
        weights: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if not path.name.startswith("kv_profile"):
                weights |= {name: w.float() for name, w in load_file(path).items()}
        return weights

    @property
    def head(self) -> Tensor:
        """The output matrix [vocab, hidden], the embedding's own where it is tied."""
        return self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])

    def weight(self, layer: int, name: str) -> Tensor:
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] -> hidden states [T, hidden]."""
        return F.embedding(ids, self.weights["model.embed_tokens.weight"])

    def layer(self, index: int, hidden: Tensor, attention: Attention, first: int = 0) -> Tensor:
        """Hidden states before layer `index` [T, hidden], from position `first` on -> those after
        it."""
        x = self._norm(hidden, self.weight(index, "input_layernorm"))
        q, k, v = (
            F.linear(x, self.weight(index, f"self_attn.{name}_proj"))
            .view(-1, heads, self.head_dim)
            .transpose(0, 1)
            for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        o = attention(index, self.rope(q, first), self.rope(k, first), v)
        o = o.transpose(0, 1).reshape(len(x), -1)
        hidden = hidden + F.linear(o, self.weight(index, "self_attn.o_proj"))
        x = self._norm(hidden, self.weight(index, "post_attention_layernorm"))
        gate = F.silu(F.linear(x, self.weight(index, "mlp.gate_proj")))
        up = F.linear(x, self.weight(index, "mlp.up_proj"))
        return hidden + F.linear(gate * up, self.weight(index, "mlp.down_proj"))

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self._norm(hidden, self.weights["model.norm.weight"]), self.head)

    def forward(self, ids: Tensor, attention: Attention, first_scored: int = 0) -> Tensor:
        """Log-probabilities [T - first_scored, vocab] of the token after each of ids [T]."""
        hidden = self.embed(ids)
        for index in range(self.layers):
            hidden = self.layer(index, hidden, attention)
        return self.logits(hidden[first_scored:]).log_softmax(-1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.epsilon).rsqrt() * weight


def dense_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention, the runtime's own order of queries: spans of the schedule."""
    return coded_attention(Schedule(), q, k, v, k, v)


def coded_attention(
    schedule: Schedule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coded_k: Tensor,
    coded_v: Tensor,
    visible: Tensor | None = None,
) -> Tensor:
    """Attention where old tokens are read as the codec left them, one softmax over all.

    q: [heads, T, D]; k, v, coded_k, coded_v: [kv_heads, T, D].
    visible: bool [spans, kv_heads, T]: coded tokens that are still there; None: all.
    Returns [heads, T, D].
    """
    kv_heads, tokens, dim = k.shape
    queries = q.reshape(kv_heads, -1, tokens, dim) * dim**-0.5
    outputs = []
    for index, (first, end, coded) in enumerate(schedule.spans(tokens)):
        start, stop = schedule.sinks, schedule.sinks + coded
        keys = torch.cat([k[:, :start], coded_k[:, start:stop], k[:, stop:end]], 1)
        values = torch.cat([v[:, :start], coded_v[:, start:stop], v[:, stop:end]], 1)
        rows = queries[:, :, first:end]  # [kv_heads, group, n, D]
        n = end - first
        scores = (rows.reshape(kv_heads, -1, dim) @ keys.transpose(1, 2)).view(*rows.shape[:3], end)
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores[..., first:].masked_fill_(future, -torch.inf)
        if visible is not None:
            gone = ~visible[index, :, start:stop]
            scores[..., start:stop].masked_fill_(gone[:, None, None], -torch.inf)
        weights = scores.softmax(-1).view(kv_heads, -1, end)
        outputs.append((weights @ values).view(*rows.shape))
    return torch.cat(outputs, 2).reshape(q.shape)
