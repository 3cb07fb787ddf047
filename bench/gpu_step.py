"""What a decode step of many requests on a GPU is made of: its kernels and copies, and idle time.

    python bench/gpu_step.py [--shape llama-3-8b:8] [--requests 64] [--tokens 8192]
        [--kv lossless balanced] [--weights auto] [--prompts] [--json FILE]

Random weights; prompts of random ids; the engine decodes them while PyTorch's profiler (CUPTI)
watches. A kernel's time is its own, whatever ran beside it; idle is what no kernel and no copy
covers. Kernels of one name and grid make a row. With --prompts parts of prompts are watched
instead, 2,048 tokens each.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import mustafar
from random_llama import SHAPES, parse_shape, write_folder

PART = 2048  # tokens of a prompt that are taken at once


def watched(seconds: float) -> list[dict[str, Any]]:
    """Events of the GPU during some seconds: name, grid, start and duration in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        time.sleep(seconds)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return [
        event
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and event.get("dur", 0) > 0
    ]


def row_of(event: dict[str, Any]) -> str:
    """A kernel's own name, where it is one of ours, and its grid."""
    own = re.search(r"(\w+_kernel)\b", event["name"])
    name = own.group(1) if own else event["name"][:60]
    return f"{name} {event.get('args', {}).get('grid', '')}"


def busy_time(events: list[dict[str, Any]]) -> tuple[float, float]:
    """Microseconds that an event covers, and from the first's start to the last's end."""
    busy, end = 0.0, 0.0
    for event in sorted(events, key=lambda event: event["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy, end - min(event["ts"] for event in events)


def measure(model: mustafar.Model, kv: str, options: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    with mustafar.Engine(
        model,
        mustafar.KVConfig.preset(kv),
        max_batch=options.requests,
        prefill_tokens=PART,
        prefix_cache="off",
    ) as engine:
        requests = [
            engine.submit(
                rng.integers(1000, 100000, options.tokens).tolist(),
                max_new_tokens=2000,
                temperature=0,
            )
            for _ in range(options.requests)
        ]
        if options.prompts:
            time.sleep(0.5)
            events = watched(0.5)
        else:
            while engine.stats().prompt_tokens < options.requests * options.tokens:
                time.sleep(0.01)
            time.sleep(0.2)
            events = watched(0.4)
        for request in requests:
            request.cancel()
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        times[row_of(event)].append(event["dur"])
    # Ids are turned to rows once a step; a part of a prompt, too.
    steps = max(sum(len(of) for name, of in times.items() if name.startswith("embed")), 1)
    if not events:
        raise SystemExit(f"{kv}: the profiler saw nothing of the GPU")
    busy, whole = busy_time(events)
    what = "parts of prompts" if options.prompts else "steps"
    print(f"\n{kv}: {steps} {what}, each {whole / steps:.0f} us, idle {(whole - busy) / steps:.0f}")
    print("\n| kernel and grid | calls | us a call | us of each |\n|---|---:|---:|---:|")
    ordered = sorted(times.items(), key=lambda row: -sum(row[1]))
    for name, of in ordered[:24]:
        print(
            f"| {name} | {len(of) / steps:.1f} | {sum(of) / len(of):.1f} | {sum(of) / steps:.0f} |",
            flush=True,
        )
    kernels = {name: [len(of), sum(of)] for name, of in ordered}
    return {"kv": kv, "steps": steps, "us": whole, "busy_us": busy, "kernels": kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3-8b:8", help=", ".join(SHAPES) + " [:layers]")
    parser.add_argument("--folder", type=Path, help="where weights are written; else temporary")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192, help="of a prompt")
    parser.add_argument("--kv", nargs="+", default=["lossless", "balanced"], help="presets")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--prompts", action="store_true", help="prompts in place of decode steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    watched(0.0)  # loads and starts the profiler, which takes longer than some requests
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_folder(parse_shape(options.shape), Path(folder))
        with mustafar.Model(folder, device="cuda", weights=options.weights) as model:
            results = [measure(model, kv, options) for kv in options.kv]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
