#!/usr/bin/env python3
"""Retrieval and divergence of coded rows at long context, by profile.

    tools/kv_long.py MODEL --text TEXT --profile NAME=FILE ... [--length 4096] [--cases 40]

A document is read once with the dense cache. Then, for each setting, its tokens but the first 4 and
the newest 32 (to whole blocks of 64) are coded as the runtime codes them, and what follows attends
to that: for `needle` a question after a seven-digit code hidden in the text and the answer, forced;
for `text` the 128 tokens that come next. A needle is found where every digit is the likeliest
token: what greedy decoding finds. With --turned N every profile is also measured on keys that are
turned back by the position at which their N tokens begin before they are coded, and forth again
afterwards: what a runtime does that turns the queries of every N tokens instead. Settings are
profiles of `mustafar calibrate`, and int4 with a Hadamard rotation. Needs torch, safetensors and
tokenizers.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from kv_codecs.calibration import Basis
from kv_codecs.codec import Rows
from kv_codecs.coded import Coded
from kv_codecs.model import Llama, Schedule
from kv_codecs.primitives import hadamard, symmetric

Layers = list[tuple[Tensor, Tensor]]
Code = Callable[[Rows], Tensor]

HEAD = "The following text mentions secret codes. Remember them: you will be asked for one."
WORDS = "anchor apple basket bridge candle castle cherry copper dragon eagle feather garden".split()
CONTINUED = 128


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [heads, n, D], the newest of k, v [kv_heads, T, D]."""
    n, total = q.shape[1], k.shape[1]
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    if n == total:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    mask = torch.arange(total) <= torch.arange(total - n, total)[:, None]
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]


def prefill(model: Llama, ids: Tensor) -> Layers:
    """Keys after RoPE and values of every layer."""
    layers: Layers = []

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers.append((k, v))
        if layer == model.layers - 1:
            return torch.zeros_like(q)
        return sdpa(q, k, v)

    hidden = model.embed(ids)
    for layer in range(model.layers):
        hidden = model.layer(layer, hidden, attention)
    return layers


def follow(model: Llama, cache: Layers, ids: Tensor) -> Tensor:
    """Log-probabilities [n, vocab] after each of ids [n] that follow what the cache holds."""
    first = cache[0][0].shape[1]

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache[layer]
        return sdpa(q, torch.cat([keys, k], 1), torch.cat([values, v], 1))

    hidden = model.embed(ids)
    for layer in range(model.layers):
        hidden = model.layer(layer, hidden, attention, first)
    return model.logits(hidden).log_softmax(-1)


def compressed(model: Llama, cache: Layers, key: Code, value: Code) -> Layers:
    """The cache with old tokens as they come back from the coders."""
    schedule = Schedule()
    tokens = cache[0][0].shape[1]
    start, stop = schedule.sinks, schedule.sinks + schedule.coded(tokens)
    out: Layers = []
    for layer, (k, v) in enumerate(cache):
        parts = []
        for is_key, x, code in ((True, k, key), (False, v, value)):
            y = x.clone()
            rows = Rows(layer, is_key, x, k, v, schedule, model.rope)
            y[:, start:stop] = code(rows)[:, start:stop]
            parts.append(y)
        out.append((parts[0], parts[1]))
    return out


