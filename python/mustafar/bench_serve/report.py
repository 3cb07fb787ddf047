"""Figures of a load, as JSON and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .load import Record
from .watch import Watch

_PERCENTILES = (50, 90, 99)
# The client's event loop must be this much quicker than what is measured.
_LAG_SHARE = 0.1


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90, p99 and the mean of some; None of none."""
    if not values:
        return None
    found = {f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES}
    return {**found, "mean": float(np.mean(values))}


def figures(records: Sequence[Record], watch: Watch) -> dict[str, Any]:
    """What came out: seconds, bytes, counts. Times are of replies that came whole."""
    good = [record for record in records if record.outcome == "ok"]
    begin = min(record.due for record in records)
    seconds = max(record.ended for record in records) - begin
    n_output = sum(record.output_tokens for record in good)
    n_prompt = sum(record.prompt_tokens for record in good)
    return {
        "seconds": seconds,
        "requests": {
            "sent": len(records),
            "ok": len(good),
            "refused": sum(record.outcome == "refused" for record in records),
            "failed": sum(record.outcome == "failed" for record in records),
            "errors": dict(Counter(record.error for record in records if record.error)),
        },
        "tokens": {
            "prompt": n_prompt,
            "output": n_output,
            "counted_by": "server" if all(record.counted for record in good) else "client",
        },
        "time_to_first_token": percentiles([record.pieces[0] - record.due for record in good]),
        "time_between_tokens": percentiles(_gaps(good)),
        "time_per_output_token": percentiles(_per_token(good)),
        "request_time": percentiles([record.ended - record.due for record in good]),
        "output_tokens_per_second": n_output / seconds,
        "prompt_tokens_per_second": n_prompt / seconds,
        "requests_per_second": len(good) / seconds,
        "server": _server(watch),
        "client": {
            "late_sending": percentiles([record.sent - record.due for record in records]),
            "late_loop": percentiles(watch.lags),
            "cpu_share": watch.cpu_seconds / seconds,
        },
    }


def _gaps(records: Iterable[Record]) -> list[float]:
    return [float(gap) for record in records for gap in np.diff(record.pieces)]


def _per_token(records: Iterable[Record]) -> list[float]:
    return [
        (record.pieces[-1] - record.pieces[0]) / (record.output_tokens - 1)
        for record in records
        if record.output_tokens > 1 and len(record.pieces) > 1
    ]


def _server(watch: Watch) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: {"mean": float(np.mean(seen)), "most": max(seen)}
        for name, seen in watch.gauges.items()
    }
    if watch.kv_budget is not None:
        found["kv_budget"] = watch.kv_budget
    if watch.memory:
        found["resident_bytes"] = {"first": watch.memory[0], "most": max(watch.memory)}
    return found


def warnings(report: dict[str, Any]) -> list[str]:
    """What makes the figures doubtful."""
    said = []
    lag, between = report["client"]["late_loop"], report["time_between_tokens"]
    if lag and between and lag["p99"] > _LAG_SHARE * between["p50"]:
        said.append(
            f"the client was {1000 * lag['p99']:.1f} ms late (p99) beside "
            f"{1000 * between['p50']:.1f} ms between tokens (p50): it shares cores with others, "
            "or is the bottleneck"
        )
    if report["tokens"]["counted_by"] == "client" and report["requests"]["ok"]:
        said.append("the server does not count tokens: pieces of text are counted in their place")
    return said


def table(report: dict[str, Any]) -> str:
    """The figures for people."""
    requests, tokens = report["requests"], report["tokens"]
    lines = [
        f"requests: {requests['ok']} of {requests['sent']} whole, {requests['refused']} refused, "
        f"{requests['failed']} failed, in {report['seconds']:.2f} s",
        *(f"  {count} x {error}" for error, count in requests["errors"].items()),
        f"tokens: {tokens['prompt']} of prompts, {tokens['output']} of replies",
        "",
        f"{'milliseconds':<24}{'p50':>10}{'p90':>10}{'p99':>10}{'mean':>10}",
    ]
    for name in ("time_to_first_token", "time_between_tokens", "time_per_output_token",
                 "request_time"):  # fmt: skip
        lines.append(_row(name.replace("_", " "), report[name]))
    lines += [
        "",
        f"{'a second':<24}{report['output_tokens_per_second']:>10.2f} tokens of replies"
        f"{report['prompt_tokens_per_second']:>12.2f} of prompts"
        f"{report['requests_per_second']:>10.3f} requests",
        *_server_lines(report["server"]),
        "",
        _row("client late to send", report["client"]["late_sending"]),
        _row("client's loop late", report["client"]["late_loop"]),
        f"{'client computes':<24}{100 * report['client']['cpu_share']:>9.1f}% of a core",
        *(f"warning: {text}" for text in warnings(report)),
    ]
    return "\n".join(lines)


def _row(name: str, found: dict[str, float] | None) -> str:
    if found is None:
        return f"{name:<24}{'-':>10}{'-':>10}{'-':>10}{'-':>10}"
    return f"{name:<24}" + "".join(f"{1000 * found[key]:>10.2f}" for key in found)


def _server_lines(server: dict[str, Any]) -> list[str]:
    if not server:
        return []
    lines = ["", f"{'server':<24}{'mean':>12}{'most':>12}"]
    for name in ("running", "waiting", "paused"):
        if name in server:
            lines.append(f"{name:<24}{server[name]['mean']:>12.1f}{server[name]['most']:>12.0f}")
    if "kv_bytes" in server:
        mean, most = (server["kv_bytes"][key] / 2**20 for key in ("mean", "most"))
        budget = server.get("kv_budget", 0)
        limit = f" of {budget / 2**20:.1f} allowed" if budget else ""
        lines.append(f"{'caches, MiB':<24}{mean:>12.1f}{most:>12.1f}{limit}")
    if "resident_bytes" in server:
        most = server["resident_bytes"]["most"] / 2**20
        lines.append(f"{'its memory, MiB':<24}{'':>12}{most:>12.1f}")
    return lines
