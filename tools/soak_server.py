"""Many clients of one server, some of them rude: are replies right, does anything leak?

    PYTHONPATH=build/cpu-test/python python tools/soak_server.py --requests 10000

Starts `mustafar serve` with f32 arithmetic, few bytes for caches and short queues, and sends it
requests from 64 clients: whole replies, streams, several choices, conversations, texts, ids; some
that are cancelled in the midst of a stream, whose client goes before it gets an answer or before it
has sent all of its request, whose body is too large, declared or not, or is wrong. Every reply is
compared with what its request gets alone in this process; what a cancelled stream had said must be
the beginning of that. Afterwards nothing may run, hold a cache or a connection, or have failed, and
memory may not have grown by more than --slack. Exits with 1 where something is wrong. Prints JSON.
What stands behind `--` are more options of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mustafar
from mustafar.bench_serve.http import Address, HttpError, ask, ask_text
from mustafar.bench_serve.process import started
from mustafar.bench_serve.report import percentiles
from mustafar.bench_serve.watch import Watch, numbers_of, resident_bytes

MAX_BODY = 64 << 10
SERVER = (
    *("--dtype", "f32", "-t", "1", "--kv", "mustafar", "--prefill-tokens", "128"),
    *("--max-batch", "24", "--max-waiting", "30", "--max-streams", "48"),
    *("--max-body", str(MAX_BODY), "--model-name", "soak"),
)
TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
WORDS = "def import class return the of a file list text parse value 12 , . ( ) : Grüße 😀".split()
N_KINDS = 160  # different requests; each is run alone once
WAIT_SECONDS = 120.0

# What becomes of a request, and how often of 100.
MANNERS = {
    "whole": 28,
    "stream": 36,
    "cancel": 14,  # closes while the stream runs
    "leave": 7,  # closes before the answer
    "stop sending": 4,  # closes in the midst of its body
    "large": 3,
    "large, undeclared": 3,
    "wrong": 5,
}


@dataclass(frozen=True)
class Kind:
    """A request, and the texts of its choices when it runs alone."""

    path: str
    body: dict[str, Any]
    texts: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass
class Found:
    """What the clients saw."""

    manners: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    compared: int = 0
    refused: int = 0  # and sent again


def make_kinds(
    model: mustafar.Model, kv: mustafar.KVConfig, args: argparse.Namespace
) -> list[Kind]:
    """Requests at random; many prompts begin as others do."""
    rng = random.Random(args.seed)
    common = [" ".join(rng.choices(WORDS, k=150)) for _ in range(4)]
    kinds = []
    for _ in range(args.kinds):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 120)))
        if rng.random() < 0.5:
            text = rng.choice(common)[: rng.randint(100, 400)] + text
        body: dict[str, Any] = {
            "model": "soak",
            "max_tokens": rng.choice((1, 3, 8, 16, args.most_tokens)),
            "temperature": rng.choice((0, 0.9)),
            "seed": rng.randint(0, 1000),
            "ignore_eos": True,
        }
        if rng.random() < 0.2:
            body["n"] = 2
        if rng.random() < 0.2:
            body["stop"] = rng.choice(("e", " the", "\n"))
        kinds.append(_alone(model, kv, rng.choice(("text", "ids", "chat")), text, body))
    return kinds


def _alone(
    model: mustafar.Model, kv: mustafar.KVConfig, form: str, text: str, body: dict[str, Any]
) -> Kind:
    if form == "chat":
        body = {**body, "messages": [{"role": "user", "content": text}]}
        texts, reasons = [], []
        for i in range(body.get("n", 1)):  # each with a cache of its own
            alone = {**body, "n": None, "seed": body["seed"] + i}
            answer = model.chat_completion(kv=kv, **alone)
            assert isinstance(answer, dict)
            texts.append(answer["choices"][0]["message"]["content"])
            reasons.append(answer["choices"][0]["finish_reason"])
        return Kind(CHATS, body, tuple(texts), tuple(reasons))
    prompt: Any = text if form == "text" else model.tokenizer.encode(text)
    sampling = {name: body[name] for name in ("temperature", "ignore_eos", "stop") if name in body}
    results = [
        mustafar.Session(model, kv).generate(
            prompt, seed=body["seed"] + i, max_new_tokens=body["max_tokens"], **sampling
        )
        for i in range(body.get("n", 1))
    ]
    texts = [result.text for result in results]
    reasons = [result.finish_reason for result in results]
    return Kind(TEXTS, {**body, "prompt": prompt}, tuple(texts), tuple(reasons))


class Clients:
    """Sends requests and compares replies."""

    def __init__(self, address: Address, kinds: list[Kind], seed: int) -> None:
        self.found = Found()
        self._address = address
        self._kinds = kinds
        self._seed = seed

    async def run(self, requests: range, clients: int) -> None:
        """Sends requests, by their numbers, from so many clients."""
        left = iter(requests)

        async def client() -> None:
            for number in left:
                await self._one(random.Random(f"{self._seed} {number}"))

        await asyncio.gather(*(client() for _ in range(clients)))

    async def _one(self, rng: random.Random) -> None:
        kind = rng.choice(self._kinds)
        manner = rng.choices(list(MANNERS), list(MANNERS.values()))[0]
        self.found.manners[manner] += 1
        try:
            outcome = await asyncio.wait_for(
                self._send_until_taken(manner, kind, rng), WAIT_SECONDS
            )
        except asyncio.TimeoutError:
            outcome = "no end"
            self.found.wrong.append(f"{manner}: no end within {WAIT_SECONDS:g} s")
        except (OSError, HttpError) as error:
            outcome = "broken"
            self.found.wrong.append(f"{manner}: {error}")
        self.found.outcomes[outcome] += 1

    async def _send_until_taken(self, manner: str, kind: Kind, rng: random.Random) -> str:
        while (outcome := await self._send(manner, kind, rng)) == "refused":
            self.found.refused += 1
            await asyncio.sleep(rng.uniform(0.2, 1))
        return outcome

    async def _send(self, manner: str, kind: Kind, rng: random.Random) -> str:
        if manner in ("leave", "stop sending", "large, undeclared"):
            return await self._rude(manner, kind, rng)
        body = dict(kind.body)
        if manner == "large":
            body["user"] = "x" * MAX_BODY
        elif manner == "wrong":
            body[rng.choice(("temperature", "max_tokens", "wibble", "stream"))] = -1
        body["stream"] = manner in ("stream", "cancel") if manner != "wrong" else body.get("stream")
        async with ask(self._address, "POST", kind.path, body) as answer:
            if answer.status == 429:
                return "refused"
            expected = {"large": 413, "wrong": 400}.get(manner, 200)
            if answer.status != expected:
                self.found.wrong.append(f"{manner}: {answer.status} {await answer.json()}")
                return "wrong status"
            if expected != 200:
                return "refused by name" if "error" in await answer.json() else "wrong"
            if manner == "whole":
                self._compare(kind, _texts_of(await answer.json()), whole=True)
                return "whole"
            return await self._read(kind, answer, rng if manner == "cancel" else None)

    async def _read(self, kind: Kind, answer: Any, rng: random.Random | None) -> str:
        """Reads a stream, to its end or to a place at random."""
        said: dict[int, tuple[str, str | None]] = {}
        left = rng.randint(0, 6) if rng else -1
        last: float | None = None
        done = False
        async for data in answer.events():
            if left == 0:
                break
            left -= 1
            if data == b"[DONE]":
                done = True
                continue
            event = json.loads(data)
            if "error" in event:
                self.found.wrong.append(f"stream: {event['error']}")
                return "error"
            now = time.perf_counter()
            if last is not None:
                self.found.gaps.append(now - last)
            last = now
            for choice in event["choices"]:
                piece = choice.get("delta", choice)
                text, reason = said.get(choice["index"], ("", None))
                text += piece.get("text") or piece.get("content") or ""
                said[choice["index"]] = (text, choice.get("finish_reason") or reason)
        if rng is None and not done:
            self.found.wrong.append("stream: it ended without [DONE]")
        self._compare(kind, said, whole=done)
        return "stream" if done else "cancelled"

    def _compare(self, kind: Kind, said: dict[int, tuple[str, str | None]], whole: bool) -> None:
        self.found.compared += 1
        if whole:
            alone = dict(enumerate(zip(kind.texts, kind.reasons, strict=True)))
            right = said == alone
        else:
            right = all(kind.texts[i].startswith(text) for i, (text, _) in said.items())
        if not right:
            self.found.wrong.append(f"{kind.body}: {said} instead of {kind.texts}")

    async def _rude(self, manner: str, kind: Kind, rng: random.Random) -> str:
        """A connection that is closed before its time, or that sends what never ends."""
        reader, writer = await asyncio.open_connection(self._address.host, self._address.port)
        head = (
            f"POST {kind.path} HTTP/1.1\r\nHost: {self._address.host}\r\n"
            "Content-Type: application/json\r\n"
        )
        body = {**kind.body, "stream": rng.random() < 0.5}
        try:
            if manner == "large, undeclared":
                writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
                return await _send_without_end(reader, writer)
            data = json.dumps(body).encode()
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode())
            writer.write(data if manner == "leave" else data[: rng.randrange(len(data))])
            await writer.drain()
            await asyncio.sleep(rng.choice((0, 0.002, 0.02, 0.1)))
            return "left"
        finally:
            if rng.random() < 0.3:
                writer.transport.abort()  # a reset instead of an end
            writer.close()


async def _send_without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    part = b" " * 8192
    with suppress(ConnectionError):
        for _ in range(2 * MAX_BODY // len(part)):
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            await writer.drain()
    line = b""
    with suppress(ConnectionError):
        line = await reader.readline()
    if not line:
        return "closed"  # the answer may be lost where the rest of a body is reset
    if b" 413 " not in line:
        raise HttpError(f"instead of 413: {line!r}")
    return "refused by name"


def _texts_of(answer: dict[str, Any]) -> dict[int, tuple[str, str | None]]:
    return {
        choice["index"]: (
            choice["message"]["content"] if "message" in choice else choice["text"],
            choice["finish_reason"],
        )
        for choice in answer["choices"]
    }


async def idle_state(address: Address, pid: int) -> dict[str, float]:
    """Numbers of a server that has nothing to do; HttpError where it does not become idle."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        numbers = numbers_of(await ask_text(address, "/metrics") or "")
        busy = [numbers[f"mustafar_requests_{what}"] for what in ("running", "waiting", "paused")]
        files = len(os.listdir(f"/proc/{pid}/fd"))
        # One connection is this one; others close when the server sees that their clients are gone.
        if not any(busy) and _sockets(pid) <= 3:
            break
        if time.monotonic() > end:
            raise HttpError(f"the server does not become idle: {busy}, {files} files")
        await asyncio.sleep(0.05)
    return {
        "kv_bytes": numbers["mustafar_kv_bytes"],
        "failed": numbers["mustafar_requests_failed_total"],
        "sockets": _sockets(pid),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "resident_bytes": float(resident_bytes(pid) or 0),
    }


