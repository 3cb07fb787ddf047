"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from .. import completion
from ..openai_shape import ChatAnswer
from ..types import SamplingParams
from .answers import Reply
from .errors import ApiError, client_errors
from .fields import check_fields, length_is_given, list_field
from .service import Job, Service


async def begin(service: Service, body: Mapping[str, Any]) -> Reply:
    """Hands a request's choices to the engine; ApiError for what is not served."""
    name = service.check_model(body)
    check_fields(body)
    with client_errors(body):
        fields = {k: v for k, v in body.items() if k not in ("messages", "tools", "stream")}
        request = completion.Request.of(None, fields)
        messages = completion.plain_messages(list_field(body, "messages"))
        tools = _tools(body) if request.use_tools else []
    if request.n > service.settings.max_choices:
        raise ApiError(
            400, f"n must be at most {service.settings.max_choices}", "invalid_value", "n"
        )
    with client_errors(body):
        prompts = await run_in_threadpool(lambda: service.prompts)
        ids = await run_in_threadpool(prompts.ids, messages, tools, request.continues)
    service.check_prompt(ids, "messages")
    with client_errors(body):
        await service.compile(request.sampling, body)
    prefixes = []
    if service.settings.system_prefix:
        with client_errors(body):
            n = await run_in_threadpool(prompts.beginning, ids, messages, tools)
        prefixes = [n] if n else []

    top = request.top_logprobs if request.logprobs else None
    read = tools if request.reads_calls else []
    answer = ChatAnswer(name, service.tokenizer, read, top)
    jobs: list[Job] = []
    try:
        for index in range(request.n):
            sampling = service.limited(
                _with_ends(request.sampling_of(index), prompts.end_tokens),
                ids,
                length_is_given(body),
                service.settings.reply_tokens,
            )
            with client_errors(body):
                generation = service.submit(
                    ids, sampling, own_text=not request.continues, prefixes=prefixes
                )
            jobs.append(
                Job(
                    generation,
                    answer.choice(index),
                    by_pieces=bool(read),
                    with_tokens=answer.reads_tokens or request.logprobs,
                    first=index == 0,
                )
            )
    except BaseException:
        service.release(jobs)
        raise
    return Reply(service, answer, jobs, len(ids), request.with_usage)


def _with_ends(sampling: SamplingParams, ends: tuple[int, ...]) -> SamplingParams:
    """Sampling that a chat's own end tokens stop, too."""
    if sampling.ignore_eos:
        return sampling
    return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *ends))


def _tools(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if not body.get("tools"):
        return []
    return completion.plain_tools(list_field(body, "tools"))
