"""Training from a checkpoint or from nothing, and the folder that comes of it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from .data import Turn, ask, load_corpus, text_steps
from .model import forward, initial_weights
from .settings import (
    BOS,
    CHAT_TEMPLATE,
    CONFIG_NAMES,
    END,
    PHRASINGS,
    QUESTION,
    SPECIALS,
    SYSTEM_TURN,
    TURN,
    Settings,
)


def train(s: Settings, work: Path, compiled: bool, save_seconds: float = 240.0) -> None:
    """Train from the checkpoint in work, or from nothing, up to the budget."""
    torch.manual_seed(s.seed)
    corpus = load_corpus(s.max_files)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    texts = [*corpus.library.values(), *corpus.tests.values()]
    files = [np.array([*e.ids, END], np.uint16) for e in tokenizer.encode_batch(texts)]
    system = tokenizer.encode(SYSTEM_TURN).ids[1:]
    turns: list[Turn] = []
    for name, line in corpus.summaries.items():
        asked = [tokenizer.encode(text.format(name)).ids[1:] for text in (QUESTION, *PHRASINGS)]
        turns.append((asked, [*tokenizer.encode(line).ids[1:], TURN]))
    weights = initial_weights(s)
    matrices = [w for k, w in weights.items() if w.dim() == 2 and k != "model.embed_tokens"]
    others = [w for k, w in weights.items() if w.dim() == 1 or k == "model.embed_tokens"]
    muon = torch.optim.Muon(matrices, lr=s.muon_rate, weight_decay=s.weight_decay)
    adam = torch.optim.AdamW(others, lr=s.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    done, checkpoint = 0, work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, weight in weights.items():
            weight.data.copy_(saved["weights"][name])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        done = saved["steps"]

    @torch.compile(dynamic=False, disable=not compiled)
    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(s, weights, ids).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    saved_at = time.monotonic()
    losses: list[tuple[float, float]] = []  # of text and questions, since the last line
    for step, (falling, tokens, rows) in enumerate(text_steps(s, files, len(corpus.library)), 1):
        if step <= done:
            continue
        rate = min(1.0, step / s.warmup_steps, (1 - tokens / s.tokens) / s.fall)
        text_loss = 0.0
        parts = torch.from_numpy(rows.astype(np.int64)).chunk(2)
        for part in parts:
            loss = loss_of(part[:, :-1].contiguous(), part[:, 1:].contiguous()) / len(parts)
            loss.backward()
            text_loss += loss.item()
        ids, targets = ask(s, turns, system, s.question_rows[falling], step)
        loss = loss_of(ids, targets)
        (loss * s.question_weight[falling]).backward()
        losses.append((text_loss, loss.item()))
        for optimizer, full in ((muon, s.muon_rate), (adam, s.adam_rate)):
            optimizer.param_groups[0]["lr"] = rate * full
            optimizer.step()
            optimizer.zero_grad()
        tokens += rows.size - len(rows) + ids.numel()
        if step % 20 == 0:
            means = "text {:.4f} questions {:.4f}".format(*np.mean(losses, axis=0))
            clock = time.strftime("%H:%M:%S")
            print(f"{clock} step {step} tokens {tokens} rate {rate:.3f} {means}", flush=True)
            losses.clear()
        if time.monotonic() - saved_at > save_seconds or tokens >= s.tokens:
            state = {"steps": step, "muon": muon.state_dict(), "adam": adam.state_dict()}
            state["weights"] = {k: w.detach() for k, w in weights.items()}
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
            saved_at = time.monotonic()


def export(s: Settings, work: Path, folder: Path) -> None:
    """Write the checkpoint as a Hugging Face folder in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = torch.load(work / "checkpoint.pt", weights_only=True)["weights"]
    tensors = {f"{k}.weight": w.bfloat16().contiguous() for k, w in saved.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_bytes((work / "tokenizer.json").read_bytes())
    ends = {"bos_token_id": BOS, "eos_token_id": [END, TURN]}
    config = {name: getattr(s, key) for name, key in CONFIG_NAMES.items()} | ends | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "use_cache": True,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "max_position_embeddings": s.window[1],
    }  # fmt: skip
    added = {str(i): {"content": text, "special": True} for i, text in enumerate(SPECIALS)}
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": s.window[1],
        "bos_token": SPECIALS[BOS], "eos_token": SPECIALS[END], "pad_token": SPECIALS[END],
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": added,
    }  # fmt: skip
    files = {"config": config, "generation_config": ends, "tokenizer_config": tokens}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
