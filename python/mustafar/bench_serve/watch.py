"""What is observed beside the requests: the server's caches and memory, and the client itself."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

from .http import Address, HttpError, ask_text

_GAUGE_SECONDS = 0.25  # between two looks at the server
_LAG_SECONDS = 0.01  # between two looks at the client's event loop
_GAUGES = {
    "mustafar_kv_bytes": "kv_bytes",
    "mustafar_requests_running": "running",
    "mustafar_requests_waiting": "waiting",
    "mustafar_requests_paused": "paused",
}
_BUDGET = "mustafar_kv_budget_bytes"


@dataclass
class Watch:
    """Looks at a server and at this process while a load runs.

    Attributes:
        address: The server, whose /metrics is read if there.
        pid: Its process, where it runs on this machine.
        gauges: Of /metrics, all that was seen of each.
        kv_budget: The limit of the caches; 0: none. None: the server has no such metrics.
        memory: Resident bytes of the process, as seen.
        lags: Seconds by which the client's event loop was late.
        cpu_seconds: That the client computed.
        every: Seconds between two looks.
    """

    address: Address
    pid: int | None = None
    gauges: dict[str, list[float]] = field(default_factory=dict)
    kv_budget: float | None = None
    memory: list[int] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    every: float = _GAUGE_SECONDS
    _has_metrics: bool = field(default=True, init=False)

    async def __aenter__(self) -> Watch:
        await self._look()
        self._cpu = time.process_time()
        self._tasks = [asyncio.create_task(self._look_on()), asyncio.create_task(self._lag())]
        return self

    async def __aexit__(self, *error: object) -> None:
        self.cpu_seconds = time.process_time() - self._cpu
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(self.every)
            await self._look()

    async def _look(self) -> None:
        if self.pid is not None and (size := resident_bytes(self.pid)) is not None:
            self.memory.append(size)
        if not self._has_metrics:
            return
        try:
            text = await ask_text(self.address, "/metrics")
        except (OSError, HttpError):
            return
        self._has_metrics = text is not None
        numbers = numbers_of(text or "")
        for name, short in _GAUGES.items():
            if name in numbers:
                self.gauges.setdefault(short, []).append(numbers[name])
        self.kv_budget = numbers.get(_BUDGET, self.kv_budget)

    async def _lag(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_LAG_SECONDS)
            self.lags.append(max(0.0, time.perf_counter() - before - _LAG_SECONDS))


def numbers_of(text: str) -> dict[str, float]:
    """Numbers without labels in Prometheus's text format, by name."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name and name != "#" and "{" not in name:
            try:
                found[name] = float(value)
            except ValueError:
                continue
    return found


def resident_bytes(pid: int) -> int | None:
    """Memory that a process of this machine has; None where that can't be seen."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None
