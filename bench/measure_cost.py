"""Measures what a decode step costs over context and over batch, on random weights.

    python bench/measure_cost.py docs/results/cost.json

One attention-heavy shape (32 query and 8 KV heads of 128, narrow feed-forward), so that the cache
decides; of all settings together the layers are more than a last-level cache holds. Settings take
turns at every point; medians of all repetitions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import mustafar
from mustafar import KVConfig, Session

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, DIM = 256, 256, 256, 32, 8, 128

SETTINGS = {
    "dense bf16": KVConfig(value_dtype="auto"),
    "bf16 37.5 %": KVConfig(k_sparsity=0.625, v_sparsity=0.75, value_dtype="auto"),
    "int8 22.7 %": KVConfig(k_sparsity=0.625, v_sparsity=0.75, value_dtype="int8"),
    "int4 19.5 %": KVConfig(sparsity=0.5, value_dtype="int4"),
}


def make_model(folder: Path, context: int, layers: int) -> None:
    """Writes the random model's folder."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.03).astype(np.float16)

    tensors = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float16),
    }
    shapes = {
        "self_attn.q_proj": (HEADS * DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * DIM),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(HIDDEN, np.float16)
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = random(*shape)
    save_file(tensors, folder / "model.safetensors")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))


def step_seconds(sessions: list[Session], repetitions: int) -> list[float]:
    """Seconds of one decode step of all sessions together, [repetitions]."""
    out = []
    for _ in range(repetitions):
        start = time.perf_counter()
        Session.decode_batch(sessions, [5] * len(sessions))
        out.append(time.perf_counter() - start)
    return out


def main() -> None:
    """Measures both sweeps and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--contexts", default="4096,8192,16384,24576,32768")
    parser.add_argument("--batches", default="1,2,4,8")
    parser.add_argument("--batch-context", type=int, default=4096)
    parser.add_argument("-r", "--repetitions", type=int, default=9)
    options = parser.parse_args()
    contexts = [int(x) for x in options.contexts.split(",")]
    batches = [int(x) for x in options.batches.split(",")]

    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), 2 * max(contexts), options.layers)
        model = mustafar.Model(name, device="cpu", dtype="bf16")
        ids = np.random.default_rng(1).integers(3, VOCAB, max(contexts))
        results: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {model._core.device_description()}",
            "shape": f"{options.layers} layers, {HEADS}/{KV_HEADS} heads x {DIM}",
            "settings": list(SETTINGS),
            "batch_context": options.batch_context,
            "context": [],
            "batch": [],
        }
        grown = {setting: Session(model, kv) for setting, kv in SETTINGS.items()}
        for context in contexts:
            times: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
            for session in grown.values():
                session.prefill(ids[session.position : context])
            for _ in range(options.repetitions):
                for setting, session in grown.items():
                    times[setting] += step_seconds([session], 3)
            for setting, seconds in times.items():
                row = {"setting": setting, "context": context}
                results["context"].append({**row, "ms": 1e3 * statistics.median(seconds)})
        del grown
        for batch in batches:
            times = {setting: [] for setting in SETTINGS}
            batches_of: dict[str, list[Session]] = {setting: [] for setting in SETTINGS}
            for setting, kv in SETTINGS.items():
                for _ in range(batch):  # caches of their own: a fork would share its pages
                    batches_of[setting].append(Session(model, kv))
                    batches_of[setting][-1].prefill(ids[: options.batch_context])
            for _ in range(options.repetitions):
                for setting, sessions in batches_of.items():
                    times[setting] += step_seconds(sessions, 3)
            for setting, seconds in times.items():
                row = {"setting": setting, "batch": batch}
                results["batch"].append({**row, "ms": 1e3 * statistics.median(seconds)})
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
