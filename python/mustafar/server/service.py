"""What the routes share: the engine, its model's prompts, limits, and requests that are running."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from .. import _core, grammar
from ..completion import Tools, native_chat, set_messages
from ..engine import Engine
from ..engine import Request as Generation
from ..openai_shape import Choice, Piece
from ..types import GenerateResult, KVConfig, SamplingParams
from .errors import ApiError, queue_full
from .metrics import Metrics
from .settings import Settings

_COMPILE_SECONDS = 10.0  # of a grammar, waiting for others included
_SYSTEM_ROLES = ("system", "developer")
_MOST_BEGINNINGS = 64  # of conversations, whose ids are remembered


class ChatPrompts:
    """Prompts that a model's chat template makes of conversations.

    Raises TemplateError where the model has no template, TokenizerError where it has no tokenizer.
    """

    def __init__(self, engine: Engine, chat_template: str | None) -> None:
        self._model = engine.model._core
        folder = engine.model.folder
        self._template = (
            _core.ChatTemplate.from_folder(folder)
            if chat_template is None
            else _core.ChatTemplate.from_argument(chat_template, folder)
        )
        self.end_tokens = tuple(self._chat(None).end_tokens())
        self._beginnings: OrderedDict[str, list[int]] = OrderedDict()
        self._beginnings_lock = threading.Lock()

    def _chat(self, tools: Tools | None) -> _core.Chat:
        # Chats render for a session, which one thread may use at a time: each has its own, which
        # stays empty and costs nothing.
        session = _core.Session(self._model, KVConfig()._native(), None)
        return native_chat(self._model, session, tools=tools, chat_template=self._template)

    def ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Tools | None, continues: bool
    ) -> list[int]:
        """Token ids of a conversation and what starts the reply, or goes on inside the last one."""
        chat = self._chat(tools)
        set_messages(chat, messages)
        return chat.prompt_tokens(continues)

    def beginning(
        self, ids: Sequence[int], messages: Sequence[Mapping[str, Any]], tools: Tools | None
    ) -> int:
        """How many of a conversation's ids come before the user's first words, whatever they are.

        0 where it has neither a system message nor tools.
        """
        system = list(itertools.takewhile(lambda each: each["role"] in _SYSTEM_ROLES, messages))
        if not system and not tools:
            return 0
        key = json.dumps([system, list(tools or ())])
        with self._beginnings_lock:
            known = self._beginnings.get(key)
            if known is not None:
                self._beginnings.move_to_end(key)
        if known is None or list(ids[: len(known)]) != known:  # a template may say the time
            try:
                one, other = (
                    self.ids([*system, {"role": "user", "content": word}], tools, False)
                    for word in ("0", "x")
                )
            except _core.TemplateError:
                return 0
            known = one[: _n_common(one, other)]
            with self._beginnings_lock:
                self._beginnings[key] = known
                if len(self._beginnings) > _MOST_BEGINNINGS:
                    self._beginnings.popitem(last=False)
        return len(known) if list(ids[: len(known)]) == known else 0


@dataclass
class Job:
    """One choice of an answer: a request of the engine, and what takes its pieces."""

    generation: Generation
    choice: Choice
    by_pieces: bool = True  # whether the choice must see them one by one, stream or not
    with_tokens: bool = False  # pieces have ids and log-probabilities
    first: bool = True  # of its prompt's choices
    result: GenerateResult | None = field(default=None, init=False)


class Service:
    """The engine behind the routes."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics()
        self.tokenizer = engine.model.tokenizer
        self.names = settings.model_names or (engine.model.folder.name,)
        self.created = int(time.time())
        limit = int(engine.model.config["max_position_embeddings"])
        self.context = min(settings.context or limit, limit)
        self.stopping = False
        self._streams = 0
        self._active: set[Generation] = set()
        self._prompts: ChatPrompts | None = None
        self._prompts_lock = threading.Lock()
        self._compiler = ThreadPoolExecutor(1, "mustafar-grammar")

    @property
    def prompts(self) -> ChatPrompts:
        """How conversations become prompts; made when first used. Raises as it does."""
        with self._prompts_lock:
            if self._prompts is None:
                self._prompts = ChatPrompts(self.engine, self.settings.chat_template)
            return self._prompts

    def check_model(self, body: Mapping[str, Any]) -> str:
        """The name that a request calls the model by; ApiError for another model's."""
        name = body.get("model")
        if name is None:
            return self.names[0]
        if not isinstance(name, str):
            raise ApiError(400, f"model must be a text, not {name!r}", "invalid_type", "model")
        self.find_model(name)
        return name

    def find_model(self, name: str) -> None:
        """Raises ApiError for a name that is not this model's."""
        if name not in self.names:
            message = f"the model {name!r} is not here; there is {self.names[0]!r}"
            raise ApiError(404, message, "model_not_found", "model")

    def check_prompt(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError for a prompt that is empty or longer than allowed."""
        if not ids:
            raise ApiError(400, f"{param} has no tokens", "invalid_value", param)
        most = min(self.settings.max_prompt_tokens or self.context, self.context)
        if len(ids) > most:
            raise ApiError(
                400,
                f"{param} has {len(ids)} tokens, and at most {most} are allowed",
                "context_length_exceeded",
                param,
            )

    def limited(
        self, sampling: SamplingParams, prompt: Sequence[int], asked: bool, default: int
    ) -> SamplingParams:
        """Sampling whose reply fits the context. asked: the request says how long it may be."""
        room = max(self.context - len(prompt), 0)
        wanted = sampling.max_new_tokens if asked else (room if default < 0 else default)
        return replace(sampling, max_new_tokens=min(wanted, room))

    async def compile(self, sampling: SamplingParams, body: Mapping[str, Any]) -> None:
        """Compiles the grammar that replies follow, if any, so that :meth:`submit` has it at hand.

        It happens on a thread: others are answered meanwhile. Raises ApiError for a grammar that is
        too large or takes too long, else as constraint_factory does.
        """
        for name in grammar.NAMES:
            text = getattr(sampling, name)
            if text is None:
                continue
            param = name if name in body else "response_format"
            size, most = len(text.encode()), self.settings.max_grammar_bytes
            if size > most:
                message = f"{param} has {size} bytes, and at most {most} are allowed"
                raise ApiError(400, message, "invalid_value", param)
            work = asyncio.get_running_loop().run_in_executor(
                self._compiler, grammar.constraint_factory, self.engine.model._core, name, text
            )
            try:
                await asyncio.wait_for(work, _COMPILE_SECONDS)
            except asyncio.TimeoutError:
                message = f"{param} was not compiled within {_COMPILE_SECONDS:g} seconds"
                raise self.count_refused(ApiError(503, message, "timeout", param)) from None

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        own_text: bool,
        prefixes: Sequence[int] = (),
    ) -> Generation:
        """Gives the engine a prompt. Raises ApiError where the queue is full, else as it does."""
        if self.stopping:
            raise _stopping()
        try:
            generation = self.engine.submit(
                list(prompt),
                sampling,
                timeout=self.settings.timeout or None,
                own_text=own_text,
                prefixes=prefixes,
            )
        except _core.QueueFull as error:
            raise self.count_refused(queue_full(self.settings.retry_after)) from error
        self._active.add(generation)
        return generation

    def release(self, jobs: Sequence[Job]) -> None:
        """Ends what is still running of an answer that is complete, or that nobody waits for."""
        for job in jobs:
            job.generation.cancel()  # nothing, where it is done
            self._active.discard(job.generation)

    def stop(self) -> None:
        """Refuses requests from now on, and ends those that run."""
        self.stopping = True
        for generation in list(self._active):
            generation.cancel()

    @contextmanager
    def stream_slot(self) -> Iterator[None]:
        """A place among the streams at once; ApiError where there is none."""
        if self._streams >= self.settings.max_streams:
            full = queue_full(self.settings.retry_after)
            full.code = "too_many_streams"
            raise self.count_refused(full)
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    def count_refused(self, error: ApiError) -> ApiError:
        """The error, counted."""
        self.metrics.refused.add(code=error.code)
        return error

    async def pieces(self, job: Job, arrived: float) -> AsyncGenerator[Piece, None]:
        """What a job makes, as it is made; its result is there at the end.

        Raises ApiError where it failed, ran out of time before it made anything, or was ended by
        the server's own end. arrived: when the request came, by time.perf_counter().
        """
        last: float | None = None
        async with aclosing(_pieces(job)) as pieces:
            with self._failures():
                async for piece in pieces:
                    now = time.perf_counter()
                    if last is None:
                        self.metrics.first_token.observe(now - arrived)
                    else:
                        self.metrics.between_tokens.observe(now - last)
                    last = now
                    yield piece
        await self._take_result(job)

    async def finish(self, job: Job, arrived: float) -> GenerateResult:
        """Runs a job to its end without handing out its pieces; raises as :meth:`pieces`."""
        if job.by_pieces:
            async with aclosing(self.pieces(job, arrived)) as pieces:
                async for piece in pieces:
                    job.choice.take(piece)
            assert job.result is not None
            return job.result
        result = await self._take_result(job)
        job.choice.take(Piece(result.text, result.token_ids, result.logprobs))
        return result

    async def _take_result(self, job: Job) -> GenerateResult:
        with self._failures():
            result = await job.generation
        if result.finish_reason == "cancelled" and self.stopping:
            raise _stopping()
        if result.finish_reason == "timeout" and not result.token_ids:
            message = "the request made nothing within the server's time limit"
            raise self.count_refused(ApiError(503, message, "timeout"))
        job.result = result
        return result

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """What a request failed with, as the client's error where it is one."""
        try:
            yield
        except _core.OutOfMemory as error:
            raise ApiError(400, str(error), "kv_budget_exceeded") from error


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", "shutting_down")


async def _pieces(job: Job) -> AsyncGenerator[Piece, None]:
    if not job.with_tokens:
        async for text in job.generation:
            yield Piece(text)
        return
    async for step in job.generation.steps():
        ids = () if step.token_id is None else (step.token_id,)
        yield Piece(step.text, ids, () if step.logprob is None else (step.logprob,))
