"""The list of what is measured. Codecs are built when their turn comes: some take a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from .calibration import Basis, Statistics, make_basis
from .codec import Codec, Coder, Exact
from .coded import Coded, CodedSparse
from .model import Llama, Schedule
from .product import Affine, Channel, Integers, OutputAwareRow, Pruned, ThinK
from .published import Gear, Kivi, Kvarn, LowRank, MixedTokens, Spark, oscar_clips
from .tokens import EntropyHeavyHitters, HeavyHitters, Streaming, StreamingHeads
from .transform import GaussianLevels, StaticBits, allocate, entropy_coded, one_budget


@dataclass(frozen=True)
class Row:
    """A row to be: its unique name, its heading, and how to make the codec."""

    name: str
    family: str
    build: Callable[[], Codec]


class Bases:
    """Bases of keys and values by kind, made once."""

    def __init__(self, statistics: Callable[[], Statistics]) -> None:
        self.statistics = statistics
        self.pair = cache(self._pair)

    def _pair(self, kind: str, **options: Any) -> tuple[Basis, Basis]:
        return (
            make_basis(self.statistics(), True, kind, **options),
            make_basis(self.statistics(), False, kind, **options),
        )


_SPARSE = "Product: magnitude sparsity"
_POLICY = "Product: channel and output-aware policies"
_INTEGER = "Product: dense integers"
_BOTH = "Product: sparse integers in a basis"
_STATIC = "Transform coding with static bits"
_CHANNEL = "Published: channels"
_QUANT = "Published: integers"
_TOKEN = "Published: mixed precision by token"
_RANK = "Published: low rank"
_DROP = "Published: dropped tokens and streaming heads"
_GRID = "Sinks and windows"
_EXPERIMENT = "Experiments on static bits"
_ON_TOP = "Coded rows, and sparse on top"


def all_rows(
    model: Llama,
    statistics: Callable[[], Statistics],
    head_order: Callable[[], list[tuple[int, int]]],
) -> Iterator[Row]:
    """Every row. statistics, head_order (KV heads by what streaming costs): made when called."""
    dim = model.head_dim
    half, third = dim // 2, (dim * 5 + 15) // 16  # kept of a row at .5 and about .7
    bases = Bases(statistics)

    def both(
        name: str, family: str, make: Callable[[Basis], Coder], kind: str, **options: Any
    ) -> Row:
        """The same coder for keys and values in bases of one kind."""

        def build() -> Codec:
            key, value = bases.pair(kind, **options)
            return Codec(name, family, make(key), make(value))

        return Row(name, family, build)

    def pair(
        name: str,
        family: str,
        make: Callable[[], tuple[Coder, Coder]],
        schedule: Schedule | None = None,
    ) -> Row:
        """Coders of keys and of values."""
        return Row(name, family, lambda: Codec(name, family, *make(), schedule or Schedule()))

    def same(name: str, family: str, make: Callable[[], Coder], **options: Any) -> Row:
        return pair(name, family, lambda: (make(), make()), **options)

    yield same("exact (a check: 0)", _SPARSE, lambda: Exact(dim))
    yield from _sparse(dim, half, third, both)
    yield from _policies(dim, half, third, bases, pair)
    yield from _integers(dim, half, both)
    for bits in (4, 3, 2.5, 2, 1.5):
        yield both(
            f"static {bits} bits, balanced", _STATIC, lambda b, n=bits: StaticBits(b, n), "balanced"
        )
    yield from _published(dim, half, third, statistics, both, pair, same)
    yield from _dropping(model, statistics, head_order)
    yield from _experiments(model.kv_heads, bases, both, pair)
    yield from _on_top(bases, both)
    yield from _grid(dim, half, bases)


def _sparse(dim: int, half: int, third: int, both: Callable[..., Row]) -> Iterator[Row]:
    for group in (16, 32):
        for dealt in (False, True):
            yield both(
                f"groups of {group} {'dealt' if dealt else 'neighbours'} .5",
                _SPARSE,
                lambda b, g=group, d=dealt: Pruned(b, g, g // 2, dealt=d),
                "none",
            )
    yield both("2:4", _SPARSE, lambda b: Pruned(b, 4, 2, dealt=False), "none")
    for kind in ("none", "balanced", "hadamard"):
        basis = "" if kind == "none" else f", {kind}"
        yield both(f"row .5{basis}", _SPARSE, lambda b: Pruned(b, None, half), kind)
        yield both(f"row .7{basis}", _SPARSE, lambda b: Pruned(b, None, third), kind)
    yield both("row .5, fisher", _SPARSE, lambda b: Pruned(b, None, half), "fisher")


def _policies(
    dim: int, half: int, third: int, bases: Bases, pair: Callable[..., Row]
) -> Iterator[Row]:
    def row_values(keep: int) -> Coder:
        return Pruned(bases.pair("none")[1], None, keep)

    for label, keep, tokens in ((".5", half, 32), (".7", third, 20)):
        yield pair(
            f"K output-aware row, V row {label}",
            _POLICY,
            lambda k=keep: (OutputAwareRow(dim, k), row_values(k)),
        )
        yield pair(
            f"channel magnitude {label}",
            _POLICY,
            lambda t=tokens: (Channel(dim, t), Channel(dim, t)),
        )
        yield pair(
            f"channel output-aware {label}",
            _POLICY,
            lambda t=tokens: (
                Channel(dim, t, output_aware=True),
                Channel(dim, t, output_aware=True),
            ),
        )
        yield pair(
            f"ThinK: K channels, V row {label}",
            _POLICY,
            lambda k=keep: (ThinK(dim, k), row_values(k)),
        )


def _integers(dim: int, half: int, both: Callable[..., Row]) -> Iterator[Row]:
    for bits in (8, 4, 3):
        for kind in ("none", "hadamard"):
            basis = "" if kind == "none" else ", Hadamard"
            for search in (False, True) if bits < 8 and kind == "hadamard" else (False,):
                yield both(
                    f"int{bits}{basis}{', least squares' if search else ''}",
                    _INTEGER,
                    lambda b, n=bits, s=search: Integers(b, n, search=s),
                    kind,
                )
    for bits in (4, 3, 2):
        yield both(
            f"int{bits} half-step levels, Hadamard, centred",
            _INTEGER,
            lambda b, n=bits: Integers(b, n, half=True),
            "hadamard",
            centred=True,
        )
    for bits, power in ((8, 0.0), (4, 0.5), (4, 0.75)):
        yield both(
            f"row .5 x int{bits}, balanced" + (f", p = {power}" if power else ""),
            _BOTH,
            lambda b, n=bits, p=power: Pruned(b, None, half, n, power=p, search=n < 8),
            "balanced",
        )
    yield both(
        "row .7 x int4, balanced, p = 0.75",
        _BOTH,
        lambda b: Pruned(b, None, 20, 4, power=0.75, search=True),
        "balanced",
    )


def _published(
    dim: int,
    half: int,
    third: int,
    statistics: Callable[[], Statistics],
    both: Callable[..., Row],
    pair: Callable[..., Row],
    same: Callable[..., Row],
) -> Iterator[Row]:
    for label, keep in ((".5", half), (".7", third)):
        for fill in (True, False):
            name = f"SparK {label}{'' if fill else ', no fill'}"
            yield same(name, _CHANNEL, lambda k=keep, f=fill: Spark(dim, k, fill=f))
    for bits in (4, 2):
        yield same(
            f"KIVI {bits} bits, window 128, no sinks",
            _QUANT,
            lambda n=bits: Kivi(dim, n),
            schedule=Schedule(0, 128),
        )
        yield same(f"KIVI {bits} bits", _QUANT, lambda n=bits: Kivi(dim, n))
    yield same("KIVI 2 bits, groups of 64", _QUANT, lambda: Kivi(dim, 2, 64))
    for bits, rank in ((4, 4), (2, 4), (2, 1)):
        yield same(
            f"GEAR {bits} bits, rank {rank}, 2 %", _QUANT, lambda n=bits, r=rank: Gear(dim, n, r)
        )
    for bits in (4, 3, 2):
        yield both(
            f"TurboQuant {bits} bits",
            _QUANT,
            lambda b, n=bits: GaussianLevels(b, n),
            "hadamard",
        )
    yield pair("KVarN K 4, V 2 bits", _QUANT, lambda: (Kvarn(dim, 4), Kvarn(dim, 2)))
    for bits in (4, 3, 2):
        yield same(f"KVarN {bits} bits", _QUANT, lambda n=bits: Kvarn(dim, n))
    for schedule, label in ((Schedule(64, 256), "64 sinks, window 256"), (Schedule(), "4, 32")):
        yield Row(
            f"OSCAR 2 bits, {label}",
            _QUANT,
            lambda s=schedule, la=label: Codec(
                f"OSCAR 2 bits, {la}",
                _QUANT,
                Affine(make_basis(statistics(), True, "oscar"), 2, oscar_clips()),
                Affine(make_basis(statistics(), False, "oscar"), 2, oscar_clips()),
                s,
            ),
        )
    for share, high, low in ((0.3, 8, 2), (0.125, 8, 2)):
        yield same(
            f"MiKV {100 * share:g} % at {high}, others at {low} bits",
            _TOKEN,
            lambda a=share, h=high, n=low: MixedTokens(dim, a, h, n, "query"),
        )
    for share, high, low in ((0.6, 4, 2), (0.3, 8, 2)):
        yield same(
            f"ZipCache / ZipVL {100 * share:g} % at {high}, others at {low} bits",
            _TOKEN,
            lambda a=share, h=high, n=low: MixedTokens(dim, a, h, n, "channel"),
        )
    for share in (0.5625, 0.27):
        for joint in (True, False):
            yield pair(
                f"{'CSKV, joint heads' if joint else 'MatryoshkaKV, by head'} {100 * share:g} %",
                _RANK,
                lambda a=share, j=joint: (
                    LowRank(statistics(), True, a, joint=j),
                    LowRank(statistics(), False, a, joint=j),
                ),
            )


def _dropping(
    model: Llama,
    statistics: Callable[[], Statistics],
    head_order: Callable[[], list[tuple[int, int]]],
) -> Iterator[Row]:
    dim = model.head_dim
    for share in (0.5625, 0.375, 0.2):
        label = f"{100 * share:g} %"
        for kind, title in ((Streaming, "StreamingLLM"), (HeavyHitters, "H2O")):
            name = f"{title} {label}"
            yield Row(
                name,
                _DROP,
                lambda n=name, c=kind, a=share: c(n, _DROP, dim, a, Schedule()),
            )
        if share in (0.375, 0.2):
            yield Row(
                f"UNComp-like H2O {label}",
                _DROP,
                lambda n=f"UNComp-like H2O {label}", a=share: EntropyHeavyHitters(
                    n, _DROP, statistics(), a, Schedule()
                ),
            )
        if share > 0.2:
            yield Row(
                f"DuoAttention-like {label}",
                _DROP,
                lambda n=f"DuoAttention-like {label}", a=share: StreamingHeads(
                    n, _DROP, model, head_order(), a, Schedule()
                ),
            )


def _experiments(
    kv_heads: int, bases: Bases, both: Callable[..., Row], pair: Callable[..., Row]
) -> Iterator[Row]:
    """Steps from static bits to something better, each at the bytes of 3 and of 2 bits."""
    for bits in (3.25, 2.25):
        at = f"at {bits} bits"
        for title, kind, options in (
            ("5-bit row scale", "balanced", {}),
            ("5-bit row scale, centred", "balanced", {"centred": True}),
            ("5-bit row scale, Fisher metric", "fisher", {}),
        ):
            yield both(
                f"{title}, {at}",
                _EXPERIMENT,
                lambda b, n=bits - 5 / 64: StaticBits(b, n, log_bits=5),
                kind,
                **options,
            )
        yield both(
            f"5-bit row scale by search, balanced, {at}",
            _EXPERIMENT,
            lambda b, n=bits - 5 / 64: StaticBits(b, n, log_bits=5, search=True),
            "balanced",
        )
        for before in (False, True):
            for search in (False, True):
                title = "one budget, Fisher" + (", before RoPE" if before else "")
                yield pair(
                    f"{title}{', scale by search' if search else ''}, {at}",
                    _EXPERIMENT,
                    lambda n=bits, s=search, r=before: one_budget(
                        bases.pair("fisher", before_rope=r), n, search=s
                    ),
                )
        yield pair(
            f"one budget, Fisher, before RoPE, joint heads, scale by search, {at}",
            _EXPERIMENT,
            lambda n=bits: one_budget(
                bases.pair("fisher", before_rope=True, joint=True), n, search=True, heads=kv_heads
            ),
        )
        for title, kind, allocation in (
            ("codebooks, balanced", "balanced", {"shared": False, "whole_bits": True}),
            ("codebooks, Fisher", "fisher", {"shared": False, "whole_bits": True}),
            ("codebooks, Fisher, any levels", "fisher", {"shared": False}),
            ("one budget, Fisher, any levels", "fisher", {}),
            ("one budget, Fisher, whole bits", "fisher", {"whole_bits": True}),
            ("one budget, Fisher, any levels, no row scale", "fisher", {"log_bits": 0}),
        ):
            yield pair(
                f"{title}, {at}",
                _EXPERIMENT,
                lambda n=bits, k=kind, o=allocation: allocate(bases.pair(k), n, **o),
            )
        yield pair(
            f"one budget, Fisher, any levels, before RoPE, {at}",
            _EXPERIMENT,
            lambda n=bits: allocate(bases.pair("fisher", before_rope=True), n),
        )
        for before in (False, True):
            yield pair(
                f"entropy coded, row scale, Fisher{', before RoPE' if before else ''}, {at}",
                _EXPERIMENT,
                lambda n=bits, r=before: entropy_coded(bases.pair("fisher", before_rope=r), n),
            )


def _on_top(bases: Bases, both: Callable[..., Row]) -> Iterator[Row]:
    """The runtime's coded rows alone, and fewer bits of them with the largest errors mended."""
    for bits in (2, 3, 1.5, 2.5):
        yield both(f"coded {bits} bits", _ON_TOP, lambda b, n=bits: Coded(b, n), "balanced")
        for weak, keep, value_bits, positions, title in (
            (0, 4, 3, "bitmap", "bitmap over dims without bits"),
            (1, 6, 3, "bitmap", "bitmap over dims of 0 or 1 bit"),
            (0, 4, 3, "ideal", "ideal positions among dims without bits"),
            (7, 2, 4, "index", "outliers of a row"),
        ):
            yield both(
                f"coded {bits} bits, {title}, {keep} x {value_bits} bits",
                _ON_TOP,
                lambda b, n=bits, w=weak, k=keep, v=value_bits, p=positions: CodedSparse(
                    b, n, weak=w, keep=k, value_bits=v, positions=p
                ),
                "balanced",
            )

    def windowed() -> Codec:
        key, value = bases.pair("balanced")
        return Codec(name, _ON_TOP, Coded(key, 2), Coded(value, 2), Schedule(64, 256))

    name = "coded 2 bits; 64 sinks, window 256"
    yield Row(name, _ON_TOP, windowed)


def _grid(dim: int, half: int, bases: Bases) -> Iterator[Row]:
    """Sinks and windows for four codecs."""
    makers: dict[str, tuple[str, Callable[[Basis], Coder]]] = {
        "row .5": ("none", lambda b: Pruned(b, None, half)),
        "row .5, balanced": ("balanced", lambda b: Pruned(b, None, half)),
        "int4, Hadamard": ("hadamard", lambda b: Integers(b, 4)),
        "static 3 bits, balanced": ("balanced", lambda b: StaticBits(b, 3)),
    }
    for window in (0, 16, 32, 64, 128):
        for sinks in (0, 1, 4):
            for title, (kind, make) in makers.items():
                name = f"{title}; {sinks} sinks, window {window}"

                def build(
                    name: str = name,
                    kind: str = kind,
                    make: Callable[[Basis], Coder] = make,
                    schedule: Schedule = Schedule(sinks, window),  # noqa: B008 (bound here)
                ) -> Codec:
                    key, value = bases.pair(kind)
                    return Codec(name, _GRID, make(key), make(value), schedule)

                yield Row(name, _GRID, build)
