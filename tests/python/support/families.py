"""Random models of the families next to Llama, made and saved by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .oracle import randomise_vectors

LAYOUTS: dict[str, dict[str, int]] = {
    "gqa": {"heads": 4, "kv_heads": 2, "head_dim": 16},
    "mha": {"heads": 3, "kv_heads": 3, "head_dim": 32},
}
# Of the config, beside the shape. The context is 512 tokens where nothing else is said.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen3-bias": {"attention_bias": True},
    "phi3": {},
    "phi3-partial": {"partial_rotary_factor": 0.75},
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.15,
        "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "smollm3-bias": {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True},
    "olmo2": {},
}


def save_family(
    folder: Path,
    family: str,
    layout: str = "gqa",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Writes a random model of a row of FAMILIES, or of any model type, and returns its folder."""
    torch.manual_seed(seed)
    shape = LAYOUTS[layout]
    own = {
        "vocab_size": 320,
        "hidden_size": shape["heads"] * shape["head_dim"],
        "intermediate_size": 152,
        "num_hidden_layers": 3,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.08,  # sharp attention, logits far apart
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family.startswith("qwen3"):  # which has 128 where the field is missing
        own["head_dim"] = shape["head_dim"]
    given = {**own, **FAMILIES.get(family, {}), **fields}
    config = AutoConfig.for_model(family.split("-")[0], **given)
    model = AutoModelForCausalLM.from_config(config)
    randomise_vectors(model)
    model.to(dtype).save_pretrained(folder)
    return folder


def change_config(folder: Path, **fields: Any) -> None:
    """Sets fields of a folder's config.json; a value of ... takes the field away."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in fields.items():
        if value is ...:
            config.pop(name, None)
        else:
            config[name] = value
    path.write_text(json.dumps(config, indent=1))
