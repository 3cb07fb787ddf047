"""The options of ``mustafar serve``: names as the other commands have them."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from dataclasses import fields
from typing import Any

from .. import __version__, _core
from ..types import KVConfig, kv_presets
from .settings import Settings

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parser() -> argparse.ArgumentParser:
    """What reads the command line."""
    result = argparse.ArgumentParser(
        prog="mustafar serve",
        description="Serves a model over HTTP, as OpenAI's clients talk to one.",
        allow_abbrev=False,
    )
    result.add_argument("--version", action="version", version=__version__)
    _add_model(_Group(result, "Model"))
    _add_cache(_Group(result, "KV cache"))
    _add_prefixes(_Group(result, "Prefixes"))
    _add_pressure(_Group(result, "Memory"))
    _add_server(_Group(result, "Server"))
    _add_limits(_Group(result, "Limits"))
    return result


class _Group:
    """A group of options."""

    def __init__(self, parent: argparse.ArgumentParser, title: str) -> None:
        self._group = parent.add_argument_group(title)

    def text(self, *names: str, help: str, **more: Any) -> None:
        """An option with a text, or one of several."""
        default = more.get("default")
        if isinstance(default, str):
            help += f" (default: {default})"
        self._group.add_argument(*names, help=_plain(help), **more)

    def texts(self, name: str, metavar: str, help: str) -> None:
        """An option that may be given more than once."""
        help += ", repeatable"
        self._group.add_argument(
            name, action="append", default=[], metavar=metavar, help=_plain(help)
        )

    def flag(self, name: str, help: str) -> None:
        """An option without a value."""
        self._group.add_argument(name, action="store_true", help=_plain(help))

    def number(
        self, *names: str, default: float, help: str, kind: Any = int, metavar: str = "N"
    ) -> None:
        """An option with a number."""
        help += f" (default: {default})"
        self._group.add_argument(
            *names, type=kind, default=default, metavar=metavar, help=_plain(help)
        )


def _plain(text: str) -> str:
    return text.replace("%", "%%")  # argparse formats help


def _add_model(add: _Group) -> None:
    add.text(
        "-m",
        "--model",
        help="folder, or ORGANISATION/NAME of the Hugging Face hub; without: the demo model",
    )
    add.text(
        "--device",
        default="auto",
        type=_device,
        help="where it runs: auto, cpu, cuda, or cuda:1 for a GPU by its number, from 0",
    )
    add.text(
        "--dtype",
        default="auto",
        choices=("auto", "f32", "f16", "bf16"),
        help="arithmetic and dense tail; auto: as stored",
    )
    add.text(
        "-w",
        "--weights",
        default="auto",
        help="weights in memory: auto (as stored), int8 or int4, or as int4:64, int8:row",
    )
    add.number("-t", "--threads", default=0, help="CPU threads; 0: what cores and CPU quota allow")
    add.number(
        "--kv-budget",
        default=0,
        kind=size,
        metavar="BYTES",
        help="most bytes the KV cache may take, e.g. 512M; 0: no limit",
    )
    add.number(
        "-c",
        "--ctx-size",
        default=0,
        help="tokens of prompt and reply at most; 0: the model's context",
    )
    add.number(
        "-n",
        "--n-predict",
        default=Settings().reply_tokens,
        help="tokens of a chat's reply where a request does not say; below 0: to the context's end",
    )
    add.text(
        "--chat-template", metavar="NAME", help="a template, its name or file, not the model's own"
    )


def _add_cache(add: _Group) -> None:
    presets = "; ".join(f"{name}: {about}" for name, about in kv_presets().items())
    add.text(
        "--kv",
        default="lossless",
        metavar="PRESET",
        help=f"a setting by name, which the options below change. {presets}",
    )
    types = {field.name: str(field.type) for field in fields(KVConfig)}
    for name, option, about in _core.kv_options():
        kind = {"int": int, "float": float, "float | None": float}.get(types[name], str)
        add.text(option, dest=f"kv_{name}", type=kind, metavar="X", help=about)
    add.text(
        "--profile",
        dest="kv_profile",
        metavar="NAME",
        help="KV transform: a file, hadamard, auto (calibrated once and kept), model or none",
    )


def _add_prefixes(add: _Group) -> None:
    add.text(
        "--prefix-cache",
        default="exact",
        choices=("exact", "approximate", "off"),
        help="which beginnings of prompts are computed once: those that are calls of their own; "
        "any that was seen, at the cost of results that depend on what came before; none",
    )
    add.flag(
        "--system-prefix",
        help="what a conversation says before the user's first message is a call of its own",
    )
    add.number(
        "--prefix-bytes",
        default=0,
        kind=size,
        metavar="BYTES",
        help="that are kept for prompts to come; 0: up to --kv-budget, or 1G without one",
    )


def _add_pressure(add: _Group) -> None:
    add.text(
        "--on-pressure",
        default="pause",
        choices=("pause", "sparser"),
        help="what gives way where --kv-budget is used up: the youngest request, which is computed "
        "again later; the settings of caches, which are compressed again at the next smaller "
        "preset, at the cost of results that depend on what else runs",
    )
    add.number(
        "--swap-bytes",
        default=0,
        kind=size,
        metavar="BYTES",
        help="of host memory beside --kv-budget where paused requests keep their caches",
    )


def _add_server(add: _Group) -> None:
    add.text("--host", default="127.0.0.1", help="address to listen at")
    add.number("--port", default=8000, help="port to listen at; 0: one that is free")
    add.texts("--model-name", "NAME", "what the model is called in requests; without: as -m has it")
    add.texts(
        "--api-key",
        "KEY",
        "a key that clients must send (MUSTAFAR_API_KEY is not seen by others on the machine)",
    )
    add.texts("--allow-host", "NAME", "a further name for a server on loopback that needs no key")


def _add_limits(add: _Group) -> None:
    usual = Settings()
    add.number("--max-batch", default=64, help="sequences that decode together")
    add.number("--max-waiting", default=1024, help="requests that wait; one more is refused")
    add.number(
        "--prefill-tokens",
        default=512,
        help="tokens of prompts that are computed between two decode steps",
    )
    add.number(
        "--max-body",
        default=usual.max_body_bytes,
        kind=size,
        metavar="BYTES",
        help="of a request's body",
    )
    add.number("--max-prompt", default=0, help="tokens of a prompt; 0: the context")
    add.number(
        "--max-choices", default=usual.max_choices, help="of a request, its prompts together"
    )
    add.number(
        "--max-grammar",
        default=usual.max_grammar_bytes,
        kind=size,
        metavar="BYTES",
        help="of a JSON schema, regular expression or grammar that replies follow",
    )
    add.number("--max-streams", default=usual.max_streams, help="streamed replies at once")
    add.number(
        "--timeout",
        default=usual.timeout,
        kind=float,
        metavar="SECONDS",
        help="that a request may take, waiting included; 0: no limit",
    )
    add.number(
        "--grace",
        default=30,
        kind=float,
        metavar="SECONDS",
        help="that running requests get when the server is told to stop",
    )


def size(text: str) -> int:
    """Bytes, as 512M or 1.5GiB; raises ArgumentTypeError."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    suffix = number[-1:] if number[-1:].isalpha() else ""
    try:
        n_bytes = float(number.removesuffix(suffix)) * _SUFFIXES[suffix]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512M") from None
    if not 0 <= n_bytes < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range")
    return int(n_bytes)


