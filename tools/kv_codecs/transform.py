"""Transform coding: every dim of a good basis has its own, constant number of levels.

`StaticBits` is the plain code: whole bits by water-filling, one bf16 scale a row. `Allocated` and
`EntropyCoded` are experiments on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .calibration import Basis
from .codec import Rows
from .primitives import bf16
from .product import InBasis


def water_fill(sigma: Tensor, mean_bits: float, least: int = 0, most: int = 8) -> Tensor:
    """Bits per dim: round(log2 sigma - t), the mean over the last axis at most `mean_bits`."""
    level = sigma.clamp_min(1e-9).log2()
    low, high = level.amin(-1, keepdim=True) - 10, level.amax(-1, keepdim=True) + 1
    for _ in range(60):
        middle = (low + high) / 2
        over = (level - middle).round().clamp(least, most).mean(-1, keepdim=True) > mean_bits
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (level - high).round().clamp(least, most)


def row_scale(y: Tensor, sigma: Tensor) -> Tensor:
    """A row's root mean square against the calibration text's: [..., 1]."""
    return (y / sigma.clamp_min(1e-9)).pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


def log_scale(scale: Tensor, bits: int, per_octave: int) -> Tensor:
    """A scale as one of 2^bits powers of 2^(1 / per_octave), the middle one being 1."""
    half = 2 ** (bits - 1)
    code = (scale.log2() * per_octave).round().clamp(-half, half - 1)
    return 2.0 ** (code / per_octave)


class StaticBits(InBasis):
    """Whole bits per dim, half-step levels, step 2 (1.6 + 0.55 n) / 2^n sigmas, bf16 row scale.

    allocation: bits [L, kv_heads, 1, D]; None: by `water_fill`, the same mean in every row.
    log_bits: the row scale as that many bits of logarithm, 4 steps an octave, in place of bf16.
    search: of the scales up to an octave around, the one of least squares is taken.
    heads: KV heads that share a row, in a joint basis.
    """

    def __init__(
        self,
        basis: Basis,
        mean_bits: float,
        *,
        allocation: Tensor | None = None,
        log_bits: int | None = None,
        search: bool = False,
        heads: int = 1,
    ) -> None:
        super().__init__(basis)
        self.allocation = water_fill(basis.sigma, mean_bits) if allocation is None else allocation
        self.log_bits, self.search = log_bits, search
        self.bits = (self.allocation.sum(-1).mean().item() + (log_bits or 16)) / heads

    def code(self, y: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        n = self.allocation[rows.layer]
        step = 2 * (1.6 + 0.55 * n) / 2**n * sigma
        first = row_scale(y, sigma)
        best, least = y, torch.full_like(first, torch.inf)
        for quarter in range(-4, 5) if self.search else (0,):
            scale = first * 2 ** (quarter / 4)
            scale = bf16(scale) if self.log_bits is None else log_scale(scale, self.log_bits, 4)
            got = _half_step_levels(y, n, step * scale)
            error = (got - y).pow(2).sum(-1, keepdim=True)
            best = torch.where(error < least, got, best)
            least = torch.minimum(error, least)
        return best


def _half_step_levels(y: Tensor, n: Tensor, step: Tensor) -> Tensor:
    half = 2**n / 2
    code = (y / step.clamp_min(1e-9)).floor().clamp(-half, half - 1)
    return torch.where(n > 0, (code + 0.5) * step, 0.0)


def one_budget(
    bases: tuple[Basis, Basis],
    mean_bits: float,
    log_bits: int = 5,
    *,
    search: bool = False,
    heads: int = 1,
) -> tuple[StaticBits, StaticBits]:
    """`StaticBits` of keys and values with one water level over all layers, heads, K and V.

    The bases' units must be comparable (kind "fisher"). mean_bits includes the row scales.
    heads: KV heads that share a row, in joint bases.
    """
    sigmas = torch.stack([basis.sigma for basis in bases])
    filled = water_fill(sigmas.flatten(), mean_bits - log_bits / sigmas.shape[-1])
    keys, values = filled.view(sigmas.shape)
    key, value = (
        StaticBits(basis, 0, allocation=bits, log_bits=log_bits, search=search, heads=heads)
        for basis, bits in zip(bases, (keys, values), strict=True)
    )
    return key, value


# Levels a dim may have: mixed radix, so that three levels cost log2(3) bits.
_LEVELS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128)


class Allocated(InBasis):
    """Any number of levels per dim, codebooks of least squares by dim, a logarithmic row scale.

    Make these with `allocate`, which spends one budget over all layers, heads, K and V. Levels of a
    row are packed as one mixed-radix number; its bits are rounded up.
    levels: [L, kv_heads, D]. books: [L, kv_heads, D, most levels], ascending, padded with inf.
    """

    def __init__(self, basis: Basis, levels: Tensor, books: Tensor, log_bits: int) -> None:
        super().__init__(basis)
        self.levels, self.books, self.log_bits = levels, books, log_bits
        self.borders = (books[..., 1:] + books[..., :-1]) / 2  # inf beyond the last level
        packed = levels.double().log2().sum(-1) - 1e-9
        self.bits = packed.ceil().mean().item() + log_bits

    def code(self, y: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        scale = _coded_scale(y, sigma, self.log_bits)
        z = (y / (sigma.clamp_min(1e-9) * scale)).transpose(1, 2).contiguous()  # [G, D, T]
        code = torch.searchsorted(self.borders[rows.layer].contiguous(), z)
        z = self.books[rows.layer].gather(-1, code)
        return z.transpose(1, 2) * sigma * scale


def _coded_scale(y: Tensor, sigma: Tensor, log_bits: int) -> Tensor:
    if not log_bits:
        return torch.ones_like(y[..., :1])
    return log_scale(row_scale(y, sigma), log_bits, 4)


def allocate(
    bases: tuple[Basis, Basis],
    mean_bits: float,
    *,
    log_bits: int = 5,
    shared: bool = True,
    whole_bits: bool = False,
) -> tuple[Allocated, Allocated]:
    """Coders of keys and values with `mean_bits` per value between them, scales included.

    shared: one budget over all layers, heads, K and V, which supposes that the bases' units are
    comparable, as those of kind "fisher" are; otherwise every row has the same.
    whole_bits: powers of two alone. Every dim takes the levels of the least error + price * bits.
    """
    choices = [n for n in _LEVELS if not whole_bits or n & (n - 1) == 0]
    costs = torch.tensor(choices).double().log2()
    errors = [_expected_errors(basis, choices, log_bits) for basis in bases]
    sizes = [basis.sigma.shape[-1] for basis in bases]
    budget = mean_bits - log_bits / sizes[0]
    stacked = torch.stack(errors)  # [2, L, G, D, choices]

    def chosen(price: Tensor) -> Tensor:
        return (stacked + price[..., None, None] * costs).argmin(-1)

    shape = stacked.shape[:3]
    low = torch.full(shape, 1e-15, dtype=torch.float64)
    high = torch.full(shape, 1e9, dtype=torch.float64)
    for _ in range(80):
        middle = (low * high).sqrt()
        spent = costs[chosen(middle)].mean(-1)
        over = (spent.mean() if shared else spent) > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    picked = torch.tensor(choices)[chosen(high)]
    coders = []
    for basis, levels in zip(bases, picked, strict=True):
        books = _codebooks(basis, levels, log_bits)
        coders.append(Allocated(basis, levels, books, log_bits))
    return coders[0], coders[1]


def _normalised(basis: Basis, log_bits: int, layer: int) -> Tensor:
    """Calibration samples over sigma and row scale: [G, D, N]."""
    y, sigma = basis.samples(layer), basis.sigma[layer]
    scale = _coded_scale(y, sigma, log_bits)
    return (y / (sigma.clamp_min(1e-9) * scale)).transpose(1, 2).contiguous()


def _uniform_span(n: int) -> float:
    """Where n uniform levels end, in sigmas, on heavy-tailed rows; Lloyd's rounds start there."""
    return (1.6 + 0.55 * math.log2(n)) * (n - 1) / n


