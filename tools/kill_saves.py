"""Kills a process with SIGKILL while it saves, again and again; what it wrote is old or new.

A child saves two contents in turn over the same file, of a session, a chat or a KV profile; it is
killed after a random time; the file then has to hold one of the two, whole. Prints how often each
was found, and how many temporary files the kills left behind (which are removed here).

    python tools/kill_saves.py -n 1000 [--model FOLDER]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mustafar

Save = Callable[[Path], None]
Look = Callable[[Path], str]


def of_sessions(model: mustafar.Model) -> tuple[list[Save], Look]:
    """Two sessions, and which of them a file holds."""
    a, b = mustafar.Session(model), mustafar.Session(model)
    a.prefill(list(range(3, 203)))
    b.prefill(list(range(5, 505)))
    tokens = {"a": a.tokens, "b": b.tokens}

    def look(path: Path) -> str:
        found = mustafar.Session.load(model, path).tokens
        return next(name for name, expected in tokens.items() if found == expected)

    return [a.save, b.save], look


def of_chats(model: mustafar.Model) -> tuple[list[Save], Look]:
    """Two conversations; a cache of the other one is a cache that is not used."""

    def new_chat() -> mustafar.Chat:
        return mustafar.Chat(mustafar.Session(model), chat_template="plain", date="2026-01-01")

    chats = {name: new_chat() for name in ("a", "b")}
    for name, chat in chats.items():
        chat.send(f"This is {name}. " * 20, max_new_tokens=8, temperature=0.0)
    messages = {name: chat.messages for name, chat in chats.items()}

    def look(path: Path) -> str:
        chat = new_chat()
        cached = chat.load(path)
        name = next(name for name, expected in messages.items() if chat.messages == expected)
        return name if cached else f"{name}, without its cache"

    return [chat.save for chat in chats.values()], look


def of_profiles(model: mustafar.Model) -> tuple[list[Save], Look]:
    """Two profiles of one shape."""
    a = mustafar.Profile.hadamard(model._core)
    b = mustafar.Profile(
        a.k_forward, a.k_backward, a.v_forward, a.v_backward, None, None, "klt", "", "0" * 16
    )
    hashes = {a.hash(): "a", b.hash(): "b"}
    return [a.save, b.save], lambda path: hashes[mustafar.Profile.load(path).hash()]


KINDS = {"session": of_sessions, "chat": of_chats, "profile": of_profiles}


def save_until_killed(saves: list[Save], path: Path) -> None:
    """The child's work."""
    while True:
        for save in saves:
            save(path)


def kill_often(kind: str, n: int, model: mustafar.Model, rng: random.Random) -> Counter[str]:
    """n kills; counts what was found. Raises where a file is neither old nor new."""
    found: Counter[str] = Counter()
    saves, look = KINDS[kind](model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        start = time.perf_counter()
        for save in saves:
            save(path)
        seconds = time.perf_counter() - start  # of two saves
        for _ in range(n):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of fork()
                child = os.fork()
            if child == 0:
                try:
                    save_until_killed(saves, path)
                finally:
                    os._exit(1)
            time.sleep(rng.uniform(0, 2 * seconds))
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status != -signal.SIGKILL:
                raise RuntimeError(f"the child ended by itself: {status}")
            found[look(path)] += 1
            for file in Path(folder).iterdir():
                if ".tmp-" in file.name:
                    found["temporary files left"] += 1
                    file.unlink()
    return found


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-n", type=int, default=1000, help="kills in all")
    parser.add_argument("--model", help="model folder; the demo model by default")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with mustafar.Model(options.model, device="cpu", threads=1) as model:
        for i, kind in enumerate(KINDS):
            n = options.n // len(KINDS) + (i < options.n % len(KINDS))
            found = kill_often(kind, n, model, rng)
            print(f"{kind}: {n} kills: " + ", ".join(f"{k} {v}" for k, v in sorted(found.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
