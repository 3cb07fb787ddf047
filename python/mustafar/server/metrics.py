"""Counts and times in the text format that Prometheus reads (version 0.0.4)."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[tuple[str, str], ...]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass
class Counter:
    """Numbers that only grow, one for every combination of labels."""

    name: str
    help: str
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, amount: float = 1, **labels: str) -> None:
        """Adds to the number with these labels."""
        key = tuple(labels.items())
        self.values[key] = self.values.get(key, 0) + amount

    def lines(self) -> Iterator[str]:
        """As it is written."""
        yield from _head(self.name, self.help, "counter")
        for labels, value in self.values.items():
            yield _line(self.name, labels, value)


@dataclass
class Histogram:
    """How often something took how long, in seconds."""

    name: str
    help: str
    bounds: Sequence[float] = _SECONDS
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, seconds: float) -> None:
        """Counts one more."""
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def lines(self) -> Iterator[str]:
        """As it is written: of every bound, how many did not exceed it."""
        yield from _head(self.name, self.help, "histogram")
        so_far = 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            so_far += count
            limit = "+Inf" if bound is None else f"{bound:g}"
            yield _line(self.name + "_bucket", (("le", limit),), so_far)
        yield _line(self.name + "_sum", (), self.total)
        yield _line(self.name + "_count", (), so_far)


class Metrics:
    """What a server counts itself, beside what its engine does."""

    def __init__(self) -> None:
        self.http = Counter(
            "mustafar_http_requests_total", "HTTP requests answered, by route and status."
        )
        self.refused = Counter(
            "mustafar_requests_refused_total", "Requests that a limit refused, by its code."
        )
        self.disconnects = Counter(
            "mustafar_disconnects_total", "Requests cancelled because the client was gone."
        )
        self.first_token = Histogram(
            "mustafar_time_to_first_token_seconds", "From a request's arrival to its first text."
        )
        self.between_tokens = Histogram(
            "mustafar_time_between_tokens_seconds", "Between two pieces of a reply's text."
        )
        self.duration = Histogram(
            "mustafar_request_seconds", "From a request's arrival to the end of its reply."
        )

    def text(
        self, gauges: Mapping[str, tuple[str, float]], counts: Mapping[str, tuple[str, float]]
    ) -> str:
        """The whole page. gauges, counts: help and value of further numbers, by name."""
        lines: list[str] = []
        for kind, numbers in (("gauge", gauges), ("counter", counts)):
            for name, (help, value) in numbers.items():
                lines += _head(name, help, kind)
                lines.append(_line(name, (), value))
        self.disconnects.values.setdefault((), 0)
        for metric in (self.http, self.refused, self.disconnects):
            lines += metric.lines()
        for times in (self.first_token, self.between_tokens, self.duration):
            lines += times.lines()
        return "\n".join(lines) + "\n"


def _head(name: str, help: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]


def _line(name: str, labels: Labels, value: float) -> str:
    said = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    number = str(int(value)) if value == int(value) else repr(value)
    return f"{name}{{{said}}} {number}" if said else f"{name} {number}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
