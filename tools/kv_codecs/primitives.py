"""Masks and scalar quantisers. The last axis is what shares a scale, if nothing else is said."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-9


def bf16(x: Tensor) -> Tensor:
    """Rounded to bfloat16, as float32."""
    return x.bfloat16().float()


def hadamard(dim: int) -> Tensor:
    """Orthonormal Sylvester matrix [dim, dim]; dim is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    if matrix.shape[0] != dim:
        raise ValueError(f"a Hadamard matrix of {dim} dims: must be a power of two")
    return matrix / dim**0.5


def top_mask(weight: Tensor, keep: int) -> Tensor:
    """The `keep` largest of the last axis; ties keep the lower index."""
    order = weight.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, order, True)


def group_mask(weight: Tensor, group: int, keep: int, *, dealt: bool = True) -> Tensor:
    """The `keep` largest of every group of `group` dims, dealt round the row or neighbours."""
    groups = weight.shape[-1] // group
    if not dealt:
        return top_mask(weight.unflatten(-1, (groups, group)), keep).flatten(-2)
    grouped = weight.unflatten(-1, (group, groups)).transpose(-1, -2)
    return top_mask(grouped, keep).transpose(-1, -2).flatten(-2)


def symmetric(x: Tensor, bits: int, *, search: bool = False) -> Tensor:
    """Codes +-(2^(bits-1) - 1) with one bf16 scale: from absmax, or the best of six (search)."""
    most = 2 ** (bits - 1) - 1
    absmax = x.abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    best, least = x, torch.full_like(absmax, torch.inf)
    for factor in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5) if search else (1.0,):
        scale = bf16(absmax * factor / most)
        y = (x / scale).round().clamp(-most, most) * scale
        best, least = _better(x, y, best, least)
    return best


def half_steps(x: Tensor, bits: int) -> Tensor:
    """2^bits levels at odd half steps (no zero), one bf16 scale, the best of six."""
    half = 2 ** (bits - 1)
    absmax = x.abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    best, least = x, torch.full_like(absmax, torch.inf)
    for factor in (1.0, 0.85, 0.7, 0.6, 0.5, 0.4):
        scale = bf16(absmax * factor / half)
        y = ((x / scale).floor().clamp(-half, half - 1) + 0.5) * scale
        best, least = _better(x, y, best, least)
    return best


def affine(x: Tensor, bits: int, axis: int = -1, *, clips: tuple[float, ...] = (1.0,)) -> Tensor:
    """2^bits levels from the least to the largest along `axis`: a bf16 scale and a bf16 zero.

    clips: fractions of the range that are tried; the one of least squares is taken.
    """
    x = x.movedim(axis, -1)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    best, least = x, torch.full_like(low, torch.inf)
    middle, spread = (low + high) / 2, (high - low) / 2
    for clip in clips:
        zero = bf16(middle - clip * spread)
        scale = bf16((2 * clip * spread / (2**bits - 1)).clamp_min(_LEAST))
        y = ((x - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero
        best, least = _better(x, y, best, least)
    return best.movedim(-1, axis)


def _better(x: Tensor, y: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    error = (y - x).pow(2).sum(-1, keepdim=True)
    return torch.where(error < least, y, best), torch.minimum(error, least)
