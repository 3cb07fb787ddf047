"""Calibrates a KV transform: a basis per layer and KV head in which pruning costs less.

Pruning by magnitude is a dead-zone quantiser with a significance map, so, like every transform
coder, it wants a basis that concentrates energy. With row vectors and F B = I:

- ``klt``: F is the eigenvectors of E[k^T k], largest first; B = F^T.
- ``balanced``: the error is measured in the metric M of what the vectors meet: for keys
  M = E[q^T q] over the group's queries, for values M = sum of W_o,h^T W_o,h. F = M^(a/2) U with U
  the eigenvectors of M^(a/2) E[k^T k] M^(a/2), and B = U^T M^(-a/2).

Columns are dealt round over the pruning groups, so that each gets its share of the energy.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._core import Profile
from .model import Model, Prompt

Kind = Literal["hadamard", "klt", "balanced"]
Matrix = NDArray[np.float64]

# Directions of the metric weaker than this fraction of the strongest count as that strong.
_METRIC_FLOOR = 1e-4


def calibrate(
    model: Model,
    texts: Sequence[Prompt],
    kind: Kind = "balanced",
    *,
    balance: float = 1.0,
    scale_power: float = 0.0,
    max_tokens: int | None = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Gathers statistics over texts and makes a profile from them.

    Args:
        model: On the CPU. The profile fits this model alone (by its fingerprint).
        texts: Texts or id sequences; longer ones are cut into pieces of the model's context.
        kind: ``"hadamard"`` (no calibration; texts are not looked at), ``"klt"`` or ``"balanced"``.
        balance: Exponent a in [0, 1] of the metric; 0 makes ``balanced`` the same as ``klt``.
        scale_power: Power p >= 0 of every dim's standard deviation that values are divided by
            before they are quantised, ranking undone: about 0.5 helps int4, 0 is off.
        max_tokens: Use at most this many tokens; None: all.
        progress: Called with (tokens done, tokens in all).

    Returns:
        A profile for ``KVConfig(profile=...)``; ``save`` writes it to a file.

    Raises:
        ValueError: An unknown kind, an argument out of range, or no text.
    """
    if kind not in ("hadamard", "klt", "balanced"):
        raise ValueError(f"kind is {kind!r}, must be hadamard, klt or balanced")
    if not 0.0 <= balance <= 1.0:
        raise ValueError(f"balance is {balance}, must be in [0, 1]")
    if not 0.0 <= scale_power <= 1.0:
        raise ValueError(f"scale_power is {scale_power}, must be in [0, 1]")
    if kind == "hadamard":
        return Profile.hadamard(model._core)

    pieces = _pieces(model, texts, max_tokens)
    if sum(map(len, pieces)) < 2:
        raise ValueError("calibration needs text: at least two tokens")
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(np.asarray(piece, "<i4").tobytes() + b"|")

    sums = _core.kv_statistics(model._core, pieces, progress)
    tokens = sums["tokens"]
    keys, values = sums["keys"] / tokens, sums["values"] / tokens
    metric = balance if kind == "balanced" else 0.0
    head_dim = keys.shape[-1]
    key_group, value_group = (
        _core.default_group(head_dim, True),
        _core.default_group(head_dim, False),
    )
    k_forward, k_backward, k_weight = _transforms(
        keys, sums["queries"], metric, scale_power, key_group
    )
    v_forward, v_backward, v_weight = _transforms(
        values, sums["outputs"], metric, scale_power, value_group
    )
    return Profile(
        k_forward=k_forward,
        k_backward=k_backward,
        v_forward=v_forward,
        v_backward=v_backward,
        k_weight=k_weight,
        v_weight=v_weight,
        kind=kind,
        model_fingerprint=model.fingerprint,
        text_hash=digest.hexdigest()[:16],
    )


