"""A measurement, from options to figures."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from . import load, report, traffic
from .http import Address, HttpError, ask_json
from .load import Sender
from .process import started
from .prompts import FolderTokenizer, Prompt, PromptMaker, ServerTokenizer, Tokenizer, usual_text
from .watch import Watch

_USUAL_CONTEXT = 2048


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Sends the load that options describe; returns the report.

    Raises ValueError for options that do not fit together or the server, OSError and HttpError
    where the server can't be used, StartError where it does not start.
    """
    async with _server(options) as (url, pid, command):
        sender, context = await _sender(options, url)
        lengths = _lengths(options, context)
        made = await _prompts(options, sender, lengths)
        # Those of the warm-up are others: what a server keeps of them must not help the rest.
        prompts, warmup = made[: options.requests], made[options.requests :]
        for prompt in warmup:
            record = await sender.send(prompt, 0.0)
            if record.outcome != "ok":
                raise ValueError(f"a first request got no reply: {record.error}")
        async with Watch(sender.address, pid) as watch:
            if options.rate is not None:
                offsets = traffic.arrivals(len(prompts), options.rate, options.seed)
                records = await load.open_loop(sender, prompts, offsets)
            else:
                records = await load.closed_loop(sender, prompts, options.clients or 1)
        return {
            "url": sender.address.url,
            "model": sender.model,
            "command": command,
            "load": _load_of(options, context),
            **report.figures(records, watch),
        }


@asynccontextmanager
async def _server(
    options: argparse.Namespace,
) -> AsyncIterator[tuple[str, int | None, list[str] | None]]:
    """URL, process and command of the server, which is started where none is named."""
    if options.url is not None:
        yield options.url, options.pid, None
        return
    model = [] if options.model is None else ["-m", options.model]
    async with started([*model, *options.serve]) as server:
        yield server.url, server.pid, list(server.command)


async def _sender(options: argparse.Namespace, url: str) -> tuple[Sender, int]:
    """How requests are sent, and the context that they have."""
    address = Address.of(url, options.api_key or os.environ.get("MUSTAFAR_API_KEY"))
    listed = await ask_json(address, "GET", "/v1/models")
    models = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
        raise HttpError("/v1/models answers without a list of models")
    names = [str(one.get("id")) for one in models]
    name = options.model_name or (names[0] if names else None)
    if name is None:
        raise ValueError("the server lists no model: --model-name")
    its: Mapping[str, Any] = next((one for one in models if one.get("id") == name), {})
    context = options.context or its.get("max_model_len") or _USUAL_CONTEXT
    return Sender(address, name, options.chat, options.extra, options.timeout), int(context)


def _lengths(options: argparse.Namespace, context: int) -> list[traffic.Lengths]:
    count = options.requests + options.warmup
    if options.lengths is not None:
        return traffic.lengths_of_file(options.lengths, count)
    prompt, output = _distributions(options)
    return traffic.drawn_lengths(count, prompt, output, context, options.seed)


def _distributions(options: argparse.Namespace) -> tuple[traffic.LogNormal, traffic.LogNormal]:
    def sigma(given: float | None, usual: float) -> float:
        return usual if given is None else given

    return (
        traffic.LogNormal(
            options.prompt_tokens, sigma(options.prompt_sigma, traffic.SHAREGPT_PROMPT_SIGMA)
        ),
        traffic.LogNormal(
            options.output_tokens, sigma(options.output_sigma, traffic.SHAREGPT_OUTPUT_SIGMA)
        ),
    )


async def _prompts(
    options: argparse.Namespace, sender: Sender, lengths: Sequence[traffic.Lengths]
) -> list[Prompt]:
    tokenizer: Tokenizer | None
    if options.tokenizer is not None:
        tokenizer = FolderTokenizer(options.tokenizer)
    else:
        tokenizer = await ServerTokenizer.find(sender.address)
    if tokenizer is None:
        raise ValueError(
            "the server has no /tokenize: --tokenizer names a model folder that counts"
        )
    text = usual_text() if options.text is None else options.text.read_text()
    maker = await PromptMaker.of(tokenizer, text, options.shared_prefix, options.seed)
    return [await maker.make(each) for each in lengths]


def _load_of(options: argparse.Namespace, context: int) -> dict[str, Any]:
    """What was asked for, so that it can be asked for again."""
    load: dict[str, Any] = {"requests": options.requests, "seed": options.seed, "context": context}
    if options.rate is not None:
        load["rate"] = options.rate
    else:
        load["clients"] = options.clients or 1
    if options.lengths is not None:
        load["lengths"] = str(options.lengths)
    else:
        for name, each in zip(("prompt", "output"), _distributions(options), strict=True):
            load[name] = {"mean_tokens": each.mean, "sigma": each.sigma}
    return {
        **load,
        "shared_prefix": options.shared_prefix,
        "chat": options.chat,
        "extra": options.extra,
    }
