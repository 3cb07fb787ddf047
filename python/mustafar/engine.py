"""Requests that share a model: they join and leave a running batch at any time."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from . import _core, checks
from .model import Model, Prompt
from .stream import Closing
from .types import GenerateResult, KVConfig, SamplingParams, TokenLogprob

PrefixCache = Literal["exact", "approximate", "off"]
OnPressure = Literal["pause", "sparser"]

# How long a wait may keep Ctrl-C waiting, seconds.
_SIGNAL_PERIOD = 0.1


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing, and what it has done since it was made.

    Attributes:
        running: Requests that hold a cache.
        waiting: Requests that have not begun.
        paused: Requests that have begun and gave their cache up to older ones.
        repruned: How often a cache was compressed again to make room.
        kv_bytes: Of all caches of the model, sessions' too.
        finished: Requests that came to their end.
        cancelled: Requests that were cancelled, or whose time was over.
        failed: Requests that ended with an error.
        generated_tokens: Tokens made.
        prompt_tokens: Tokens of prompts computed; those of a resumed request count again.
        reused_tokens: Tokens of prompts that were kept from others and not computed.
        prefixes: States of caches that are kept now.
        prefix_bytes: What those hold, a part of kv_bytes.
        swap_bytes: Of caches that paused requests keep beside ``kv_budget`` now.
    """

    running: int
    waiting: int
    paused: int
    repruned: int
    kv_bytes: int
    finished: int
    cancelled: int
    failed: int
    generated_tokens: int
    prompt_tokens: int
    reused_tokens: int
    prefixes: int
    prefix_bytes: int
    swap_bytes: int


class Step(NamedTuple):
    """A token that a request made.

    Attributes:
        text: What became certain with it, maybe nothing.
        token_id: None for text that was held back to the end.
        logprob: Its log-probabilities, where the request asks for them.
    """

    text: str
    token_id: int | None
    logprob: TokenLogprob | None