def _pieces(model: Model, texts: Sequence[Prompt], max_tokens: int | None) -> list[list[int]]:
    if isinstance(texts, str):
        raise TypeError("texts is one text: pass a list of texts")
    context = model.config["max_position_embeddings"]
    left = max_tokens if max_tokens is not None else sys.maxsize
    pieces: list[list[int]] = []
    for text in texts:
        ids = model.tokenizer.encode(text) if isinstance(text, str) else [int(t) for t in text]
        ids = list(ids)[:left]
        left -= len(ids)
        pieces.extend(ids[i : i + context] for i in range(0, len(ids), context))
    return pieces


def _transforms(
    moments: Matrix, metrics: Matrix, balance: float, scale_power: float, group: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None]:
    """Forward, backward [layers, kv_heads, D, D] and ranking weights [layers, kv_heads, D]."""
    forward, backward = np.empty_like(moments), np.empty_like(moments)
    weight = np.ones(moments.shape[:-1])
    for layer, head in np.ndindex(*moments.shape[:2]):
        f, b = _basis(moments[layer, head], metrics[layer, head], balance)
        order = _dealt(f.shape[0], group)
        f, b = f[:, order], b[order, :]
        if scale_power > 0:
            variance = np.maximum(np.einsum("ij,ik,kj->j", f, moments[layer, head], f), 0)
            sigma = np.sqrt(variance)
            sigma = np.maximum(sigma, 1e-3 * sigma.max() + 1e-30) ** scale_power
            f, b, weight[layer, head] = f / sigma, sigma[:, None] * b, sigma
        forward[layer, head], backward[layer, head] = f, b
    weights = weight.astype(np.float32) if scale_power > 0 else None
    return forward.astype(np.float32), backward.astype(np.float32), weights


def _basis(moment: Matrix, metric: Matrix, balance: float) -> tuple[Matrix, Matrix]:
    """F and B with F B = I, columns of F by falling energy."""
    dim = moment.shape[0]
    root = inverse = np.eye(dim)
    if balance > 0 and np.trace(metric) > 0:
        strength, axes = np.linalg.eigh(metric / (np.trace(metric) / dim))
        strength = np.maximum(strength, _METRIC_FLOOR * strength.max())
        root = (axes * strength ** (balance / 2)) @ axes.T
        inverse = (axes * strength ** (-balance / 2)) @ axes.T
    _, vectors = np.linalg.eigh(root @ moment @ root)
    vectors = vectors[:, ::-1]
    return root @ vectors, vectors.T @ inverse


def _dealt(dim: int, group: int) -> NDArray[np.intp]:
    """Column order that deals 0, 1, 2, ... round over the groups of neighbouring dims."""
    groups = dim // group
    return np.arange(dim).reshape(group, groups).T.reshape(dim)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: ``mustafar calibrate`` ends here."""
    parser = argparse.ArgumentParser(
        prog="mustafar calibrate",
        description="Calibrate a KV transform on text and write it as a profile.",
    )
    parser.add_argument("-m", "--model", type=Path, help="model folder (default: the demo model)")
    parser.add_argument("-f", "--file", type=Path, action="append", help="text file, repeatable")
    parser.add_argument("-o", "--output", type=Path, required=True, help="profile to write")
    parser.add_argument("--kind", default="balanced", choices=["hadamard", "klt", "balanced"])
    parser.add_argument("--balance", type=float, default=1.0, help="metric's exponent, 0 to 1")
    parser.add_argument(
        "--scale-power", type=float, default=0.0, help="per-dim scaling, 0.5 for int4"
    )
    parser.add_argument("-n", "--max-tokens", type=int, default=16384, help="tokens to use at most")
    parser.add_argument("-t", "--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    if not options.file and options.kind != "hadamard":
        parser.error("-f FILE is needed, but for --kind hadamard")

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rcalibrating: {done}/{total} tokens", end="", file=sys.stderr, flush=True)

    try:
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in options.file or []]
        with Model(options.model, device="cpu", threads=options.threads) as model:
            profile = calibrate(
                model,
                texts,
                options.kind,
                balance=options.balance,
                scale_power=options.scale_power,
                max_tokens=options.max_tokens,
                progress=show,
            )
            profile.save(options.output)
    except (OSError, ValueError, _core.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(f"{options.output}: {profile.kind}, hash {profile.hash()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
