"""``POST /v1/completions``: texts that are continued, without a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool

from .. import checks, completion
from ..openai_shape import TextAnswer
from .answers import Reply
from .errors import ApiError, client_errors, refused
from .fields import check_fields, length_is_given
from .service import Job, Service

_DEFAULT_TOKENS = 16  # OpenAI's
_OF_CHATS = (
    "messages",
    "tools",
    "tool_choice",
    "top_logprobs",
    "continue_final_message",
    "add_generation_prompt",
)


async def begin(service: Service, body: Mapping[str, Any]) -> Reply:
    """Hands a request's choices to the engine; ApiError for what is not served."""
    name = service.check_model(body)
    check_fields(body)
    _refuse(body)
    with client_errors(body):
        request = completion.Request.of(None, _request_fields(body))
        prompts = _prompts(body)
    if request.n * len(prompts) > service.settings.max_choices:
        most = service.settings.max_choices
        message = f"n times the number of prompts must be at most {most}"
        raise ApiError(400, message, "invalid_value", "n" if request.n > 1 else "prompt")
    all_ids = []
    for prompt in prompts:
        with client_errors(body):
            ids = await run_in_threadpool(_ids, service, prompt)
        service.check_prompt(ids, "prompt")
        all_ids.append(ids)
    with client_errors(body):
        await service.compile(request.sampling, body)

    top = request.top_logprobs if request.logprobs else None
    answer = TextAnswer(name, service.tokenizer, top)
    jobs: list[Job] = []
    try:
        for ids in all_ids:
            for index in range(request.n):
                sampling = service.limited(
                    request.sampling_of(index), ids, length_is_given(body), _DEFAULT_TOKENS
                )
                with client_errors(body):
                    generation = service.submit(ids, sampling, own_text=False)
                    choice = answer.choice(len(jobs), ids)
                jobs.append(
                    Job(
                        generation,
                        choice,
                        by_pieces=False,
                        with_tokens=request.logprobs,
                        first=index == 0,
                    )
                )
    except BaseException:
        service.release(jobs)
        raise
    prompt_tokens = sum(map(len, all_ids))
    return Reply(service, answer, jobs, prompt_tokens, request.with_usage)


def _refuse(body: Mapping[str, Any]) -> None:
    if body.get("echo"):
        raise refused("echo", "is not served")
    if body.get("suffix"):
        raise refused("suffix", "is not served")
    if body.get("best_of") not in (None, body.get("n") or 1):
        raise refused("best_of", "is not served, but where it equals n")
    for name in _OF_CHATS:
        if body.get(name) is not None:
            raise refused(name, "belongs to /v1/chat/completions")


def _request_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    taken = ("prompt", "stream", "echo", "suffix", "best_of")
    fields = {name: value for name, value in body.items() if name not in taken}
    if isinstance(fields.get("logprobs"), bool):
        raise TypeError("logprobs must be a number of alternatives, from 0 to 20")
    return fields


def _prompts(body: Mapping[str, Any]) -> list[str | list[int]]:
    """The prompts, of one or several, as texts or ids."""
    prompt = body.get("prompt")
    if prompt is None:
        raise ValueError("prompt is missing")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise TypeError("prompt must be a text, a list of texts, or token ids")
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if all(isinstance(item, list) for item in prompt):
        return [_token_ids(item) for item in prompt]
    return [_token_ids(prompt)]


def _token_ids(ids: list[Any]) -> list[int]:
    return [checks.integer("prompt", id, 0) for id in ids]


def _ids(service: Service, prompt: str | list[int]) -> list[int]:
    return service.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
