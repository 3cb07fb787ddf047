"""A budget of bytes dealt over layers, keys and values, to where errors cost most."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .coded import CODED_ERROR, MAX_WIDTH, coded_row_bytes, deal_widths
from .numbers import F32


def row_errors(sigma: F32) -> list[float]:
    """Square error expected of rows of 4, 8, ... bytes, summed over dims and KV heads.

    sigma: float32 [n_kv_heads, head_dim].
    """
    errors = []
    for row_bytes in range(4, coded_row_bytes(sigma.shape[1], MAX_WIDTH) + 1, 4):
        of_heads = 0.0
        for head in sigma:
            of_dims = 0.0
            for s, width in zip(head, deal_widths(head, row_bytes), strict=True):
                of_dims += float(s) * float(s) * CODED_ERROR[width]
            of_heads += of_dims
        errors.append(of_heads)
    return errors


def deal_rows(
    sigma: F32,
    cost: F32,
    budget_bytes_per_token: float | None = None,
    max_kld: float | None = None,
) -> tuple[NDArray[np.int32], float]:
    """Bytes of a row, int32 [2 (K, V), n_layers], and the divergence in nats that they predict.

    One 4-byte word at a time goes to the layer and kind whose predicted divergence (cost times
    square error) it lowers most; of equals, to the first layer, keys before values. It ends before
    the bytes of a token in all layers, scales included, exceed budget_bytes_per_token, or as soon
    as no more than max_kld is predicted; one of them is given.

    sigma: float32 [2, n_layers, n_kv_heads, head_dim], scaling undone; cost: float32
    [2, n_layers].
    """
    _, layers, heads, _ = sigma.shape
    order = [(layer, kind) for layer in range(layers) for kind in (0, 1)]
    errors = {(layer, kind): row_errors(sigma[kind, layer]) for layer, kind in order}
    words = dict.fromkeys(order, 1)

    def predicted(at: tuple[int, int], n: int) -> float:
        return float(cost[at[1], at[0]]) * errors[at][n - 1]

    def gain(at: tuple[int, int]) -> float:
        n = words[at]
        return -1.0 if n == len(errors[at]) else predicted(at, n) - predicted(at, n + 1)

    def total() -> float:
        out = 0.0
        for at in order:
            out += predicted(at, words[at])
        return out

    gains = {at: gain(at) for at in order}
    used = heads * len(order) * (4 + 2)
    while True:
        if budget_bytes_per_token is not None and used + 4 * heads > budget_bytes_per_token:
            break
        if max_kld is not None and total() <= max_kld:
            break
        best = max(order, key=lambda at: gains[at])  # the first of equals
        if gains[best] < 0:
            break
        words[best] += 1
        gains[best] = gain(best)
        used += 4 * heads
    rows = [[4 * words[layer, kind] for layer in range(layers)] for kind in (0, 1)]
    return np.array(rows, np.int32), total()
