#!/usr/bin/env python3
"""PyTorch's dense attention (flash, cuDNN), decode and prefill, at the GPU benchmarks' shapes.

    python bench/torch_attention.py [batch,context,heads,kv_heads ...]

Prints JSON lines. In decode, layers' caches are rotated so that every call reads cold memory.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = [
    (8, 32768, 32, 8),
    (1, 32768, 32, 8),
    (1, 131072, 32, 8),
    (8, 4096, 32, 8),
    (32, 4096, 32, 8),
    (8, 32768, 32, 32),
    (1, 32768, 32, 32),
    (32, 32768, 32, 8),
]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
COLD_BYTES = 1 << 30


def measure(batch: int, context: int, heads: int, kv_heads: int, backend: SDPBackend) -> float:
    """Microseconds per layer, the median of seven graph replays."""
    layer_bytes = 2 * batch * kv_heads * context * 128 * 2
    layers = max(2, min(32, COLD_BYTES // layer_bytes + 1))
    caches = [
        torch.randn(2, batch, kv_heads, context, 128, device="cuda", dtype=torch.float16)
        for _ in range(layers)
    ]
    query = torch.randn(batch, heads, 1, 128, device="cuda", dtype=torch.float16)

    def step() -> None:
        for cache in caches:
            functional.scaled_dot_product_attention(
                query, cache[0], cache[1], enable_gqa=heads != kv_heads
            )

    with sdpa_kernel([backend]):
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / layers)
    return sorted(times)[3]


def measure_prefill(tokens: int, backend: SDPBackend) -> float:
    """Microseconds of one causal layer over a prompt, 32/8 heads x 128: the median of seven."""
    query = torch.randn(1, 32, tokens, 128, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(2, 1, 8, tokens, 128, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        functional.scaled_dot_product_attention(
            query, cache[0], cache[1], is_causal=True, enable_gqa=True
        )

    times = []
    with sdpa_kernel([backend]):
        for _ in range(3):
            step()
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000)
    return sorted(times)[3]


def main() -> int:
    shapes = [tuple(int(n) for n in text.split(",")) for text in sys.argv[1:]] or SHAPES
    for tokens in (4096, 32768):
        for name, backend in BACKENDS.items():
            entry: dict[str, object] = {"kernel": f"torch {name}", "prefill": tokens}
            try:
                us = measure_prefill(tokens, backend)
                entry["us"] = round(us, 1)
                entry["tflops"] = round(4 * 128 * 32 * tokens * (tokens + 1) / 2 / us * 1e-6, 1)
            except RuntimeError as error:
                entry["error"] = str(error).splitlines()[0]
            print(json.dumps(entry), flush=True)
    for shape in shapes:
        for name, backend in BACKENDS.items():
            row: dict[str, object] = {
                "kernel": f"torch {name}",
                "setting": "dense f16",
                **dict(zip(("batch", "context", "heads", "kv_heads"), shape, strict=True)),
            }
            try:
                row["us_per_layer"] = round(measure(*shape, backend), 3)
            except RuntimeError as error:
                row["error"] = str(error).splitlines()[0]
            torch.cuda.empty_cache()
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
