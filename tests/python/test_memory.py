"""What the cache takes, measured on random-weight models of head_dim 128 at 16K tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Session

safetensors_numpy = pytest.importorskip("safetensors.numpy")

TOKENS = 16384
LAYERS, KV_HEADS, DIM = 3, 2, 128


def make_folder(folder: Path) -> Path:
    """A small random Llama with the head layout of large ones: 16-bit weights, head_dim 128."""
    hidden, inner, vocab, heads = 64, 64, 128, 4
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "vocab_size": vocab,
        "max_position_embeddings": 2 * TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.05).astype(np.float16)

    tensors = {"model.embed_tokens.weight": random(vocab, hidden)}
    tensors["model.norm.weight"] = np.ones(hidden, np.float16)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        tensors[p + "input_layernorm.weight"] = np.ones(hidden, np.float16)
        tensors[p + "post_attention_layernorm.weight"] = np.ones(hidden, np.float16)
        tensors[p + "self_attn.q_proj.weight"] = random(heads * DIM, hidden)
        tensors[p + "self_attn.k_proj.weight"] = random(KV_HEADS * DIM, hidden)
        tensors[p + "self_attn.v_proj.weight"] = random(KV_HEADS * DIM, hidden)
        tensors[p + "self_attn.o_proj.weight"] = random(hidden, heads * DIM)
        tensors[p + "mlp.gate_proj.weight"] = random(inner, hidden)
        tensors[p + "mlp.up_proj.weight"] = random(inner, hidden)
        tensors[p + "mlp.down_proj.weight"] = random(hidden, inner)
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


SETTINGS = [
    ("dense", KVConfig.preset("dense"), 256),
    ("2 bytes, K .625 V .75", KVConfig(k_sparsity=0.625, v_sparsity=0.75, value_dtype="auto"), 96),
    ("int8, K .625 V .75", KVConfig(k_sparsity=0.625, v_sparsity=0.75, value_dtype="int8"), 58),
    ("int4, .5", KVConfig(sparsity=0.5, value_dtype="int4"), 50),
    ("2 bytes, row 0.7", KVConfig(sparsity=0.7, pattern="row", value_dtype="auto"), 96),
]


@pytest.mark.parametrize(("name", "kv", "row_bytes"), SETTINGS, ids=[s[0] for s in SETTINGS])
def test_bytes_at_16k(folder: Path, name: str, kv: KVConfig, row_bytes: int) -> None:
    ids = np.random.default_rng(1).integers(3, 128, TOKENS)
    with mustafar.Model(folder, device="cpu") as model:
        session = Session(model, kv)
        session.prefill(ids)
        usage = session.memory()
        assert usage.compressed_tokens == (TOKENS - kv.window) // 64 * 64
        rows = usage.compressed_tokens * LAYERS * KV_HEADS * 2
        measured = (usage.masks + usage.values + usage.scales) / rows
        # Runs are whole words: "row" at 0.7 keeps 39 of 128, 78 bytes and 2 of padding.
        assert row_bytes - 0.01 <= measured <= row_bytes + 0.01
        assert usage.padding <= 0.01 * usage.allocated
        assert usage.dense_equivalent == TOKENS * LAYERS * KV_HEADS * 2 * DIM * 2

        one_dense_layer = TOKENS * KV_HEADS * 2 * DIM * 2
        peak = model.memory().kv_peak_bytes
        assert usage.allocated <= peak <= 1.1 * (usage.allocated + one_dense_layer)
        held = model.memory().kv_bytes
        # Pages held ahead of their need: an eighth at most, and of a small store 256 KB.
        assert usage.allocated <= held <= usage.allocated * 9 / 8 + (256 << 10)
        session.close()
        assert model.memory().kv_bytes == 0


def test_grows_with_the_context_not_its_maximum(folder: Path) -> None:
    with mustafar.Model(folder, device="cpu") as model:
        session = Session(model, KVConfig(sparsity=0.5, value_dtype="auto"))
        assert session.memory().allocated == 0
        session.prefill([5] * 1000)
        usage = session.memory()
        per_token = LAYERS * KV_HEADS * 2 * 144
        assert 900 * per_token <= usage.allocated - usage.tail <= 1000 * per_token
        fork = session.fork()
        before = model.memory().kv_bytes
        fork.prefill([6] * 64)
        grown = model.memory().kv_bytes - before
        assert grown <= 64 * per_token + (512 << 10)  # the shared pages are not copied


@pytest.mark.parametrize("preset", ["dense", "lossless"])
def test_a_short_conversation_uses_no_more_than_dense(folder: Path, preset: str) -> None:
    rows = LAYERS * KV_HEADS * 2 * DIM * 2
    with mustafar.Model(folder, device="cpu") as model:
        session = Session(model, KVConfig.preset(preset))
        assert model.memory().kv_bytes == 0
        session.prefill([5] * 7)
        for token in range(3, 123):
            session.decode(token)
            usage = session.memory()
            tokens = session.position
            assert usage.dense_equivalent == tokens * rows
            assert usage.used <= usage.dense_equivalent
            if usage.compressed_tokens == 0:
                assert usage.used == tokens * rows
                assert usage.allocated <= max(16, 1.6 * tokens) * rows
        assert usage.compressed_tokens == 64
        session.reset()
        assert session.memory().allocated == session.memory().used == 0
        assert model.memory().kv_bytes == 0


def test_idle_sessions_leave_a_budget_to_the_live_one(folder: Path) -> None:
    """What an idle session once took: the whole tail, and twice that after a first token."""
    kv = KVConfig()
    rows = LAYERS * KV_HEADS * 2 * DIM * 2
    tail = (kv.sink_tokens + kv.window + 64) * rows
    with mustafar.Model(folder, device="cpu") as model:
        live = Session(model, kv)
        live.prefill([5] * 300)
        live.prefill([6] * 20)
        needed = model.memory().kv_peak_bytes
    with mustafar.Model(folder, device="cpu", kv_budget=needed + tail) as model:
        live = Session(model, kv)
        live.prefill([5] * 300)
        idle = [Session(model, kv) for _ in range(4)]
        for session in idle[:3]:
            session.prefill([7])
        live.prefill([6] * 20)
        assert live.position == 320