def _expected_errors(basis: Basis, choices: list[int], log_bits: int) -> Tensor:
    """Error of every dim at every number of levels, float64 [L, G, D, choices].

    Measured on pooled samples with codebooks of least squares, then scaled by each dim's energy.
    """
    layers = range(0, len(basis.source), 7)
    pool = torch.cat([_normalised(basis, log_bits, la)[:, :, ::64] for la in layers], -1)
    pool = pool.flatten()[:: max(1, pool.numel() // 65536)].sort().values
    relative = []
    for n in choices:
        book = lloyd(pool[None], n, 40)
        borders = (book[:, 1:] + book[:, :-1]) / 2
        near = book[0][torch.searchsorted(borders[0].contiguous(), pool)]
        relative.append(((pool - near).pow(2).mean() / pool.pow(2).mean()).item())
    energy = basis.sigma[:, :, 0].double().pow(2)
    return energy[..., None] * torch.tensor(relative, dtype=torch.float64)


def _codebooks(basis: Basis, levels: Tensor, log_bits: int, rounds: int = 8) -> Tensor:
    """Codebooks [L, G, D, most] of every dim, padded with inf."""
    most = int(levels.max())
    books = torch.full((*levels.shape, most), torch.inf)
    for layer in range(len(levels)):
        z = _normalised(basis, log_bits, layer)[..., ::4].flatten(0, 1)
        flat = levels[layer].flatten()
        for n in flat.unique().tolist():
            chosen = (flat == n).nonzero()[:, 0]
            book = lloyd(z[chosen], n, rounds)
            books[layer].view(-1, most)[chosen, :n] = book
    return books


def lloyd(samples: Tensor, n: int, rounds: int, book: Tensor | None = None) -> Tensor:
    """Codebooks [rows, n] of least squares for samples [rows, N] of unit variance.

    book: [rows, n] to start from, ascending, where the samples are others.
    """
    if n == 1:
        return torch.zeros(len(samples), 1)
    if book is None:
        book = (torch.linspace(-1, 1, n) * _uniform_span(n)).repeat(len(samples), 1)
    for _ in range(rounds):
        code = torch.searchsorted(((book[:, 1:] + book[:, :-1]) / 2).contiguous(), samples)
        count = torch.zeros_like(book).scatter_add_(1, code, torch.ones_like(samples))
        total = torch.zeros_like(book).scatter_add_(1, code, samples)
        book = torch.where(count > 0, total / count.clamp_min(1), book)
        book = book.sort(-1).values
    return book


class GaussianLevels(InBasis):
    """The levels that are best for a normal distribution, a bf16 root mean square per row.

    TurboQuant (arXiv 2504.19874, section 3.1), its code of least squares: Hadamard in place of a
    random rotation, and no residual code for unbiased products.
    """

    def __init__(self, basis: Basis, value_bits: int) -> None:
        super().__init__(basis)
        quantiles = torch.arange(1, 20001) / 20001
        self.book = lloyd((2 * quantiles - 1).erfinv()[None] * 2**0.5, 2**value_bits, 200)[0]
        self.bits = self.dim * value_bits + 16

    def code(self, y: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        scale = bf16(row_scale(y, torch.ones_like(sigma)))
        borders = (self.book[1:] + self.book[:-1]) / 2
        return self.book[torch.searchsorted(borders, (y / scale).contiguous())] * scale


class EntropyCoded(InBasis):
    """Uniform steps and an ideal entropy coder with static tables: how far a range coder can go.

    After KVTC (arXiv 2511.01815), but by head, with a row scale, and without its DEFLATE. A row is
    divided by its 5-bit logarithmic scale; codes are round(y / step), with the same step in all
    dims, which in a basis with comparable units is the best split of bits. Each dim's table is the
    histogram of the calibration text; a code comes back as its cell's mean there. Bits are what
    those tables charge on the text that is scored, so a text unlike the calibration text pays for
    it, plus 4 bytes per block of 64 rows for the coder's state and length. A block's rows are
    decoded together: there is no random access to a row.
    """

    _HALF = 63  # codes beyond +-63 escape: 16 bits more
    _CODES = 2 * _HALF + 1

    def __init__(self, basis: Basis, step: float, log_bits: int = 5) -> None:
        super().__init__(basis)
        self.step, self.log_bits = step, log_bits
        self.overhead = log_bits + 32 / 64
        layers, heads, _, dim = basis.source.shape
        shape = (layers, heads, dim, self._CODES)
        self.charge, self.points = torch.empty(shape), torch.empty(shape)
        spent, rows = 0.0, 0
        for layer in range(layers):
            y = _normalised(basis, log_bits, layer).transpose(1, 2) * basis.sigma[layer]
            places = self._places(y).flatten()
            size = heads * dim * self._CODES
            count = torch.bincount(places, minlength=size).view(shape[1:]).float()
            total = torch.zeros(size).scatter_add_(0, places, y.flatten()).view(shape[1:])
            self.charge[layer] = -_smooth(count).log2()
            middle = torch.arange(-self._HALF, self._HALF + 1) * step
            self.points[layer] = (total + middle) / (count + 1)
            spent += self.charge[layer].flatten()[places].sum().item()
            rows += y.shape[0] * y.shape[1]
        self.bits = spent / rows + self.overhead
        self._spent, self._rows = 0.0, 0

    def start(self) -> None:
        """Forgets what was charged so far."""
        self._spent, self._rows = 0.0, 0

    def code(self, y: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        scale = _coded_scale(y, sigma, self.log_bits)
        y = y / scale
        places = self._places(y)
        code = (y / self.step).round()
        escaped = code.abs() > self._HALF
        first = rows.schedule.sinks
        charged = self.charge[rows.layer].flatten()[places[:, first:]]
        self._spent += charged.sum().item() + 16 * escaped[:, first:].sum().item()
        self._rows += charged.shape[0] * charged.shape[1]
        self.bits = self._spent / self._rows + self.overhead
        near = self.points[rows.layer].flatten()[places]
        return torch.where(escaped, code * self.step, near) * scale

    def _places(self, y: Tensor) -> Tensor:
        """Index of every value's code in a layer's tables: int64 [G, T, D] of y [G, T, D]."""
        heads, _, dim = y.shape
        code = (y / self.step).round().clamp(-self._HALF, self._HALF).long() + self._HALF
        return torch.arange(heads * dim).view(heads, 1, dim) * self._CODES + code


def _smooth(count: Tensor) -> Tensor:
    """Probabilities from histograms [..., codes]: mixed with a little of their neighbours."""
    padded = torch.nn.functional.pad(count, (2, 2))
    around = sum(padded[..., i : i + count.shape[-1]] for i in range(5)) / 5
    mixed = count + 0.05 * around + 0.02
    return mixed / mixed.sum(-1, keepdim=True)


def entropy_coded(
    bases: tuple[Basis, Basis], mean_bits: float, log_bits: int = 5
) -> tuple[EntropyCoded, EntropyCoded]:
    """Coders of keys and values whose one step spends `mean_bits` a value on calibration rows."""
    low, high = 1e-6, 1e3
    overhead = (log_bits + 0.5) / bases[0].sigma.shape[-1]
    for _ in range(14):
        step = math.sqrt(low * high)
        bits = sum(_entropy_estimate(basis, step, log_bits) for basis in bases) / 2 + overhead
        low, high = (step, high) if bits > mean_bits else (low, step)
    return EntropyCoded(bases[0], high, log_bits), EntropyCoded(bases[1], high, log_bits)


def _entropy_estimate(basis: Basis, step: float, log_bits: int) -> float:
    """Bits per value of codes round(y / step), from histograms by dim in every third layer."""
    half, width = 63, 127
    estimates = []
    for layer in range(0, len(basis.source), 3):
        y = _normalised(basis, log_bits, layer)[..., ::2] * basis.sigma[layer].transpose(1, 2)
        heads, dim, rows = y.shape
        code = (y / step).round().clamp(-half, half).long() + half
        table = torch.arange(heads * dim).view(heads, dim, 1)
        count = torch.bincount((table * width + code).flatten(), minlength=heads * dim * width)
        share = count.view(-1, width).double() / rows
        estimates.append(-(share * share.clamp_min(1e-12).log2()).sum(-1).mean().item())
    return sum(estimates) / len(estimates)
