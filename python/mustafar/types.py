"""Plain data: how to keep a cache, how to sample, what came out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from . import _core, checks, grammar

Device = str  # "auto", "cpu", "cuda" (the first GPU) or "cuda:1"
DType = Literal["auto", "f32", "f16", "bf16"]
Weights = Literal[
    "auto",
    "int8",
    "int8:32",
    "int8:64",
    "int8:128",
    "int8:row",
    "int4",
    "int4:32",
    "int4:64",
    "int4:128",
    "int4:row",
]
Preset = Literal["lossless", "balanced", "small", "mustafar", "dense"]
Pattern = Literal["group", "row"]
ValueType = Literal["auto", "f32", "f16", "bf16", "int8", "int4", "coded"]
KPolicy = Literal[
    "magnitude",
    "output_aware",
    "channel_magnitude",
    "channel_output_aware",
    "channel_structured",
]
VPolicy = Literal["magnitude", "channel_magnitude", "channel_output_aware"]
FinishReason = Literal["length", "stop", "context", "cancelled", "timeout"]

LogitsProcessor = Callable[[NDArray[np.int32], NDArray[np.float32]], "NDArray[np.float32] | None"]


@dataclass(frozen=True)
class KVConfig:
    """How a session keeps its keys and values. The default does no harm: all of them, in 8 bits.

    A value of the wrong kind or out of range is refused when the object is made, with a TypeError
    or ValueError that names the field.

    Attributes:
        sparsity: Fraction of every row that is pruned, in [0, 1). 0 keeps a dense cache.
        k_sparsity: The same for keys alone; None takes ``sparsity``.
        v_sparsity: The same for values alone.
        pattern: ``"group"`` keeps equally many values in every group of 16 or 32 dims, dealt
            round the row; ``"row"`` ranks over the whole row, as published (MUSTAFAR,
            NeurIPS 2025).
        window: Newest tokens that stay dense.
        sink_tokens: First tokens that stay dense.
        value_dtype: ``"int8"`` and ``"int4"`` have a scale for every row; ``"auto"`` is the model's
            type (f32, f16, else bf16); also ``"f32"``, ``"f16"``, ``"bf16"``. ``"coded"`` needs a
            calibrated profile: in its basis every dim has a fixed number of bits, by the energy
            that calibration saw in it; nothing is pruned.
        bits: With ``"coded"``: bits of a dim on average, 1 to 7; a row has 16 more for its scale.
        k_bits: The same for keys alone; None takes ``bits``.
        v_bits: The same for values alone.
        budget_bytes_per_token: With ``"coded"``, in place of bits: bytes of a compressed token over
            all layers and KV heads, keys, values and scales, of which never more are taken. Layers
            get different shares, keys and values too: bytes go where errors were measured to change
            the model's predictions most. Needs a profile with costs (:func:`calibrate` with
            ``budget=True``; ``"auto"`` measures them the first time) and device ``"cpu"``.
        max_kld: The same by quality: the fewest bytes that predict at most this divergence from
            the dense cache, in nats a token. At most one of the two.
        k_policy: What ranks keys. ``"magnitude"``: ``|k|`` in every token's row.
            ``"output_aware"``: ``|k| * w`` in every row, where ``w[d]`` is the sum of ``|q[d]|``
            over the query heads and the newest ``window`` tokens (at least one) of the call that
            compresses. By blocks of 64 tokens: ``"channel_magnitude"``, ``|k|`` in every channel;
            ``"channel_output_aware"``, ``|k| * w`` over the whole block; ``"channel_structured"``,
            whole channels by their l2 norm times ``w`` (ThinK).
        v_policy: What ranks values. ``"magnitude"``: ``|v|`` in every token's row. By blocks of 64
            tokens, in every channel: ``"channel_magnitude"``, ``|v|``;
            ``"channel_output_aware"``, ``|v|`` times the token's ``sum over d of w[d] * |k[d]|``.
            That bounds the sum of the window's ``|q . k|`` and stands in for the attention
            probabilities, which are never stored.
        profile: A KV transform: None, ``"auto"`` (calibrated once per model, then kept; see
            :func:`auto_profile`), ``"hadamard"``, ``"model"`` (kv_profile.safetensors in the
            model's folder), a file, or a :class:`Profile`.
    """

    sparsity: float = 0.0
    k_sparsity: float | None = None
    v_sparsity: float | None = None
    pattern: Pattern = "group"
    window: int = 32
    sink_tokens: int = 4
    value_dtype: ValueType = "int8"
    bits: float = 3.0
    k_bits: float | None = None
    v_bits: float | None = None
    budget_bytes_per_token: float | None = None
    max_kld: float | None = None
    k_policy: KPolicy = "magnitude"
    v_policy: VPolicy = "magnitude"
    profile: _core.Profile | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "profile":
                object.__setattr__(self, field.name, field.default if value is None else value)
            elif isinstance(field.default, str):
                if not isinstance(value, str):
                    raise TypeError(f"{field.name} must be a text, not {value!r}")
            elif isinstance(field.default, int):
                object.__setattr__(self, field.name, checks.integer(field.name, value))
            else:
                object.__setattr__(self, field.name, checks.number(field.name, value))
        _core.check_kv({**self._native(), "profile": None})

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> KVConfig:
        """A setting by name, with fields changed where named.

        ``"lossless"`` (the default), ``"balanced"``, ``"small"``, ``"mustafar"`` or ``"dense"``;
        what each was measured to cost stands in :func:`kv_presets` and docs/results/quality.md.

        Raises ValueError for an unknown name or value, TypeError for an unknown field.
        """
        return replace(cls(**_core.kv_preset(name)), **changes)

    def _native(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.profile, os.PathLike):
            values["profile"] = os.fspath(self.profile)
        return values


def kv_presets() -> dict[Preset, str]:
    """The names that :meth:`KVConfig.preset` knows, each with its bytes and measured loss."""
    return cast(dict[Preset, str], _core.kv_presets())


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    None in a field means its default, and in those from ``temperature`` to ``penalty_window`` that
    the model's folder decides (generation_config.json; :attr:`Model.default_sampling` shows it), or
    the number given here where it does not say. A value of the wrong kind is refused when the
    object is made, with a TypeError or ValueError that names the field. numpy's scalars and arrays
    are taken.

    Attributes:
        max_new_tokens: Tokens to make at most.
        min_new_tokens: End-of-sequence ids are held back before.
        temperature: 0.8; 0 is greedy.
        top_k: 40; keep the k most probable tokens; 0: off.
        top_p: 0.95; keep the smallest set with this probability; 1: off.
        min_p: 0.05; drop tokens below this fraction of the most probable one; 0: off.
        repetition_penalty: 1, off; divides positive, multiplies negative logits of seen tokens.
        presence_penalty: 0; subtracted once from the logits of generated tokens.
        frequency_penalty: 0; subtracted per occurrence among generated tokens.
        penalty_window: 64, or all with the folder's own ``repetition_penalty``; newest tokens that
            the penalty looks at; -1: all.
        logit_bias: Token id to a number added to its logit.
        seed: Same seed and logits give the same tokens on any machine; None or -1: drawn.
        stop: Texts that end the output and are not part of it, or one text. One that spells a
            special token ends it where that token comes.
        stop_token_ids: Ids that end it, beside the model's own.
        ignore_eos: Go on past the model's end-of-sequence ids.
        logprobs: How many alternatives to report for every token beside its own log-probability;
            None or -1: no log-probabilities.
        logits_processor: Called with the ids so far [n] int32 and the logits [vocab] float32,
            which it may change in place or replace by returning an array.
        grammar: A grammar in llguidance's dialect of Lark; the text made is what ``start`` matches.
            At most one of this and the next two, all of which need the extra
            ``mustafar[grammar]``. The output ends where nothing may follow, and may end wherever
            it is whole. Before ``max_new_tokens`` or the context would cut it, it is closed where
            a short way to do that is found (reason ``"length"``).
        regex: A regular expression (of Rust's regex crate) that the whole text matches.
        json_schema: A JSON schema, a dict or its JSON text (which is what is kept), that the text
            is valid JSON after. ``{}`` is any JSON.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalty_window: int | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logits_processor: LogitsProcessor | None = None
    grammar: str | None = None
    regex: str | None = None
    json_schema: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _checked(field.name, value, field.default))
        given = [name for name in grammar.NAMES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"at most one of {', '.join(grammar.NAMES)} can be given, not both "
                f"{given[0]} and {given[1]}"
            )

    def _native(self, model: _core.Model) -> dict[str, Any]:
        """As the native code takes it. Raises as :func:`grammar.constraint_factory`."""
        native = {field.name: getattr(self, field.name) for field in fields(self)}
        native["constraint"] = None
        for name in grammar.NAMES:
            text = native.pop(name)
            if text is not None:
                native["constraint"] = grammar.constraint_factory(model, name, text)
        return native

    @staticmethod
    def merge(params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
        """Params with keyword arguments on top, but for None; unknown names raise TypeError."""
        known = {f.name for f in fields(SamplingParams)}
        for name in overrides:
            if name not in known:
                raise TypeError(
                    f"unknown sampling parameter {name!r}; known are {', '.join(sorted(known))}"
                )
        given = {name: value for name, value in overrides.items() if value is not None}
        return replace(params if params is not None else SamplingParams(), **given)


def _checked(name: str, value: Any, default: Any) -> Any:
    """A field of :class:`SamplingParams` as the native code takes it."""
    if value is None:
        return default
    if name == "seed":
        return None if value == -1 else checks.integer(name, value, 0, 2**64 - 1)
    if name == "stop":
        return checks.texts(name, value)
    if name == "stop_token_ids":
        return tuple(checks.integer(name, token) for token in _items(name, value))
    if name == "logit_bias":
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must map token ids to numbers, not {value!r}")
        ids = (int(k) if isinstance(k, str) and k.isdigit() else k for k in value)  # JSON's keys
        return {
            checks.integer(name, k): checks.number(name, v)
            for k, v in zip(ids, value.values(), strict=True)
        }
    if name == "logits_processor":
        if not callable(value):
            raise TypeError(f"{name} must be callable, not {value!r}")
        return value
    if name == "json_schema":
        return _json_text(name, value)
    if name in grammar.NAMES:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a text, not {value!r}")
        return value
    if isinstance(default, bool):
        return checks.flag(name, value)
    whole = isinstance(default, int) or name in ("top_k", "penalty_window", "logprobs")
    return (checks.integer if whole else checks.number)(name, value)


def _json_text(name: str, value: Any) -> str:
    """A JSON object as text."""
    try:
        given = json.loads(value) if isinstance(value, str) else value
        if isinstance(given, Mapping):
            return json.dumps(dict(given), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    raise TypeError(f"{name} must be a dict or the JSON text of one, not {value!r}")


def _items(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a sequence, not {value!r}")
    return list(value)


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token with natural log-probabilities of the model's raw distribution."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class GenerateStats:
    """Counts and seconds of one generation.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Of those, how many an :class:`Engine` had kept and did not compute.
        generated_tokens: Tokens made.
        repruned: How often an :class:`Engine` compressed the cache again to make room; 0 unless it
            has ``on_pressure="sparser"``.
        prefill_seconds: Until the prompt was computed.
        decode_seconds: From then to the end.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    repruned: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class GenerateResult:
    """What a generation made.

    Attributes:
        text: Valid UTF-8, without stop texts and special tokens.
        token_ids: Generated ids, the stop token included.
        finish_reason: ``"length"``, ``"stop"``, ``"context"`` or ``"cancelled"``; of an
            :class:`Engine`'s request also ``"timeout"``.
        logprobs: One entry per token where asked for, else empty.
        stats: Counts and seconds.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob]
    stats: GenerateStats

    @staticmethod
    def _of(native: dict[str, Any]) -> GenerateResult:
        return GenerateResult(
            text=native["text"],
            token_ids=native["token_ids"],
            finish_reason=native["finish_reason"],
            logprobs=[TokenLogprob(*entry) for entry in native["logprobs"]],
            stats=GenerateStats(**native["stats"]),
        )


@dataclass(frozen=True)
class MemoryUsage:
    """Measured bytes of one session's cache; pages shared by a fork count in each owner.

    Attributes:
        dense_equivalent: The same tokens, dense, at 2 bytes a value; of layers with a sliding
            window those inside it.
        masks: Bitmaps of the compressed store.
        values: Packed values of the store.
        scales: Scales of int8, int4 and coded values.
        padding: Alignment inside pages.
        tail: Dense sinks and tail, room for more tokens included.
        policy: Statistics that a pruning policy keeps.
        allocated: The sum of masks, values, scales, padding, tail and policy.
        used: Of that, all but the tail's room for more tokens.
        compressed_tokens: Tokens in the store, without those that it has dropped.
        dense_tokens: Tokens in sinks and tail.
        k_sparsity: Of the compressed keys, as stored.
        v_sparsity: Of the compressed values, as stored.
    """

    dense_equivalent: int
    masks: int
    values: int
    scales: int
    padding: int
    tail: int
    policy: int
    allocated: int
    used: int
    compressed_tokens: int
    dense_tokens: int
    k_sparsity: float
    v_sparsity: float
