"""How long requests are, and when they arrive."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Means of prompts and replies of ShareGPT's conversations, in tokens: Kwon et al. 2023 (the paper
# of vLLM), figure 11. Its histograms have long tails; a log-normal distribution with these spreads
# has such ones, and is what --prompt-sigma and --output-sigma say.
SHAREGPT_PROMPT_TOKENS, SHAREGPT_OUTPUT_TOKENS = 161.0, 338.0
SHAREGPT_PROMPT_SIGMA, SHAREGPT_OUTPUT_SIGMA = 1.3, 1.0

_SHORTEST_PROMPT = 4  # tokens; a BOS and some words
_MOST_DRAWS = 10_000

# Random numbers of one seed are apart by what they are for, so that another rate keeps the lengths.
_LENGTHS, _ARRIVALS, TEXTS = range(3)


@dataclass(frozen=True)
class Lengths:
    """Of a request: tokens of its prompt, and tokens that it asks for.

    prompt: the prompt itself, where a file gives it; prompt_tokens is 0 then.
    """

    prompt_tokens: int
    output_tokens: int
    prompt: str | None = None


@dataclass(frozen=True)
class LogNormal:
    """Lengths, in tokens: a log-normal distribution of this mean, whose logarithm has this spread.

    A sigma of 0 gives the mean always.
    """

    mean: float
    sigma: float

    def draw(self, random: np.random.Generator) -> int:
        """One length, rounded, from 1."""
        middle = np.log(self.mean) - self.sigma**2 / 2
        return max(1, round(float(np.exp(middle + self.sigma * random.standard_normal()))))


def drawn_lengths(
    count: int, prompt: LogNormal, output: LogNormal, context: int, seed: int
) -> list[Lengths]:
    """Lengths at random. Those that do not fit the context together are drawn again.

    Raises ValueError where hardly any fit.
    """
    random = np.random.default_rng([seed, _LENGTHS])
    made: list[Lengths] = []
    for _ in range(_MOST_DRAWS + 100 * count):
        if len(made) == count:
            break
        tokens = max(prompt.draw(random), _SHORTEST_PROMPT)
        reply = output.draw(random)
        if tokens + reply <= context:
            made.append(Lengths(tokens, reply))
    if len(made) < count:
        raise ValueError(
            f"prompts of {prompt.mean:g} and replies of {output.mean:g} tokens do not fit a "
            f"context of {context}: --prompt-tokens, --output-tokens"
        )
    return made


def lengths_of_file(path: Path, count: int) -> list[Lengths]:
    """Lengths from lines of JSON, from the beginning again where there are too few.

    A line is ``{"prompt_tokens": N, "output_tokens": N}``, or has a ``"prompt"`` in place of the
    first. Raises ValueError that names a line that is not so, OSError.
    """
    found: list[Lengths] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                found.append(_lengths_of_line(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path} has no lines")
    return [found[i % len(found)] for i in range(count)]


def _lengths_of_line(line: object) -> Lengths:
    if not isinstance(line, dict):
        raise ValueError("it is not an object")
    if unknown := line.keys() - {"prompt", "prompt_tokens", "output_tokens"}:
        raise ValueError(f"unknown field {min(unknown)!r}")
    prompt = line.get("prompt")
    names = ["output_tokens"] + ["prompt_tokens"] * (prompt is None)
    for name in names:
        value = line.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1, not {value!r}")
    if prompt is None:
        return Lengths(line["prompt_tokens"], line["output_tokens"])
    if "prompt_tokens" in line or not isinstance(prompt, str):
        raise ValueError("prompt must be a text, without prompt_tokens")
    return Lengths(0, line["output_tokens"], prompt)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """When requests come, in seconds from the first: a Poisson process of ``rate`` a second."""
    random = np.random.default_rng([seed, _ARRIVALS])
    gaps = random.exponential(1 / rate, count)
    return [float(at) for at in np.cumsum(gaps) - gaps[0]]
