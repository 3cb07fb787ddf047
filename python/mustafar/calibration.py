"""Calibrates a KV transform: a basis per layer and KV head in which pruning costs less.

The native part says how (cpp/runtime/calibration.cc); ``mustafar calibrate`` is the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

from . import _core
from ._core import Profile
from .model import Model, Prompt

Kind = Literal["hadamard", "klt", "balanced"]


def calibrate(
    model: Model,
    texts: Sequence[Prompt],
    kind: Kind = "balanced",
    *,
    balance: float = 1.0,
    scale_power: float = 0.0,
    max_tokens: int | None = 16384,
    skip_tokens: int = 4,
    context: int | None = None,
    budget: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Gathers statistics over texts and makes a profile from them.

    Args:
        model: The profile fits this model alone (by its fingerprint).
        texts: Texts or id sequences; longer ones are cut into pieces of the model's context.
        kind: ``"hadamard"`` (no calibration; texts are not looked at), ``"klt"`` or ``"balanced"``.
        balance: Exponent a in [0, 1] of the metric; 0 makes ``balanced`` the same as ``klt``.
        scale_power: Power p in [0, 1] of every dim's standard deviation that values are divided by
            before they are quantised, ranking undone: about 0.5 helps int4, 0 is off.
        max_tokens: Use at most this many tokens; None: all.
        skip_tokens: First tokens of every piece that statistics leave out (attention sinks).
        context: Contexts that the profile is for, in tokens. RoPE moves the energy of keys between
            dims with position: a dim counts with the most that it has where the texts begin at 0,
            1024, 1536, 2048, 3072 and so on, below this. None: the model's own context; 1: where
            the texts stand.
        budget: Also measure what errors in every layer's keys and values cost, for settings with
            ``budget_bytes_per_token`` or ``max_kld``: 2 n_layers + 2 scorings of the first 1,024
            tokens of the longest text (at least 200). Not for ``"hadamard"``.
        progress: Called with (tokens done, tokens in all); what it raises ends the work.

    Returns:
        A profile for ``KVConfig(profile=...)``; ``save`` writes it to a file.

    Raises:
        ValueError: An unknown kind, an argument out of range, a bad token id, or too little text.
        TokenizerError: Texts, where the model has no tokenizer.
        DeviceError: ``budget`` on a device where layers must be alike.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one text: pass a list of texts")
    return _core.calibrate(
        model._core,
        list(texts),
        kind,
        balance,
        scale_power,
        -1 if max_tokens is None else max_tokens,
        skip_tokens,
        progress,
        budget,
        0 if context is None else context,
    )


def auto_profile(
    model: Model, *, budget: bool = False, progress: Callable[[int, int], None] | None = None
) -> Profile:
    """The profile of ``KVConfig(profile="auto")``: made the first time, then kept.

    It is calibrated on the model itself with a text of a few thousand tokens that ships with the
    package, and kept in ``$XDG_CACHE_HOME`` (``~/.cache``) below ``mustafar/profiles`` under the
    model's fingerprint. The logger ``mustafar`` hears of a calibration (INFO) and of a folder that
    can't be written (WARNING): the profile is then made once per loaded model.

    Args:
        model: Has a tokenizer.
        budget: With what settings with a budget need (see :func:`calibrate`), measured the first
            time that it is asked for and kept along.
        progress: Called with (tokens done, tokens in all) while it is calibrated; what it raises
            ends the work and leaves nothing behind.

    Raises:
        TokenizerError: A model without tokenizer; :func:`calibrate` takes token ids.
    """
    return cast(Profile, _core.resolve_profile("auto", model._core, progress, budget))
