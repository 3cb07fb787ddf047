"""Statistics of a calibration text, and the bases that codecs are made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .model import Llama, Schedule, coded_attention, dense_attention
from .primitives import hadamard

_METRIC_FLOOR = 1e-4  # of the strongest direction, as in mustafar.calibration
_SKIPPED = 8  # first tokens of every text: sinks, which stay dense


@dataclass
class Statistics:
    """What a text says about a model's cache. L layers, G KV heads, D dims, N tokens.

    k, v: samples [L, G, N, D], keys after RoPE; k_before: the same keys before it.
    queries: E[q^T q] summed over the group [L, G, D, D]; outputs: E[o^T o] of attention, likewise.
    value_metric: sum over the group of W_o,h^T W_o,h [L, G, D, D].
    k_fisher, k_before_fisher, v_fisher: E[g^T g] [L, G, D, D] of gradients of the log-probability
    of sampled tokens with respect to coded rows: half of d F d^T is the KLD that an error d of one
    row costs, in nats over all tokens to come, to second order.
    """

    k: Tensor
    v: Tensor
    k_before: Tensor
    queries: Tensor
    outputs: Tensor
    value_metric: Tensor
    k_fisher: Tensor
    k_before_fisher: Tensor
    v_fisher: Tensor


def gather(model: Llama, texts: list[Tensor], fisher_tokens: int = 768) -> Statistics:
    """Runs texts (ids [T] each) through the model, once forward and once forward and back."""
    shape = (model.layers, model.kv_heads, model.head_dim, model.head_dim)
    queries, outputs = torch.zeros(shape), torch.zeros(shape)
    samples: dict[str, list[Tensor]] = {"k": [], "v": [], "k_before": []}
    tokens = sum(len(ids) for ids in texts)
    for ids in texts:
        layers: dict[str, list[Tensor]] = {name: [] for name in samples}

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = dense_attention(layer, q, k, v)
            queries[layer] += _moment(q, model.kv_heads) / tokens
            outputs[layer] += _moment(out, model.kv_heads) / tokens
            for name, x in (("k", k), ("v", v), ("k_before", model.rope(k, inverse=True))):
                layers[name].append(x[:, _SKIPPED:])  # noqa: B023 (used within this round)
            return out

        with torch.no_grad():
            hidden = model.embed(ids)
            for layer in range(model.layers):
                hidden = model.layer(layer, hidden, attention)
        for name, parts in layers.items():
            samples[name].append(torch.stack(parts))
    stacked = {name: torch.cat(parts, 2) for name, parts in samples.items()}

    metric = torch.zeros(shape)
    for layer in range(model.layers):
        w = model.weight(layer, "self_attn.o_proj").unflatten(1, (model.kv_heads, -1, shape[-1]))
        metric[layer] = torch.einsum("oghd,oghe->gde", w, w)
    return Statistics(
        **stacked, queries=queries, outputs=outputs, value_metric=metric,
        **_fisher(model, [ids[:fisher_tokens] for ids in texts]),
    )  # fmt: skip


def _moment(x: Tensor, kv_heads: int) -> Tensor:
    grouped = x.unflatten(0, (kv_heads, -1)).flatten(1, 2)
    return grouped.transpose(1, 2) @ grouped


def _fisher(model: Llama, texts: list[Tensor]) -> dict[str, Tensor]:
    shape = (model.layers, model.kv_heads, model.head_dim, model.head_dim)
    sums = {name: torch.zeros(shape) for name in ("k_fisher", "k_before_fisher", "v_fisher")}
    schedule, rows = Schedule(), 0
    generator = torch.Generator().manual_seed(0)
    for ids in texts:
        errors: list[tuple[Tensor, Tensor]] = []

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pair = (torch.zeros_like(k, requires_grad=True), torch.zeros_like(v).requires_grad_())
            errors.append(pair)  # noqa: B023 (used within this round)
            return coded_attention(schedule, q, k, v, k + pair[0], v + pair[1])

        with torch.enable_grad():
            log_probs = model.forward(ids, attention)
            drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
            log_probs.gather(1, drawn).sum().backward()
        coded = slice(schedule.sinks, schedule.sinks + schedule.coded(len(ids) - 1))
        rows += coded.stop - coded.start
        for layer, (k, v) in enumerate(errors):
            assert k.grad is not None and v.grad is not None
            before = model.rope(k.grad, inverse=True)
            for name, g in (
                ("k_fisher", k.grad), ("k_before_fisher", before), ("v_fisher", v.grad)
            ):  # fmt: skip
                g = g[:, coded]
                sums[name][layer] += g.transpose(1, 2) @ g
    return {name: total / rows for name, total in sums.items()}


def cached_statistics(model: Llama, texts: list[Tensor], path: Path) -> Statistics:
    """The statistics in `path`, made first where the file does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(gather(model, texts)), path)
    return Statistics(**torch.load(path))


