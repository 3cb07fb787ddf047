"""The oracle: Hugging Face transformers in float32, and random models of any shape for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

torch.manual_seed(0)


def load(folder: Path) -> Any:
    """The folder's model, upcast to float32, with plain attention."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    """Logits [n, vocab] of every position, in one pass."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def greedy(model: Any, ids: list[int], n: int) -> list[int]:
    """The n most probable next tokens, one after another, ends of sequence included."""
    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=True)
        made = []
        for _ in range(n):
            token = int(out.logits[0, -1].argmax())
            made.append(token)
            out = model(
                torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True
            )
    return made


def randomise_vectors(model: torch.nn.Module) -> None:
    """Biases and norm weights other than those that change nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)


def make_model(
    folder: Path,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 2,
    hidden: int = 64,
    tied: bool = False,
    rope: dict[str, Any] | None = None,
    qkv_bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    context: int = 2048,
    spread: float = 0.08,
) -> Path:
    """Writes a random model's folder and returns it.

    spread: standard deviation of the weights. 0.08 makes attention sharp and logits far apart.
    """
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 320,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden + 24,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "initializer_range": spread,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if qkv_bias:
        model: Any = Qwen2ForCausalLM(Qwen2Config(**shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    randomise_vectors(model)
    model.to(dtype).save_pretrained(folder)
    # The classic spelling of RoPE, which every version of transformers reads.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    config["rope_theta"] = 10000.0
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config, indent=1))
    return folder


def nmse(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Squared error over squared magnitude."""
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float((difference**2).sum() / (expected.astype(np.float64) ** 2).sum())