def _sockets(pid: int) -> int:
    folder = Path(f"/proc/{pid}/fd")
    found = 0
    for name in os.listdir(folder):
        with suppress(OSError):
            found += os.readlink(folder / name).startswith("socket:")
    return found


async def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Runs it all; returns what was found."""
    kv = mustafar.KVConfig.preset("mustafar")
    with mustafar.Model(args.model, dtype="f32", threads=1) as model:
        kinds = make_kinds(model, kv, args)
    options = ["-m", str(args.model)] if args.model else []
    words = (*options, *SERVER, "--kv-budget", args.kv_budget, *args.serve)
    log: list[str] = []

    def keep(line: str) -> None:
        if " INFO " not in line:
            log.append(line)

    async with started(words, keep) as server:
        address = Address.of(server.url)
        clients = Clients(address, kinds, args.seed)
        # Memory that is kept for reuse, and threads, are there after some requests.
        n_first = min(args.requests // 4, 2000)
        states = []
        steps = (0, n_first, n_first + (args.requests - n_first) // 2, args.requests)
        watch = Watch(address, every=0.05)  # 300 requests may take less than a second
        for first, last in itertools.pairwise(steps):
            async with watch:
                await clients.run(range(first, last), args.clients)
            states.append({"requests": last, **await idle_state(address, server.pid)})
        metrics = await ask_text(address, "/metrics") or ""
    found = clients.found
    wrong = [*found.wrong, *leaks(states, args.slack)]
    return {
        "requests": args.requests,
        "manners": dict(found.manners),
        "outcomes": dict(found.outcomes),
        "refused_and_sent_again": found.refused,
        "replies_compared": found.compared,
        "time_between_events": percentiles(found.gaps),
        "most": {name: max(seen) for name, seen in watch.gauges.items()},
        "states": states,
        "metrics": {
            line.split(" ")[0]: float(line.rpartition(" ")[2])
            for line in metrics.splitlines()
            if line.startswith(("mustafar_http", "mustafar_requests", "mustafar_disconnects"))
        },
        "wrong": len(wrong),
        "what_is_wrong": wrong[:20],
        "log": log[:100],
    }


def leaks(states: list[dict[str, float]], slack: int) -> list[str]:
    """What is more at the end than after the first requests."""
    first, last = states[0], states[-1]
    said = []
    for name, most in (
        ("kv_bytes", 0.0),
        ("failed", 0.0),
        ("sockets", first["sockets"]),
        # anyio's worker threads end by themselves, and there are at most 40.
        ("threads", first["threads"] + 40),
        ("resident_bytes", first["resident_bytes"] + slack),
    ):
        if last[name] > most:
            said.append(f"{name}: {last[name]:.0f} at the end, where {most:.0f} may be")
    return said


def parser() -> argparse.ArgumentParser:
    """What reads the options, up to a ``--``."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("-m", "--model", type=Path, help="folder; without: the demo model")
    result.add_argument("--requests", type=int, default=10_000)
    result.add_argument("--clients", type=int, default=64)
    result.add_argument("--kinds", type=int, default=N_KINDS, help="different requests")
    result.add_argument("--most-tokens", type=int, default=40, help="of a reply")
    result.add_argument("--kv-budget", default="24M", help="for all caches together")
    result.add_argument("--slack", type=int, default=32 << 20, help="bytes that memory may grow by")
    result.add_argument("--seed", type=int, default=0)
    return result


def main() -> int:
    """Reads the options, runs, prints; returns the exit status."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = parser().parse_args(words[:cut])
    args.serve = words[cut + 1 :]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    found = asyncio.run(soak(args))
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
