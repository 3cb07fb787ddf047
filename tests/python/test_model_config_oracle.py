"""RoPE frequencies as transformers computes them, from both spellings of config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mustafar import _core

transformers = pytest.importorskip("transformers")

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 3.7},
    "llama-3.1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama-3.2": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "odd": {
        "rope_type": "llama3",
        "factor": 5.3,
        "low_freq_factor": 1.3,
        "high_freq_factor": 3.1,
        "original_max_position_embeddings": 1000,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-all": {
        "rope_type": "yarn",
        "factor": 8.3,
        "original_max_position_embeddings": 4096,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 1.3,
        "mscale_all_dim": 0.6,
        "truncate": False,
    },
}


def config_fields(head_dim: int, theta: float, scaling: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4 * head_dim,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "vocab_size": 10,
        "max_position_embeddings": 131072,
        "rope_theta": theta,
        "rope_scaling": scaling or None,
    }


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 128])
def test_frequencies(head_dim: int, theta: float, scaling: str, tmp_path: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = config_fields(head_dim, theta, SCALINGS[scaling])
    (tmp_path / "config.json").write_text(json.dumps(fields))
    kind, classic, factor = _core._rope_frequencies(tmp_path)
    assert kind == SCALINGS[scaling].get("rope_type", "default")

    config = transformers.LlamaConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)  # in today's spelling
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved and "rope_scaling" not in saved
    assert _core._rope_frequencies(tmp_path) == (kind, classic, factor)

    # PyTorch's vectorised pow may miss the nearest float by two units of the last place; the
    # interpolation of llama3 subtracts, which widens that a little.
    rotary = LlamaRotaryEmbedding(config)
    assert factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    same(rotary.inv_freq.numpy(), classic)


def same(expected: Any, frequencies: list[float]) -> None:
    actual = np.array(frequencies, dtype=np.float32)
    ulps = np.abs(expected.view(np.int32) - actual.view(np.int32))
    assert ulps.max() <= 4
    assert np.mean(ulps == 0) >= 0.75


@pytest.mark.parametrize("kind", ["longrope", "yarn"])  # an older name of it in Phi-3's folders
@pytest.mark.parametrize("partial", [1.0, 0.75])
def test_longrope_frequencies(kind: str, partial: float, tmp_path: Path) -> None:
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    fields = config_fields(96, 10000.0, {"type": kind})
    fields |= {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    fields |= {"original_max_position_embeddings": 4096, "partial_rotary_factor": partial}
    n = int(96 * partial) // 2
    fields["rope_scaling"]["short_factor"] = [1.0 + 0.05 * i for i in range(n)]
    fields["rope_scaling"]["long_factor"] = [1.0 + 0.7 * i for i in range(n)]
    del fields["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    name, short, factor = _core._rope_frequencies(tmp_path)
    assert name == "longrope"
    rotary = Phi3RotaryEmbedding(transformers.Phi3Config.from_pretrained(tmp_path))
    assert factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    same(rotary.inv_freq.numpy(), short)
    long = _core._rope_frequencies(tmp_path, long_context=True)[1]
    torch = pytest.importorskip("torch")
    rotary(torch.zeros(1), torch.tensor([[5000]]))
    same(rotary.inv_freq.numpy(), long)
