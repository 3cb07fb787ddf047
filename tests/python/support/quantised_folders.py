"""Quantised folders in the layouts that people have, and the matrices that they stand for.

compressed-tensors folders are written and read by that package. AutoAWQ's and GPTQ's layouts are
written here in numpy from their definitions: bits of words, [inputs, outputs].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from .families import change_config

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
# Of a matrix [rows, cols]: its tensors by suffix, and its weights as the layout's own package or
# definition has them, rounded to its type.
Writer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def rewrite(
    folder: Path,
    write: Writer,
    config: Config,
    *,
    matrices: Callable[[str], bool] = lambda name: name.endswith("proj.weight"),
    extra: Callable[[str, torch.Tensor], Tensors] = lambda module, weight: {},
) -> dict[str, torch.Tensor]:
    """Quantises a folder in place; returns the weights of its matrices by name."""
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if matrices(name)]:
        weight = tensors.pop(name)
        module = name.removesuffix(".weight")
        stored, expected[name] = write(weight)
        stored |= extra(module, weight)
        tensors |= {f"{module}.{suffix}": t.contiguous() for suffix, t in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=config)
    return expected


def dense_copy(folder: Path, out: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The folder with these weights in the place of its quantised matrices, in f32."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    modules = {name.removesuffix(".weight") for name in weights}
    kept = {k: t.float() for k, t in tensors.items() if k.rpartition(".")[0] not in modules}
    biases = {k: t.float() for k, t in tensors.items() if k.endswith(".bias") and t.any()}
    dense = {name: weight.float().contiguous() for name, weight in weights.items()}
    save_file(kept | biases | dense, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for field in ("quantization_config", "torch_dtype", "dtype"):
        config.pop(field, None)
    (out / "config.json").write_text(json.dumps(config))
    return out


# Rounding to integers, the same for all layouts.


def round_groups(
    weight: torch.Tensor, bits: int, group: int, zeros: bool, order: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Unsigned codes [rows, cols], f16 scales and zero points [rows, groups], the group of each input.

    order: inputs are put into groups in that order.
    """
    w = weight.float().numpy()
    rows, cols = w.shape
    group = group if group > 0 else cols
    index = np.empty(cols, np.int64)
    index[order if order is not None else np.arange(cols)] = np.arange(cols) // group
    top, n = 2**bits - 1, int(index.max()) + 1
    scales, points = np.empty((rows, n), np.float32), np.empty((rows, n), np.int64)
    for g in range(n):
        part = w[:, index == g]
        low = np.minimum(part.min(axis=1), 0) if zeros else -np.abs(part).max(axis=1)
        high = np.maximum(part.max(axis=1), 0) if zeros else np.abs(part).max(axis=1)
        scales[:, g] = ((high - low) / top).astype(np.float16)
        points[:, g] = np.clip(np.rint(-low / scales[:, g]), 0, top) if zeros else 2 ** (bits - 1)
    codes = np.clip(np.rint(w / scales[:, index]) + points[:, index], 0, top).astype(np.int64)
    return codes, scales, points, index


def to_words(codes: NDArray[np.int64], bits: int) -> torch.Tensor:
    """Words [n, ...] of 32 / bits neighbours along the first axis each, lowest bits first."""
    per_word = 32 // bits
    padding = -len(codes) % per_word
    codes = np.concatenate([codes, np.zeros((padding, *codes.shape[1:]), np.int64)])
    parts = codes.reshape(-1, per_word, *codes.shape[1:])
    words = sum(parts[:, i] << (bits * i) for i in range(per_word))
    return torch.from_numpy(np.asarray(words).astype(np.uint32).view(np.int32).copy())


def f16_weights(
    codes: NDArray[np.int64],
    scales: NDArray[np.float32],
    points: NDArray[np.int64],
    index: NDArray[np.int64],
) -> torch.Tensor:
    """scale * (code - zero), in f16."""
    difference = (codes - points[:, index]).astype(np.float16)
    return torch.from_numpy(difference * scales.astype(np.float16)[:, index])


def gptq(
    bits: int = 4, group: int = 128, *, v2: bool = False, sym: bool = True, desc_act: bool = False
) -> tuple[Writer, Config]:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        cols = weight.shape[1]
        order = np.random.default_rng(cols).permutation(cols) if desc_act else None
        codes, scales, points, index = round_groups(weight, bits, group, not sym, order)
        qzeros = to_words(points.T.swapaxes(0, 1), bits).T  # packed along the outputs
        if not v2:  # from whole words, so that a borrow of a zero point 0 runs on
            one = sum(1 << (bits * i) for i in range(32 // bits))
            words = qzeros.numpy().astype(np.int64) - one
            qzeros = torch.from_numpy((words & 0xFFFFFFFF).astype(np.uint32).view(np.int32))
        tensors = {
            "qweight": to_words(codes.T, bits),
            "qzeros": qzeros,
            "scales": torch.from_numpy(scales.T.astype(np.float16)),
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }
        return tensors, f16_weights(codes, scales, points, index)

    config: Config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": desc_act,
        "sym": sym,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }
    return write, config


def awq(group: int = 32) -> tuple[Writer, Config]:
    def words(codes: NDArray[np.int64]) -> torch.Tensor:  # [n, rows] -> [n, rows / 8]
        shuffled = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return to_words(shuffled.reshape(len(codes), -1).T, 4).T

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, scales, points, index = round_groups(weight, 4, group, True)
        tensors = {
            "qweight": words(codes.T),
            "qzeros": words(points.T),
            "scales": torch.from_numpy(scales.T.astype(np.float16)),
        }
        return tensors, f16_weights(codes, scales, points, index)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return write, {**config, "zero_point": True}


def fp8(
    scales: str = "block", block: int = 32, dtype: torch.dtype = torch.float32
) -> tuple[Writer, Config]:
    """scales: "block", "row" or "tensor", of that dtype."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        w = weight.float()
        rows, cols = w.shape
        high, wide = {"block": (block, block), "row": (1, cols), "tensor": (rows, cols)}[scales]
        grid = torch.zeros(-(-rows // high), -(-cols // wide))
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                part = w[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
                grid[i, j] = part.abs().max() / 448
        grid = grid.to(dtype)
        spread = grid.float().repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :cols]
        codes = (w / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = grid.reshape(()) if scales == "tensor" else grid
        return {"weight": codes, "weight_scale_inv": stored}, codes.float() * spread

    size = [block, block] if scales == "block" else None
    return write, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": size}


def compressed_tensors(
    layout: str, *, activations: Config | None = None, scale_dtype: Any = None, **arguments: Any
) -> tuple[Writer, Config]:
    """layout: the format's name; arguments: of QuantizationArgs for the weights."""
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    compressor = BaseCompressor.get_value_from_registry(layout)

    def ranges(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, cols = w.shape
        if args.strategy == "block":
            high, wide = args.block_structure
            padded = torch.nn.functional.pad(w, (0, -cols % wide, 0, -rows % high))
            parts = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2)
            parts = parts.flatten(2)
        elif args.strategy == "group":
            parts = w.unflatten(1, (-1, args.group_size))
        else:
            parts = w.unsqueeze(1) if args.strategy == "channel" else w.reshape(1, -1)
        low, high_ = parts.amin(-1), parts.amax(-1)
        return low, high_

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale, zero = calculate_qparams(*ranges(weight.float()), args)
        scale = scale.to(scale_dtype or weight.dtype)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        stored = compressor.compress(state, scheme)
        return stored, compressor.decompress(stored, scheme)["weight"]

    weights = args.model_dump(mode="json")
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return write, {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
