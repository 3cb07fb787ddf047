"""The options of ``mustafar bench-serve``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from . import traffic


def parser() -> argparse.ArgumentParser:
    """What reads the command line, up to a ``--``."""
    result = argparse.ArgumentParser(
        prog="mustafar bench-serve",
        usage="%(prog)s [--url URL | -m MODEL] [--rate R | --clients N] [options] "
        "[-- options of mustafar serve]",
        description="Sends load to a server that speaks as OpenAI's does, and measures its "
        "replies. Without --url it starts `mustafar serve` with what stands behind `--`.",
        allow_abbrev=False,
    )
    result.add_argument("--version", action="version", version=__version__)
    _add_server(result.add_argument_group("Server").add_argument)
    _add_load(result.add_argument_group("Load").add_argument)
    _add_prompts(result.add_argument_group("Prompts").add_argument)
    _add_requests(result.add_argument_group("Requests").add_argument)
    return result


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; those of the server are ``serve``. Ends the program where they are wrong."""
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    reader = parser()
    options = reader.parse_args(words[:cut])
    options.serve = words[cut + 1 :]
    if options.url is not None and (options.model is not None or options.serve):
        reader.error("--url names a server that runs; -m and what follows -- start one")
    if options.url is None and options.pid is not None:
        reader.error("--pid goes with --url")
    if options.rate is not None and options.clients is not None:
        reader.error("--rate and --clients are two kinds of load")
    if options.lengths is not None and (options.prompt_sigma, options.output_sigma) != (None, None):
        reader.error("--lengths gives lengths that are not drawn")
    return options


_Add = Callable[..., Any]


def _add_server(add: _Add) -> None:
    add("--url", help="a server that runs, as http://127.0.0.1:8000")
    add("-m", "--model", help="the model to start mustafar serve with; without: the demo model")
    add("--model-name", metavar="NAME", help="as requests name it; without: the server's first")
    add("--api-key", metavar="KEY", help="sent to the server (also MUSTAFAR_API_KEY)")
    add("--pid", type=int, metavar="N", help="the server's process, whose memory is watched")


def _add_load(add: _Add) -> None:
    add(
        "--rate",
        type=_positive,
        metavar="R",
        help="requests a second, at random times (Poisson), however many are running",
    )
    add(
        "--clients",
        type=_count,
        metavar="N",
        help="clients that wait for each reply, instead of --rate (default: 1)",
    )
    add("--requests", type=_count, default=100, metavar="N", help="to send (default: 100)")
    add("--warmup", type=_count0, default=1, metavar="N", help="sent before, alone (default: 1)")
    add("--seed", type=_count0, default=0, metavar="N", help="of all that is random (default: 0)")


def _add_prompts(add: _Add) -> None:
    add(
        "--prompt-tokens",
        type=_positive,
        default=traffic.SHAREGPT_PROMPT_TOKENS,
        metavar="N",
        help=f"mean, BOS included (default: {traffic.SHAREGPT_PROMPT_TOKENS:g}, as ShareGPT's)",
    )
    add(
        "--prompt-sigma",
        type=_number0,
        metavar="X",
        help="of the logarithm of the length (log-normal); 0: all are alike "
        f"(default: {traffic.SHAREGPT_PROMPT_SIGMA:g})",
    )
    add(
        "--output-tokens",
        type=_positive,
        default=traffic.SHAREGPT_OUTPUT_TOKENS,
        metavar="N",
        help=f"mean of replies (default: {traffic.SHAREGPT_OUTPUT_TOKENS:g}, as ShareGPT's)",
    )
    add(
        "--output-sigma",
        type=_number0,
        metavar="X",
        help=f"as --prompt-sigma (default: {traffic.SHAREGPT_OUTPUT_SIGMA:g})",
    )
    add(
        "--lengths",
        type=Path,
        metavar="FILE",
        help='lengths instead: lines as {"prompt_tokens": 100, "output_tokens": 20}, or with a '
        '"prompt" in place of its length',
    )
    add(
        "--context",
        type=_count,
        metavar="N",
        help="tokens of a prompt and its reply; without: the server's max_model_len, or 2048",
    )
    add("--text", type=Path, metavar="FILE", help="that prompts are cut from (default: Python's)")
    add(
        "--shared-prefix",
        type=_count0,
        default=0,
        metavar="N",
        help="tokens that all prompts begin with (default: 0)",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="a model folder that counts tokens, for a server without /tokenize",
    )


def _add_requests(add: _Add) -> None:
    add("--chat", action="store_true", help="conversations; their template adds to the prompt")
    add(
        "--extra",
        type=_object,
        default={},
        metavar="JSON",
        help='more fields of every request, as {"temperature": 0.8}; null leaves a usual one out',
    )
    add(
        "--timeout",
        type=_positive,
        default=600.0,
        metavar="SECONDS",
        help="that a request may take (default: 600)",
    )
    add("--json", action="store_true", help="print JSON, in seconds and bytes")


def _count(text: str) -> int:
    return _whole(text, 1)


def _count0(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, low: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low}")
    return value


def _positive(text: str) -> float:
    value = _number0(text)
    if value == 0:
        raise argparse.ArgumentTypeError("it must be more than 0")
    return value


def _number0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return value


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("it must be a JSON object")
    return value
