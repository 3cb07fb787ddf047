"""The runtime's coded rows, as cpp/format/coded.h has them, and experiments on them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .calibration import Basis
from .codec import Rows
from .model import Schedule
from .primitives import bf16
from .product import InBasis
from .transform import lloyd

MAX_WIDTH = 7
# By width: the step in standard deviations, and the error left of a Gaussian dim's energy.
STEP = torch.tensor([0, 1.72, 1.08, 0.65, 0.38, 0.2175, 0.1225, 0.068125])
ERROR = torch.tensor([1, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000642, 0.000163])
Mend = Callable[[Tensor, Tensor, Tensor], Tensor]
_FACTORS = tuple(2 ** (quarter / 4) for quarter in range(-2, 6))


def deal_widths(energy: Tensor, bits: int) -> Tensor:
    """Bits of every dim [..., D] that add up to `bits`, dealt one by one where they help most."""
    drops = (ERROR[:-1] - ERROR[1:]).double()
    gains = (energy.double()[..., None] * drops).flatten(-2)  # falling in a dim's widths
    taken = gains.sort(dim=-1, descending=True, stable=True).indices[..., :bits]
    dealt = torch.zeros_like(gains).scatter_(-1, taken, 1.0)
    return dealt.unflatten(-1, (-1, MAX_WIDTH)).sum(-1).long()


class Coded(InBasis):
    """`value_dtype="coded"`: widths by energy, half-step levels, a bf16 scale chosen of eight.

    power: dims are divided by sigma^power before errors are compared, the profile's scale_power.
    energy: [L, kv_heads, 1, D] that widths are dealt by; None: that of the calibration text.
    overhead: bits of a row that go to other things than codes and scale.
    """

    def __init__(
        self,
        basis: Basis,
        mean_bits: float,
        *,
        power: float = 0.5,
        energy: Tensor | None = None,
        overhead: int = 0,
    ) -> None:
        super().__init__(basis)
        self.power = power
        code_bits = math.ceil(self.dim * mean_bits / 32 - 1e-9) * 32 - overhead
        self.widths = deal_widths(basis.sigma**2 if energy is None else energy, code_bits)
        self.bits = code_bits + overhead + 16.0

    def code(self, y: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        widths = self.widths[rows.layer]
        least = sigma.amax(-1, keepdim=True) * 1e-3
        weight = sigma.maximum(least) ** -self.power
        mend = self.mending(rows.layer, sigma, weight)
        return fixed_levels(y * weight, sigma * weight, widths, mend) / weight

    def mending(self, layer: int, sigma: Tensor, weight: Tensor) -> Mend | None:
        """What is done to decoded rows besides: (rows, decoded, their scale) to better ones."""
        return None


def fixed_levels(y: Tensor, sigma: Tensor, widths: Tensor, mend: Mend | None = None) -> Tensor:
    """y [..., T, D] by half-step levels, the scale that leaves the least fourth powers."""
    step, half = STEP[widths] * sigma, 0.5 * 2.0**widths
    inverse = torch.where(step > 0, 1 / step.clamp_min(1e-30), 0.0)
    rms = (y / sigma.clamp_min(1e-30)).pow(2).mean(-1, keepdim=True).sqrt()
    best, least = torch.zeros_like(y), torch.full_like(rms, torch.inf)
    for factor in _FACTORS:
        scale = bf16(rms * factor)
        code = (y * inverse / scale.clamp_min(1e-30) + half).clamp_min(0)
        got = (code.floor().minimum(2 * half - 1) - (half - 0.5)) * step * scale
        if mend is not None:
            got = mend(y, got, scale)
        error = ((got - y) / rms.clamp_min(1e-30)).pow(4).sum(-1, keepdim=True)
        best = torch.where(error < least, got, best)
        least = torch.minimum(error, least)
    return best


class CodedSparse(Coded):
    """Coded rows of fewer bits, and the `keep` largest of what they leave, row by row.

    weak: the largest width of dims that may be among the kept; all others have none. The rest of a
    row of `mean_bits` goes to the widths. A kept value is a sign and `value_bits` - 1 bits of one
    codebook for each layer, of least squares on the calibration text, times the row's scale.
    positions: "bitmap", a bit for every weak dim; "index", the bits of a weak dim's number for each
    kept value; "ideal", log2 of the number of choices, which no code of them can beat.
    """

    def __init__(
        self,
        basis: Basis,
        mean_bits: float,
        *,
        weak: int,
        keep: int,
        value_bits: int,
        positions: str = "bitmap",
    ) -> None:
        self.weak, self.keep, self.value_bits = weak, keep, value_bits
        super().__init__(basis, mean_bits)
        total = self.bits
        overhead = torch.zeros(self.widths.shape[:2])
        for _ in range(12):  # what positions cost depends on the widths, and these on that
            candidates = (self.widths[:, :, 0] <= weak).sum(-1)
            spent = _position_bits(candidates, keep, positions) + keep * value_bits
            overhead = overhead.maximum(spent)
            for at in torch.cartesian_prod(*(torch.arange(n) for n in overhead.shape)):
                layer, head = at.tolist()
                code_bits = max(0, int(total - 16 - overhead[layer, head]))
                energy = basis.sigma[layer, head] ** 2
                self.widths[layer, head] = deal_widths(energy, code_bits)
        candidates = (self.widths[:, :, 0] <= weak).sum(-1)
        spent = _position_bits(candidates, keep, positions) + keep * value_bits
        self.bits = (self.widths.sum((-1, -2)) + spent).mean().item() + 16
        self.books: list[Tensor] = []
        self.books = [self._book(layer) for layer in range(len(self.widths))]

    def mending(self, layer: int, sigma: Tensor, weight: Tensor) -> Mend | None:
        book = self.books[layer] if self.books else None
        if book is None or not book.any():
            return None
        borders = (book[1:] + book[:-1]) / 2

        def mend(y: Tensor, got: Tensor, scale: Tensor) -> Tensor:
            kept, left, size = self._kept((y - got) / weight, scale, sigma, layer)
            level = book[torch.searchsorted(borders, left.abs() / size)]
            mended = (left.sign() * level * size).masked_fill_(kept < 0, 0)
            change = torch.zeros_like(y).scatter_(-1, kept.clamp_min(0), mended)
            return got + change * weight

        return mend

    def _kept(
        self, left: Tensor, scale: Tensor, sigma: Tensor, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Dims that are kept [..., keep], -1 for none; what is left of them; the row's unit."""
        weak = self.widths[layer] <= self.weak
        size = scale.clamp_min(1e-9) * torch.where(weak, sigma, 0.0).amax(-1, keepdim=True)
        kept = left.abs().masked_fill(~weak, -1).topk(self.keep, -1).indices
        found = weak.expand_as(left).gather(-1, kept)
        return torch.where(found, kept, -1), left.gather(-1, kept), size.clamp_min(1e-9)

    def _book(self, layer: int) -> Tensor:
        """Magnitudes of what is kept of calibration rows, coded without mending."""
        y, sigma = self.basis.samples(layer)[:, ::4], self.basis.sigma[layer]
        rows = Rows(layer, True, y, y, y, Schedule(), None)  # type: ignore[arg-type]
        scale = (y / sigma.clamp_min(1e-9)).pow(2).mean(-1, keepdim=True).sqrt()
        kept, left, size = self._kept(y - self.code(y, sigma, rows), scale, sigma, layer)
        seen = (left.abs() / size)[kept >= 0].sort().values
        levels = 2 ** (self.value_bits - 1)
        if not len(seen):  # a layer whose heads have no weak dims
            return torch.zeros(levels)
        seen = seen[:: max(1, len(seen) // 65536)]
        book = torch.quantile(seen, (torch.arange(levels) + 0.5) / levels)
        return lloyd(seen[None], levels, 20, book[None])[0]


def _position_bits(candidates: Tensor, keep: int, positions: str) -> Tensor:
    """Bits that say which `keep` of so many candidates are kept."""
    n = candidates.double()
    if positions == "bitmap":
        return n
    if positions == "index":
        return keep * n.clamp_min(1).log2().ceil()
    most = n.clamp_min(keep)
    choices = torch.lgamma(most + 1) - math.lgamma(keep + 1) - torch.lgamma(most - keep + 1)
    return choices / math.log(2)