def _device(text: str) -> str:
    """One of the devices that there may be; raises ArgumentTypeError."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda and cuda:N")
    return text


def kv_of(options: argparse.Namespace) -> KVConfig:
    """The cache's setting that options ask for; raises ValueError or TypeError."""
    given = {
        name.removeprefix("kv_"): value
        for name, value in vars(options).items()
        if name.startswith("kv_") and name != "kv_budget" and value is not None
    }
    for kind in ("sparsity", "bits"):  # what is for keys and values alike is for each
        if kind in given:
            given = {f"k_{kind}": None, f"v_{kind}": None, **given}
    if given.get("profile") == "none":
        given["profile"] = None
    return KVConfig(**{**KVConfig.preset(options.kv)._native(), **given})


def settings_of(options: argparse.Namespace) -> Settings:
    """The server's settings that options ask for; raises ValueError."""
    keys = [*options.api_key, *filter(None, [os.environ.get("MUSTAFAR_API_KEY")])]
    hosts: tuple[str, ...] = ()
    if is_loopback(options.host) and not keys:
        hosts = ("localhost", "127.0.0.1", "[::1]", in_url(options.host), *options.allow_host)
    return Settings(
        model_names=tuple(options.model_name) or (name_of(options.model),),
        api_keys=tuple(keys),
        allowed_hosts=hosts,
        chat_template=options.chat_template,
        system_prefix=options.system_prefix,
        context=options.ctx_size,
        reply_tokens=options.n_predict,
        max_body_bytes=options.max_body,
        max_prompt_tokens=options.max_prompt,
        max_choices=options.max_choices,
        max_grammar_bytes=options.max_grammar,
        max_streams=options.max_streams,
        timeout=options.timeout,
    )


def name_of(model: str | None) -> str:
    """What a model is called in requests where nothing is said."""
    if model is None:
        return "demo"
    if model.count("/") == 1 and not os.path.isdir(model):
        return model  # of the hub
    return os.path.basename(os.path.abspath(model))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def in_url(host: str) -> str:
    """An address as a URL has it."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
