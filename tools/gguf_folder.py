"""A Llama's GGUF file as a Hugging Face folder in bf16: reads the one, writes the other.

Values that the file keeps in 4 or 8 bits are dequantised; the tokenizer is SmolLM2's.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

try:
    import numpy as np
    from numpy.typing import NDArray
except ImportError:
    raise SystemExit(f"numpy is missing: {sys.executable} -m pip install numpy") from None


class GgufError(RuntimeError):
    """The file is damaged, or not one of the kind that is converted; says why."""


# GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

# Type of a metadata value to its code in struct.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8

# 32 neighbouring values: a scale, for Q4_1 a minimum too; its low nibbles are the first 16 values.
BLOCK = 32
BLOCK_DTYPES = {
    Q4_1: np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", BLOCK // 2)]),
    Q8_0: np.dtype([("scale", "<f2"), ("values", "i1", BLOCK)]),
}


class Tensor(NamedTuple):
    """Where a tensor lies in the file."""

    shape: tuple[int, ...]  # rows first, as numpy has it; GGUF states the fastest dimension first
    kind: int
    offset: int  # bytes from the start of the file


class Gguf:
    """A GGUF file's metadata, and its tensors by name.

    Args:
        data: The whole file.

    Raises:
        GgufError: Not a GGUF file of version 3, or cut off.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        try:
            if self._take(4) != b"GGUF" or self._scalar("I") != 3:
                raise GgufError("not a GGUF file of version 3")
            n_tensors, n_entries = self._scalar("Q"), self._scalar("Q")
            for _ in range(n_entries):
                name = self._string()
                self.metadata[name] = self._value(self._scalar("I"))
            entries = [self._tensor_entry() for _ in range(n_tensors)]
        except struct.error:
            raise GgufError("the GGUF file ends within its header") from None
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        for name, tensor in entries:
            self.tensors[name] = tensor._replace(offset=start + tensor.offset)

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor's values, in its own shape.

        Raises:
            GgufError: A type other than F32, Q4_1 and Q8_0, or data beyond the end of the file.
        """
        shape, kind, offset = self.tensors[name]
        count = math.prod(shape)
        try:
            if kind == F32:
                return np.frombuffer(self._data, "<f4", count, offset).reshape(shape)
            if kind not in BLOCK_DTYPES:
                raise GgufError(f"tensor {name} has GGUF type {kind}: not F32, Q4_1 or Q8_0")
            blocks = np.frombuffer(self._data, BLOCK_DTYPES[kind], count // BLOCK, offset)
        except ValueError:
            raise GgufError(f"the GGUF file ends within tensor {name}") from None
        scale = blocks["scale"].astype(np.float32)[:, None]
        if kind == Q8_0:
            return (scale * blocks["values"]).reshape(shape)
        nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)
        minimum = blocks["minimum"].astype(np.float32)[:, None]
        return (scale * nibbles + minimum).reshape(shape)

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise struct.error
        self._at += count
        return taken

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, count = self._scalar("I"), self._scalar("Q")
            return [self._value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise GgufError(f"the GGUF header has a value of unknown type {kind}")
        return self._scalar(SCALARS[kind])

    def _tensor_entry(self) -> tuple[str, Tensor]:
        name = self._string()
        shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))[::-1]
        kind, offset = self._scalar("I"), self._scalar("Q")
        return name, Tensor(shape, kind, offset)


# Conversion

OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in OUTER_NAMES:
        return f"{OUTER_NAMES[parts[0]]}.{parts[1]}"
    raise GgufError(f"tensor {name} is none of a Llama's")


def half_split_rope(rows: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """Rows of a q or k projection in Hugging Face's order.

    RoPE turns pairs of a head's dims: neighbours (2 i, 2 i + 1) in GGUF, (i, i + D / 2) here.
    """
    count, columns = rows.shape
    pairs = rows.reshape(n_heads, count // n_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(count, columns)


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to the nearest bf16, ties to even; same shape. GgufError where not finite."""
    if not np.isfinite(values).all():
        raise GgufError("a weight is not a finite number")
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def tensors_of(gguf: Gguf) -> dict[str, NDArray[np.uint16]]:
    """bf16 bits of every tensor, by Hugging Face name."""
    heads = {
        "attn_q": gguf.metadata["llama.attention.head_count"],
        "attn_k": gguf.metadata["llama.attention.head_count_kv"],
    }
    tensors = {}
    for name in gguf.tensors:
        values = gguf.read(name)
        kind = name.split(".")[-2]
        if kind in heads:
            values = half_split_rope(values, heads[kind])
        tensors[hugging_face_name(name)] = bf16_bits(values)
    return tensors


def config_of(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json"""
    llama = {key.removeprefix("llama."): value for key, value in metadata.items()}
    hidden, n_heads = llama["embedding_length"], llama["attention.head_count"]
    epsilon = float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}")  # the f32's decimal again
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama.get("rope.dimension_count", hidden // n_heads),
        "hidden_act": "silu",
        "max_position_embeddings": llama["context_length"],
        "rms_norm_eps": epsilon,
        "rope_theta": llama["rope.freq_base"],
        "vocab_size": llama["vocab_size"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE, digits one by one, no token added to a text."""
    if (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise GgufError("the GGUF file's tokenizer is not SmolLM2's")
    control = 3  # the GGUF token type of special tokens
    tokens = metadata["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": tokens[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, kind in enumerate(metadata["tokenizer.ggml.token_type"])
            if kind == control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        # Of transformers' classes the one that takes all of tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "add_bos_token": metadata["tokenizer.ggml.add_bos_token"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_safetensors(path: Path, tensors: dict[str, NDArray[np.uint16]]) -> None:
    """bf16 bits by name, as safetensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, bits in tensors.items():
        span = [offset, offset + bits.nbytes]
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": span}
        offset += bits.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for bits in tensors.values():
            file.write(bits.astype("<u2", copy=False).tobytes())


def convert(gguf: Gguf, folder: Path) -> None:
    """Writes the five files of a Hugging Face folder, which exists."""
    architecture = gguf.metadata.get("general.architecture")
    if architecture != "llama":
        raise GgufError(f"the GGUF file's architecture is {architecture}, not llama")
    tensors = tensors_of(gguf)
    config = config_of(gguf.metadata, tied="lm_head.weight" not in tensors)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    texts = {
        "config.json": config,
        "generation_config.json": {key: config[key] for key in special},
        "tokenizer.json": tokenizer_of(gguf.metadata),
        "tokenizer_config.json": tokenizer_config_of(gguf.metadata),
    }
    for name, content in texts.items():
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    write_safetensors(folder / "model.safetensors", tensors)
