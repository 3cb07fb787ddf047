"""A random model small enough to read hundreds of kilobytes in seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from support.paths import DEMO


def write_tiny_model(folder: Path, *, context: int) -> Path:
    """One layer, one head of 16 dims; tokenizer and chat template of the demo model."""
    folder.mkdir(parents=True, exist_ok=True)
    demo = json.loads((DEMO / "config.json").read_text())
    vocab, hidden, inner, dim = demo["vocab_size"], 16, 16, 16
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": dim,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": demo["bos_token_id"],
        "eos_token_id": demo["eos_token_id"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    rng = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((vocab, hidden))}
    layer = "model.layers.0."
    for name in ("model.norm", layer + "input_layernorm", layer + "post_attention_layernorm"):
        tensors[name + ".weight"] = np.ones(hidden)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        tensors[f"{layer}self_attn.{name}.weight"] = rng.standard_normal((dim, hidden)) * 0.3
    for name, shape in {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }.items():
        tensors[f"{layer}mlp.{name}.weight"] = rng.standard_normal(shape) * 0.3
    save_file(
        {name: t.astype(np.float32) for name, t in tensors.items()}, folder / "model.safetensors"
    )
    return folder