def cases(
    tokenizer: Tokenizer, text: str, kind: str, length: int, count: int, seed: int
) -> list[tuple[list[int], list[int], list[int]]]:
    """(document, question, answer) ids."""
    made = []
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text)) if len(s) > 20]
    for number in range(count):
        rng = random.Random(f"{seed} {length} {number}")
        at = rng.randrange(len(sentences))
        if kind == "text":
            prose = " ".join(sentences[(at + i) % len(sentences)] for i in range(length // 8))
            ids = tokenizer.encode(prose, add_special_tokens=False).ids[: length + CONTINUED]
            made.append((ids[:length], ids[length:-1], ids[length + 1 :]))
            continue
        depth = 0.1 + 0.8 * (number % 5) / 4
        word, code = rng.choice(WORDS), str(rng.randrange(1000000, 10000000))
        body: list[str] = []
        used = 120
        while used < length:
            sentence = sentences[(at + len(body)) % len(sentences)]
            used += len(tokenizer.encode(" " + sentence, add_special_tokens=False).ids)
            body.append(sentence)
        body.insert(round(depth * (len(body) - 1)), f"The secret code for {word} is {code}.")
        document = (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
            f" Face<|im_end|>\n<|im_start|>user\n{HEAD}\n\n{' '.join(body[:-1])}"
        )
        question = (
            f"\n\nWhat is the secret code for {word} that the text mentions?<|im_end|>\n"
            f"<|im_start|>assistant\nThe secret code for {word} is"
        )
        parts = [
            tokenizer.encode(part, add_special_tokens=False).ids
            for part in (document, question, f" {code}")
        ]
        made.append((parts[0], parts[1] + parts[2][:-1], parts[2]))
    return made


def profile_basis(tensors: dict[str, Tensor], kind: str) -> Basis:
    """Of a profile file: what its dims' scaling divided is multiplied back."""
    forward, backward = tensors[f"{kind}_forward"], tensors[f"{kind}_backward"]
    sigma = tensors[f"{kind}_sigma"][:, :, None]
    weight = tensors.get(f"{kind}_weight")
    if weight is not None:
        forward = forward * weight[:, :, None]
        backward = backward / weight[:, :, :, None]
        sigma = sigma * weight[:, :, None]
    return Basis(forward, backward, torch.zeros_like(sigma), sigma, torch.empty(0))


def turned(code: Code, every: int) -> Code:
    """A coder that meets keys as if their `every` tokens began where the text does."""

    def turn(rows: Rows, x: Tensor, direction: int) -> Tensor:
        sinks = rows.schedule.sinks
        begin = ((torch.arange(x.shape[1]) - sinks).clamp(min=0) // every * every).long()
        cos, sin = rows.rope.cos[begin], direction * rows.rope.sin[begin]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def coded(rows: Rows) -> Tensor:
        return turn(rows, code(replace(rows, k=turn(rows, rows.k, -1))), 1)

    return coded


def hadamard_int4(rows: Rows) -> Tensor:
    matrix = hadamard(rows.x.shape[-1]).float()
    return symmetric(rows.x @ matrix, 4) @ matrix.T


def score(log_probs: Tensor, dense: Tensor, answer: list[int]) -> dict[str, float]:
    """Over the answer's tokens."""
    n, wanted = len(answer), torch.tensor(answer)
    ours, theirs = log_probs[-n:], dense[-n:]
    return {
        "nll": -ours.gather(1, wanted[:, None]).mean().item(),
        "kld": (theirs.exp() * (theirs - ours)).sum(-1).mean().item(),
        "found": float((ours.argmax(-1) == wanted).all()),
    }


def summary(results: list[dict[str, float]], against: list[dict[str, float]]) -> str:
    def mean(values: list[float]) -> str:
        x = torch.tensor(values).double()
        return f"{x.mean().item():8.4f} +- {(x.std() / len(x) ** 0.5).item():.4f}"

    found = sum(r["found"] for r in results)
    better = [b["nll"] - r["nll"] for r, b in zip(results, against, strict=False)]
    kld = [b["kld"] - r["kld"] for r, b in zip(results, against, strict=False)]
    return (
        f"found {found:3.0f} of {len(results)}  NLL {mean([r['nll'] for r in results])}"
        f"  KLD {mean([r['kld'] for r in results])}"
        f"  against the first: NLL {mean(better)}, KLD {mean(kld)} less"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--kind", choices=("needle", "text"), default="needle")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--profile", action="append", default=[], help="NAME=FILE; repeatable")
    parser.add_argument("--bits", type=float, action="append", help="of coded rows (default: 3, 4)")
    parser.add_argument("--turned", type=int, action="append", default=[], metavar="N")
    parser.add_argument("--output", type=Path, help="JSON, one list of cases for each setting")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("medium")

    model = Llama(options.model)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    settings: dict[str, tuple[Code, Code]] = {}
    for name, file in (given.split("=", 1) for given in options.profile):
        tensors = load_file(file)
        for bits in options.bits or (3, 4):
            key, value = (Coded(profile_basis(tensors, kind), bits) for kind in "kv")
            settings[f"{name}, {bits:g} bits"] = (key, value)
            for every in options.turned:
                settings[f"{name}, {bits:g} bits, turned {every}"] = (turned(key, every), value)
    settings["int4, Hadamard"] = (hadamard_int4, hadamard_int4)

    text = options.text.read_text(encoding="utf-8")
    every = cases(tokenizer, text, options.kind, options.length, options.cases, options.seed)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ("dense", *settings)}
    for number, (document, question, answer) in enumerate(every):
        start = time.monotonic()
        cache = prefill(model, torch.tensor(document))
        dense = follow(model, cache, torch.tensor(question))
        results["dense"].append(score(dense, dense, answer))
        for name, (key, value) in settings.items():
            coded = compressed(model, cache, key, value)
            log_probs = follow(model, coded, torch.tensor(question))
            results[name].append(score(log_probs, dense, answer))
        print(f"case {number}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if options.output:
            options.output.write_text(json.dumps(results) + "\n", encoding="utf-8")
    first = results[next(iter(settings))]
    for name, rows in results.items():
        print(f"{name:28s} {summary(rows, first)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
