"""What a finished folder is worth: bits per byte of held-out files, and exact answers."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from .data import load_corpus
from .model import Weights, forward
from .settings import CONFIG_NAMES, END, QUESTION, TURN, Settings


@torch.no_grad()
def heldout_bits(s: Settings, weights: Weights, ids: list[int]) -> float:
    """Summed bits of ids[1:] in full windows half a window apart, each token scored once."""
    total, scored, window = 0.0, 1, s.window[1]
    while scored < len(ids):
        end = min(scored + (window // 2 if scored > 1 else window), len(ids))
        part = torch.tensor(ids[max(0, end - window - 1) : end])
        logits = forward(s, weights, part[None, :-1])[0, scored - end :]
        total += F.cross_entropy(logits, part[scored - end :], reduction="sum").item()
        scored = end
    return total / math.log(2)


@torch.no_grad()
def answer(s: Settings, weights: Weights, tokenizer: Tokenizer, questions: list[str]) -> list[str]:
    """Greedy answers of at most 80 tokens to single-turn questions, all in one batch."""
    chats = [tokenizer.encode(f"<|user|>{q}<|end_of_turn|><|assistant|>").ids for q in questions]
    starts = [len(chat) for chat in chats]
    for _ in range(80):
        running = [chat for chat in chats if chat[-1] not in (TURN, END)]
        if not running:
            break
        width = max(map(len, running))
        ids = torch.tensor([chat + [END] * (width - len(chat)) for chat in running])
        last = torch.tensor([len(chat) - 1 for chat in running])
        best = forward(s, weights, ids)[torch.arange(len(running)), last].argmax(-1)
        for chat, token in zip(running, best.tolist(), strict=True):
            chat.append(token)
    return [tokenizer.decode(c[n:]) for c, n in zip(chats, starts, strict=True)]


def evaluate(s: Settings, folder: Path) -> dict[str, object]:
    """Bits per byte of the held-out files and exact answers to documented functions."""
    config = json.loads((folder / "config.json").read_text())
    s = replace(s, **{key: config[name] for name, key in CONFIG_NAMES.items()})
    tensors = load_file(folder / "model.safetensors")
    weights = {name.removesuffix(".weight"): w.float() for name, w in tensors.items()}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    corpus = load_corpus(s.max_files)
    ids = {k: tokenizer.encode(text).ids for k, text in corpus.heldout.items()}
    bits = {k: heldout_bits(s, weights, ids[k]) for k in sorted(ids)}
    sizes = {k: len(text.encode()) for k, text in corpus.heldout.items()}
    drawn = random.Random(s.seed).sample(sorted(corpus.summaries), s.eval_questions)
    answers = answer(s, weights, tokenizer, [QUESTION.format(name) for name in drawn])
    pairs = zip(drawn, answers, strict=True)
    wrong = {name: text for name, text in pairs if " ".join(text.split()) != corpus.summaries[name]}
    return {
        "bits_per_byte": sum(bits.values()) / sum(sizes.values()),
        "tokens": sum(map(len, ids.values())) - len(ids),
        "bytes": sum(sizes.values()),
        "window": s.window[1],
        "stride": s.window[1] // 2,
        "qa_correct": len(drawn) - len(wrong),
        "qa_total": len(drawn),
        "qa_wrong": wrong,
        "qa_set": len(corpus.summaries),
        "file_bits_per_byte": {k: round(bits[k] / sizes[k], 4) for k in bits},
    }
