"""The Llama architecture in PyTorch: initial weights and the forward pass."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import Settings

Weights = dict[str, Tensor]  # by Hugging Face's names, less the closing ".weight"


def initial_weights(s: Settings) -> Weights:
    """Normal matrices, narrower where they add to the residual stream, and norms of one."""
    q, kv, ff = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim, s.ff_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, s.dim), "self_attn.k_proj": (kv, s.dim),
        "self_attn.v_proj": (kv, s.dim), "self_attn.o_proj": (s.dim, q),
        "mlp.gate_proj": (ff, s.dim), "mlp.up_proj": (ff, s.dim), "mlp.down_proj": (s.dim, ff),
        "input_layernorm": (s.dim,), "post_attention_layernorm": (s.dim,),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{k}": v for i in range(s.n_layers) for k, v in layer.items()}
    shapes |= {"model.embed_tokens": (s.vocab_size, s.dim), "model.norm": (s.dim,)}
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    for name, weight in weights.items():
        if weight.dim() == 2:
            residual = name.endswith(("o_proj", "down_proj"))
            weight.normal_(std=0.02 / math.sqrt(2 * s.n_layers) if residual else 0.02)
        weight.requires_grad_()
    return weights


def forward(s: Settings, weights: Weights, ids: Tensor) -> Tensor:
    """Logits (batch, length, vocab) of token ids (batch, length)."""
    batch, length = ids.shape
    rates = s.rope_theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
    angles = torch.arange(length).float()[:, None] * torch.cat((rates, rates))
    cos, sin = angles.cos(), angles.sin()  # (length, head_dim)

    def heads(x: Tensor, name: str) -> Tensor:  # -> (batch, heads, length, head_dim)
        return F.linear(x, weights[name]).view(batch, length, -1, s.head_dim).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (s.dim,), weights[name], s.norm_eps)

    x = F.embedding(ids, weights["model.embed_tokens"])
    group = s.n_heads // s.n_kv_heads
    for i in range(s.n_layers):
        layer = f"model.layers.{i}."
        y = norm(x, layer + "input_layernorm")
        q = rotate(heads(y, layer + "self_attn.q_proj"))
        k = rotate(heads(y, layer + "self_attn.k_proj")).repeat_interleave(group, 1)
        v = heads(y, layer + "self_attn.v_proj").repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + F.linear(y.reshape(batch, length, -1), weights[layer + "self_attn.o_proj"])
        y = norm(x, layer + "post_attention_layernorm")
        gate = F.silu(F.linear(y, weights[layer + "mlp.gate_proj"]))
        y = gate * F.linear(y, weights[layer + "mlp.up_proj"])
        x = x + F.linear(y, weights[layer + "mlp.down_proj"])
    return F.linear(norm(x, "model.norm"), weights["model.embed_tokens"])
