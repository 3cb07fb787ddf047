"""Writes models with weights of 8 or 4 bits as folders that transformers and vLLM read.

The native part says how (cpp/runtime/quantize.cc); ``mustafar quantize`` is the same work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from . import _core
from .hub import find_model
from .model import Prompt


@dataclass(frozen=True)
class QuantizeResult:
    """What became of a model's weights.

    Attributes:
        matrices: How many became codes.
        stored_bytes: Of all tensors, as they were.
        bytes: As they are now.
        tokens: That they were calibrated on.
    """

    matrices: int
    stored_bytes: int
    bytes: int
    tokens: int


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    texts: Sequence[Prompt] = (),
    *,
    bits: Literal[4, 8] = 4,
    group: Literal[32, 64, 128] = 32,
    symmetric: bool = False,
    threads: int = 0,
    shard_bytes: int = 5_000_000_000,
    max_tokens: int | None = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizeResult:
    """Rounds the matrices of all layers and writes a folder in the layout of compressed-tensors.

    Embedding, head, norms and biases stay as they are, and so do tokenizer and templates. With
    texts, layer after layer is calibrated on the CPU: what a weight loses is made up for by others
    of its row as far as the texts' activations allow (GPTQ, arXiv:2210.17323), and scales are
    fitted where activations are large. Without texts every weight goes to the nearest code.

    Args:
        model: A folder, or the id of a repository of the Hugging Face hub, as Model takes it.
        output: A folder that is not there, or empty; it appears whole, once all is done.
        texts: Texts or id sequences to calibrate on.
        bits: Of a weight.
        group: Inputs that share a scale. A matrix whose inputs are no multiple of it takes the
            next smaller one; one whose inputs are no multiple of 32 stays as it is.
        symmetric: No zero points: fewer bytes, larger errors.
        threads: 0 takes MUSTAFAR_THREADS, or as many as the cores and the control group's CPU
            quota allow.
        shard_bytes: Files of weights have so many bytes at most, unless one matrix is larger.
        max_tokens: Use at most this many tokens of the texts; None: all.
        progress: Called with (work done, work in all); what it raises ends the work, and leaves
            nothing behind.

    Raises:
        ModelError: A model that can't be read, is quantised already, or has weights that are not
            finite.
        TokenizerError: Texts, where the model has no tokenizer.
        Error: output is there and not empty, or can't be written; activations are not finite.
        ValueError: An argument out of range, a bad token id, or texts without a token.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one text: pass a list of texts")
    return QuantizeResult(
        *_core.quantize(
            find_model(model),
            output,
            list(texts),
            -1 if max_tokens is None else max_tokens,
            bits,
            group,
            symmetric,
            threads,
            shard_bytes,
            progress,
        )
    )