@dataclass
class Basis:
    """An affine change of coordinates: y = (x - mean) forward, x = y backward + mean.

    forward, backward: [L, G, D, D], their product the identity. mean: [L, G, 1, D].
    sigma: [L, G, 1, D], root mean square of y on the calibration text.
    before_rope: keys are turned back by their positions first, and forth afterwards.
    joint: the KV heads of a token are one row: G is 1 and D all heads' dims.
    source: x on the calibration text [L, G, N, D], not copied.
    """

    forward: Tensor
    backward: Tensor
    mean: Tensor
    sigma: Tensor
    source: Tensor
    before_rope: bool = False
    joint: bool = False

    def samples(self, layer: int) -> Tensor:
        """y on the calibration text, [G, N, D]."""
        return (self.source[layer] - self.mean[layer]) @ self.forward[layer]


def make_basis(
    statistics: Statistics,
    is_key: bool,
    kind: str,
    *,
    centred: bool = False,
    balance: float = 1.0,
    before_rope: bool = False,
    joint: bool = False,
) -> Basis:
    """A basis by kind: none, hadamard, klt, balanced, fisher or oscar.

    klt: eigenvectors of the rows' second moment. balanced: the same in the metric E[q^T q] for
    keys and sum of W_o^T W_o for values, to the power of `balance` (docs of mustafar.calibration).
    fisher: in the metric of the Fisher information, whose units are the same in all layers, so it
    is not normalised. oscar: an orthogonal basis, eigenvectors of E[q^T q] for keys and of
    E[o^T o] for values, mixed by a Hadamard matrix (arXiv 2605.17757, section 3).
    joint: one basis for all KV heads of a layer, for klt and fisher.
    """
    before_rope = before_rope and is_key
    x = (statistics.k_before if before_rope else statistics.k) if is_key else statistics.v
    if joint:
        x = x.transpose(1, 2).flatten(2)[:, None]
    mean = x.mean(2, keepdim=True) if centred else torch.zeros_like(x[:, :, :1])
    moment = _double_moment(x, mean)
    dim = x.shape[-1]
    eye = torch.eye(dim, dtype=torch.float64).expand_as(moment)
    if kind == "none":
        forward = backward = eye
    elif kind == "hadamard":
        forward = hadamard(dim).expand_as(moment)
        backward = forward.transpose(-1, -2)
    elif kind == "oscar":
        axes = _axes((statistics.queries if is_key else statistics.outputs).double())
        forward = axes @ hadamard(dim)
        backward = forward.transpose(-1, -2)
    elif kind == "klt":
        forward = _axes(moment)
        backward = forward.transpose(-1, -2)
    elif kind in ("balanced", "fisher"):
        if kind == "fisher":
            name = "k_before_fisher" if before_rope else "k_fisher"
            metric = (getattr(statistics, name) if is_key else statistics.v_fisher).double()
            if joint:
                metric = torch.stack([torch.block_diag(*heads) for heads in metric])[:, None]
        else:
            if before_rope:
                raise ValueError("the balanced metric is known after RoPE alone")
            metric = (statistics.queries if is_key else statistics.value_metric).double()
            trace = metric.diagonal(dim1=-2, dim2=-1).sum(-1)
            metric = metric * dim / trace[..., None, None]
        root, inverse = _powers(metric, balance)
        axes = _axes(root @ moment @ root)
        forward, backward = root @ axes, axes.transpose(-1, -2) @ inverse
    else:
        raise ValueError(f"no basis {kind!r}")
    energy = (forward.transpose(-1, -2) @ moment * forward.transpose(-1, -2)).sum(-1)
    sigma = energy.clamp_min(0).sqrt().float()[..., None, :]
    return Basis(forward.float(), backward.float(), mean, sigma, x, before_rope, joint)


def _double_moment(x: Tensor, mean: Tensor) -> Tensor:
    """Second moments about `mean` [L, G, D, D] of x [L, G, N, D], float64, a layer at a time."""
    centred = (rows.double() - m.double() for rows, m in zip(x, mean, strict=True))
    return torch.stack([y.transpose(1, 2) @ y / y.shape[1] for y in centred])


def _axes(moment: Tensor) -> Tensor:
    """Eigenvectors as columns, the strongest first."""
    return torch.linalg.eigh(moment)[1].flip(-1)


def _powers(metric: Tensor, balance: float) -> tuple[Tensor, Tensor]:
    """metric^(balance / 2) and its inverse, weak directions raised to the floor."""
    strength, axes = torch.linalg.eigh(metric)
    strength = strength.clamp_min(strength.amax(-1, keepdim=True) * _METRIC_FLOOR)
    power = strength[..., None, :] ** (balance / 2)
    return axes * power @ axes.transpose(-1, -2), axes / power @ axes.transpose(-1, -2)
