"""Llamas as a Hugging Face folder and as GGUF, the same bf16 matrices: random, or a folder's."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = Iterable[tuple[str, NDArray[np.uint16]]]

SEED = 1
CONTEXT = 131072  # tokens, as the model files state it


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    tied: bool
    eps: float = 1e-5  # of the norms


SHAPES = {
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, 5e5, True),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128, 128256, 5e5, True),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, 5e5, False),
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4, 64, 32000, 1e4, False),
    # An 8B model's heads and little else: what attention costs does not drown in weights.
    "attention": Shape(512, 512, 32, 32, 8, 128, 512, 5e5, True),
}


def parse_shape(text: str) -> Shape:
    """A name of SHAPES, with an optional ``:layers``."""
    name, _, layers = text.partition(":")
    if name not in SHAPES:
        raise SystemExit(f"--shape must be one of {', '.join(SHAPES)}, not {name}")
    return replace(SHAPES[name], layers=int(layers)) if layers else SHAPES[name]


def random_pool() -> NDArray[np.uint16]:
    """bf16 bits of normal values with standard deviation 0.02, a prime number of them."""
    rng = np.random.default_rng(SEED)
    values = rng.standard_normal(4_194_301, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16)  # truncated: random anyway


def tensors(shape: Shape) -> Tensors:
    """Hugging Face names and bf16 bits; norms are one."""
    rng = np.random.default_rng(SEED)
    pool = random_pool()

    def matrix(rows: int, columns: int) -> NDArray[np.uint16]:
        """The pool over and over, from a random start: as good as new values, and quick."""
        start = int(rng.integers(len(pool)))
        return np.resize(np.roll(pool, -start), (rows, columns))

    one = np.full(shape.hidden, 0x3F80, np.uint16)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", matrix(shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", one
        yield prefix + "self_attn.q_proj.weight", matrix(q, shape.hidden)
        yield prefix + "self_attn.k_proj.weight", matrix(kv, shape.hidden)
        yield prefix + "self_attn.v_proj.weight", matrix(kv, shape.hidden)
        yield prefix + "self_attn.o_proj.weight", matrix(shape.hidden, q)
        yield prefix + "post_attention_layernorm.weight", one
        yield prefix + "mlp.gate_proj.weight", matrix(shape.intermediate, shape.hidden)
        yield prefix + "mlp.up_proj.weight", matrix(shape.intermediate, shape.hidden)
        yield prefix + "mlp.down_proj.weight", matrix(shape.hidden, shape.intermediate)
    yield "model.norm.weight", one
    if not shape.tied:
        yield "lm_head.weight", matrix(shape.vocab, shape.hidden)


def folder_shape(folder: Path) -> Shape:
    """The sizes in a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama" or config.get("rope_scaling"):
        raise SystemExit(f"{folder}: not a Llama without RoPE scaling")
    heads = config["num_attention_heads"]
    return Shape(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        rope_theta=config["rope_theta"],
        tied=config["tie_word_embeddings"],
        eps=config["rms_norm_eps"],
    )


def folder_tensors(folder: Path) -> Tensors:
    """Names and bf16 bits of a folder with one file of bf16 tensors."""
    bits = np.memmap(folder / "model.safetensors", np.uint8, "r")
    start = 8 + int(bits[:8].view(np.uint64)[0])
    for name, entry in json.loads(bytes(bits[8:start])).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{folder}: {name} is {entry['dtype']}, must be BF16")
        begin, end = entry["data_offsets"]
        yield name, bits[start + begin : start + end].view(np.uint16).reshape(entry["shape"])


def write_folder(shape: Shape, folder: Path) -> None:
    """config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    header: dict[str, Any] = {}
    offset = 0
    for name, bits in tensors(shape):
        end = offset + bits.nbytes
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(len(encoded) + 8) % 64)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, bits in tensors(shape):
            file.write(bits.tobytes())


def interleave_rope(bits: NDArray[np.uint16], heads: int) -> NDArray[np.uint16]:
    """Rows of a q or k projection in GGUF's order: pairs (i, i + D/2) become neighbours."""
    rows, columns = bits.shape
    halves = bits.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def write_gguf(shape: Shape, matrices: Tensors, path: Path) -> None:
    """These matrices as GGUF in bf16, norms in f32, with a vocabulary of placeholders."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("llama")
    special = [b"<unk>", b"<s>", b"</s>"]
    writer.add_token_list(special + [b"t%d" % i for i in range(len(special), shape.vocab)])
    writer.add_token_scores([0.0] * shape.vocab)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (shape.vocab - len(kinds)))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    for name, bits in matrices:
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None, name
        if bits.ndim == 1:
            writer.add_tensor(target, (bits.astype(np.uint32) << 16).view(np.float32))
            continue
        if "q_proj" in name:
            bits = interleave_rope(bits, shape.heads)
        elif "k_proj" in name:
            bits = interleave_rope(bits, shape.kv_heads)
        writer.add_tensor(target, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
