"""The KV transform of a profile, derived with numpy in float64: what the native one must equal."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class Transform(NamedTuple):
    """Of all heads, [layers, kv_heads, D, D] or [layers, kv_heads, D]."""

    forward: Matrix
    backward: Matrix
    weight: Matrix
    sigma: Matrix
    metric: Matrix  # M^a of basis(): B M^-a B^T = 1 before scaling


def transforms(moments: Matrix, metrics: Matrix, balance: float, scale_power: float) -> Transform:
    """moments: mean outer products; metrics: of what they meet; [layers, kv_heads, D, D]."""
    forward, backward, powers = (
        np.empty_like(moments),
        np.empty_like(moments),
        np.empty_like(moments),
    )
    weight, sigma = np.ones(moments.shape[:-1]), np.ones(moments.shape[:-1])
    for at in np.ndindex(*moments.shape[:2]):
        f, b, powers[at] = basis(moments[at], metrics[at], balance)
        rms = np.sqrt(np.maximum(np.einsum("ij,ik,kj->j", f, moments[at], f), 0))
        if scale_power > 0:
            weight[at] = np.maximum(rms, 1e-3 * rms.max() + 1e-30) ** scale_power
        forward[at], backward[at] = f / weight[at], weight[at][:, None] * b
        sigma[at] = rms / weight[at]
    return Transform(forward, backward, weight, sigma, powers)


def basis(moment: Matrix, metric: Matrix, balance: float) -> tuple[Matrix, Matrix, Matrix]:
    """F and B with F B = I, columns of F by falling energy, and M^a."""
    dim = moment.shape[0]
    root = inverse = power = np.eye(dim)
    if balance > 0 and np.trace(metric) > 0:
        strength, axes = np.linalg.eigh(metric / (np.trace(metric) / dim))
        strength = np.maximum(strength, 1e-4 * strength.max())
        root = (axes * strength ** (balance / 2)) @ axes.T
        inverse = (axes * strength ** (-balance / 2)) @ axes.T
        power = (axes * strength**balance) @ axes.T
    _, vectors = np.linalg.eigh(root @ moment @ root)
    vectors = vectors[:, ::-1]
    return root @ vectors, vectors.T @ inverse, power