class Request:
    """A request that an :class:`Engine` works on. Any thread, and any event loop, may use it.

    Iterating gives the text made, piece by piece as it becomes certain, from its beginning;
    ``async for`` does the same, and ``await request`` gives the result, in a coroutine. Each
    raises what the request failed with.
    """

    def __init__(self, native: _core.Request, changes: _Changes) -> None:
        self._core = native
        self._changes = changes
        self._key = 0  # among the changes; 0: nobody has listened yet

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._core.done()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._core.prompt_tokens()

    def cancel(self) -> None:
        """Makes it end soon, with finish_reason ``"cancelled"`` and the text made so far."""
        self._core.cancel()

    def result(self, timeout: float | None = None) -> GenerateResult:
        """Waits for the end.

        Args:
            timeout: Seconds to wait; the request goes on when they are over.

        Raises:
            TimeoutError: It has not ended by then.
            Error: What it failed with, or whatever its logits processor raised.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self._core.wait(_slice(end)):
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"the request has not ended within {timeout} seconds")
        return GenerateResult._of(self._core.result())

    def __iter__(self) -> Iterator[str]:
        offset = 0
        while True:
            done = self._core.done()  # before the text is looked at, which is whole then
            piece = self._core.text_from(offset, _SIGNAL_PERIOD)
            offset += len(piece.encode())
            if piece:
                yield piece
            elif done:
                break
        self._core.result()  # raises what it failed with

    async def __aiter__(self) -> AsyncIterator[str]:
        offset = 0
        with self._changes.of(self) as changed:
            while True:
                changed.clear()
                done = self._core.done()
                piece = self._core.text_from(offset, 0)
                offset += len(piece.encode())
                if piece:
                    yield piece
                elif done:
                    break
                else:
                    await changed.wait()
        self._core.result()

    async def steps(self) -> AsyncGenerator[Step, None]:
        """As ``async for`` over the request, token by token.

        What is held back when it ends comes last, without a token. Tokens of a stop text that ends
        the output are among them, though not in the result.
        """
        data = b""
        given = seen = 0
        with self._changes.of(self) as changed:
            while True:
                changed.clear()
                done = self._core.done()
                made = self._core.tokens_from(seen)
                data += self._core.text_from(len(data), 0).encode()  # at least the tokens' text
                for token_id, end, logprob in made:
                    entry = None if logprob is None else TokenLogprob(*logprob)
                    yield Step(data[given:end].decode(), token_id, entry)
                    given = end
                seen += len(made)
                if done:
                    break
                await changed.wait()
        if given < len(data):
            yield Step(data[given:].decode(), None, None)
        self._core.result()

    async def _ended(self) -> GenerateResult:
        with self._changes.of(self) as changed:
            while not self._core.done():
                changed.clear()
                if not self._core.done():
                    await changed.wait()
        return GenerateResult._of(self._core.result())

    def __await__(self) -> Generator[Any, None, GenerateResult]:
        return self._ended().__await__()

    def __repr__(self) -> str:
        state = "done" if self._core.done() else "not done"
        return f"<mustafar.Request of {self.prompt_tokens} prompt tokens, {state}>"


class Engine(Closing):
    """Runs requests of a model on a thread of its own; they join and leave at any time.

    Every request gets what :meth:`Session.generate` would give it alone on a new session, whatever
    else runs, in the same calls. Where ``kv_budget`` is too small for all of them, new ones wait,
    and where it runs out the youngest is paused: its cache is dropped, and made again later by the
    same calls (``on_pressure`` may say otherwise). Sessions of the model may be used at the same
    time.

    A prompt is computed in one call. Where a request names ``prefixes``, or begins with a pinned
    one, each is a call of its own, as ``Session.prefill`` of it would be: its tokens see each other
    dense, and what follows sees them as the cache keeps them. After such a call the cache is kept
    for requests that begin with the same calls, so that they are computed once, and every result
    is the same bit for bit whether they were or not.

    Args:
        model: The model; it stays in memory until the engine is closed.
        kv: How caches are kept.
        max_batch: Requests that hold a cache and decode together at most.
        max_waiting: Requests that may wait to begin; one more is refused with :class:`QueueFull`.
        prefill_tokens: Tokens of prompts that are computed between two decode steps, about:
            streams that run wait no longer than for these, and a longer prompt advances by them.
        prefix_cache: ``"exact"``: prefixes are kept as said above. ``"approximate"``: also the
            caches of all requests that end well, and a prompt begins with what it shares with any
            of them, or one that runs, down to blocks of 64 tokens: what follows sees that as the
            cache keeps it, so that a result depends on what came before. ``"off"``: nothing is
            kept.
        prefix_bytes: What is kept may take so many bytes. It counts in ``kv_budget`` and makes
            room for requests, the least recently used first. None: up to ``kv_budget``, or 1 GiB
            where the model has none.
        on_pressure: What gives way, after kept prefixes, where ``kv_budget`` is used up.
            ``"pause"``: as said above. ``"sparser"``: before anybody waits or is paused, caches
            that decode are compressed again at the next smaller preset of ``lossless``,
            ``balanced`` and ``small``, the youngest first, so that more requests run at once. What
            such a request gets depends on what else runs, by what the preset loses and a little
            for being compressed twice; ``result.stats.repruned`` says how often that was. Prompts
            are computed, prefixes kept and paused requests begun again as ``kv`` says. For
            ``small`` the model is calibrated the first time, as for that preset, unless
            ``kv.profile`` is a calibrated one; a model without a tokenizer does without. CPU.
        swap_bytes: Host memory, beside ``kv_budget``, where paused requests may keep their caches
            as they are, where copying costs less than computing them again. What has no room there
            is computed again; no result depends on it.

    Raises:
        ValueError: An argument out of range; ``on_pressure="sparser"`` where no preset is smaller
            than ``kv``.
        DeviceError: ``on_pressure="sparser"`` on a GPU.
    """

    def __init__(
        self,
        model: Model,
        kv: KVConfig | None = None,
        *,
        max_batch: int = 64,
        max_waiting: int = 1024,
        prefill_tokens: int = 512,
        prefix_cache: PrefixCache = "exact",
        prefix_bytes: int | None = None,
        on_pressure: OnPressure = "pause",
        swap_bytes: int = 0,
    ) -> None:
        self._model = model
        self._kv = kv or KVConfig()
        self._core = _core.Engine(
            model._core,
            self._kv._native(),
            checks.integer("max_batch", max_batch),
            checks.integer("max_waiting", max_waiting),
            checks.integer("prefill_tokens", prefill_tokens),
            prefix_cache,
            None if prefix_bytes is None else checks.integer("prefix_bytes", prefix_bytes),
            on_pressure,
            checks.integer("swap_bytes", swap_bytes),
        )
        self._changes = _Changes()
        self._process = os.getpid()
        _engines.add(self)

    @property
    def model(self) -> Model:
        """The model."""
        return self._model

    @property
    def kv(self) -> KVConfig:
        """How caches are kept."""
        return self._kv

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        parse_special: bool = False,
        own_text: bool = False,
        prefixes: Sequence[int] = (),
        **sampling: Any,
    ) -> Request:
        """Gives the engine a prompt to continue, and returns at once.

        Args:
            prompt: Text (BOS is added) or ids, taken as they are.
            params: Sampling parameters; keyword arguments of :class:`SamplingParams` on top.
            priority: Higher ones begin first, equal ones in the order they came.
            timeout: Seconds from now, waiting included, after which it ends with finish_reason
                ``"timeout"`` and the text made so far.
            parse_special: Special tokens that a text spells become those tokens; by default they
                are text like any other.
            own_text: The text made is one of its own, as a chat's reply is, and does not continue
                the prompt's (which matters to the space before a first word).
            prefixes: Numbers of tokens of the prompt's beginning after which a call ends: the
                system prompt's, say, which other requests begin with too.

        Raises:
            QueueFull: ``max_waiting`` requests wait already.
            ValueError: An empty prompt, a bad id or parameter.
            ContextOverflow: A prompt longer than the context.
            OutOfMemory: A prompt that ``kv_budget`` could not hold while it is computed, even
                alone; the message says how many bytes that takes.
            StateError: The engine is closed.
        """
        native = self._core.submit(
            prompt,
            SamplingParams.merge(params, sampling)._native(self._model._core),
            checks.integer("priority", priority),
            None if timeout is None else checks.number("timeout", timeout),
            checks.flag("parse_special", parse_special),
            checks.flag("own_text", own_text),
            [checks.integer("prefixes", n) for n in prefixes],
        )
        return Request(native, self._changes)

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[str]:
        """Text, piece by piece, in a coroutine: ``async for piece in engine.stream(prompt)``.

        Arguments and errors are those of :meth:`submit`. Leaving the loop, or cancelling the task,
        cancels the request.
        """
        request = self.submit(prompt, params, **options)
        try:
            async for piece in request:
                yield piece
        finally:
            request.cancel()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> GenerateResult:
        """The whole result, in a coroutine; arguments and errors are those of :meth:`submit`.

        Cancelling the task cancels the request.
        """
        request = self.submit(prompt, params, **options)
        try:
            return await request
        finally:
            request.cancel()

    def pin(self, prefix: Prompt, *, parse_special: bool = False) -> int:
        """Makes tokens a prefix of every later request that begins with them, and more.

        They are computed with the first such request, and are the last to go where room is needed;
        then they are computed again.

        Args:
            prefix: Text (BOS is added) or ids. A text ends well where tokens do, at a special token
                or a line's end: what follows must not change its last token.
            parse_special: As in :meth:`submit`.

        Returns:
            How many tokens they are.

        Raises:
            ValueError: Nothing, or a bad id.
            ContextOverflow: More than the context.
            StateError: The engine is closed.
        """
        return self._core.pin(prefix, checks.flag("parse_special", parse_special))

    def unpin(self, prefix: Prompt, *, parse_special: bool = False) -> bool:
        """Takes :meth:`pin` back; False where the prefix is not pinned."""
        return self._core.unpin(prefix, checks.flag("parse_special", parse_special))

    def stats(self) -> EngineStats:
        """What it is doing; raises StateError in a forked child."""
        return EngineStats(**self._core.stats())

    def close(self) -> None:
        """Ends all requests, as if each had been cancelled, and the thread."""
        if os.getpid() != self._process:
            return  # a forked child, which has neither
        self._core.close()
        self._changes.close()

    def __repr__(self) -> str:
        return f"<mustafar.Engine of {self._model!r}>"


class _Changes:
    """Tells coroutines, whatever their loops, that requests have changed."""

    def __init__(self) -> None:
        self._core = _core.Changes()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._keys = itertools.count(1)
        self._waiting: dict[int, list[_Changed]] = {}

    def of(self, request: Request) -> _Changed:
        """An event that is set, on the running loop, whenever the request changes."""
        request._core.done()  # refuses a forked child, where the lock may be held for ever
        with self._lock:
            if self._thread is None:
                # It holds no reference to this object, which may go first.
                self._thread = threading.Thread(
                    target=_tell, args=(self._core, self._waiting), name="mustafar", daemon=True
                )
                self._thread.start()
            if request._key == 0:
                request._key = next(self._keys)
                request._core.listen(self._core, request._key)
        return _Changed(request._key, self._waiting, self._lock)

    def close(self) -> None:
        self._core.close()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        for several in list(self._waiting.values()):  # what changed last may not have been told
            for changed in list(several):
                changed.tell()

    def __del__(self) -> None:
        self._core.close()


class _Changed:
    """An event of one coroutine, which other threads set while its ``with`` block runs."""

    def __init__(self, key: int, waiting: dict[int, list[_Changed]], lock: threading.Lock) -> None:
        self._key = key
        self._waiting = waiting
        self._lock = lock
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def __enter__(self) -> _Changed:
        with self._lock:
            self._waiting.setdefault(self._key, []).append(self)
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            several = self._waiting[self._key]
            several.remove(self)
            if not several:
                del self._waiting[self._key]

    def tell(self) -> None:
        # A loop that is closed has nobody waiting.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._event.set)

    def clear(self) -> None:
        self._event.clear()

    async def wait(self) -> None:
        await self._event.wait()


def _tell(changes: _core.Changes, waiting: dict[int, list[_Changed]]) -> None:
    while keys := changes.wait():
        for key in keys:
            for changed in list(waiting.get(key, ())):
                changed.tell()


def _slice(end: float | None) -> float:
    if end is None:
        return _SIGNAL_PERIOD
    return max(0.0, min(_SIGNAL_PERIOD, end - time.monotonic()))


# The threads of engines that nobody closed end before the interpreter does.
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_engines() -> None:
    for engine in list(_engines):
        engine.close()
