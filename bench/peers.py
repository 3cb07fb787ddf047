"""Compares this runtime with llama.cpp (through llama-cpp-python) on the same weights.

    pip install llama-cpp-python gguf
    python bench/peers.py --shape llama-3.2-1b:4 --threads 2
    python bench/peers.py -m FOLDER --quantised

Both engines load the same bf16 matrices, random or a folder's, once as a Hugging Face folder and
once as GGUF, run in one process with the same threads and context, and take turns, so that a
machine that changes its speed does so for all of them. llama.cpp runs with flash attention on and
off; ratios are to the better of the two, medians of all repetitions. --quantised: weights of 8 and
4 bits, rounded from these by each side, each beside those of llama.cpp that have as many bits (with
flash attention; what a file has in all is in the name). Figures:

    prefill N         tokens/s of a prompt of N tokens on an empty cache
    decode @ N        tokens/s of single tokens after N
    attention @ N     milliseconds per token that N tokens of context cost: decode after N, less
                      decode after the shortest prompt

Prints Markdown; --json and --markdown write files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from random_llama import (
    SEED,
    folder_shape,
    folder_tensors,
    parse_shape,
    tensors,
    write_folder,
    write_gguf,
)

# Weights of as many bits: ours, and llama.cpp's numbers of theirs (llama.h, llama_ftype).
QUANTISED = {"int8": {"q8_0": 7}, "int4": {"q4_0": 2, "q4_k_m": 15}}

PAUSE = 0.1  # seconds between engines: idle worker threads stop spinning

# Engines: each can prefill an empty cache, and decode from where its last prefill ended.


class Mustafar:
    """This runtime with one cache setting. group: engines that are compared."""

    def __init__(self, model: Any, name: str, kv: Any, group: str = "") -> None:
        self.name, self._model, self._kv = f"mustafar, {name}", model, kv
        self.group = group
        self._session: Any = None

    def prefill(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits [vocab] after the last of the tokens."""
        import mustafar

        self._session = mustafar.Session(self._model, kv=self._kv)
        return np.array(self._session.prefill(ids))

    def decode(self, ids: list[int]) -> float:
        """Seconds for these tokens, one by one, after the last prefill."""
        fork = self._session.fork()
        fork.decode(ids[0])  # makes the fork's scratch memory
        start = time.perf_counter()
        for token in ids:
            fork.decode(token)
        return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp with its default f16 cache."""

    def __init__(
        self, path: Path, context: int, threads: int, flash: bool, name: str = "", group: str = ""
    ) -> None:
        import llama_cpp

        self.name = f"llama.cpp, {name or 'flash attention ' + ('on' if flash else 'off')}"
        self.group = group
        self._llama = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=2048,
            n_ubatch=512,
            flash_attn=flash,
            verbose=False,
        )
        self._depth = 0

    def prefill(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits [vocab] after the last of the tokens."""
        import llama_cpp

        self._llama.reset()
        self._llama.eval(ids)
        self._depth = len(ids)
        logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).copy()

    def decode(self, ids: list[int]) -> float:
        """Seconds for these tokens, one by one, after the last prefill."""
        self._llama.n_tokens = self._depth  # eval drops what lies beyond
        self._llama.eval(ids[:1])
        start = time.perf_counter()
        for token in ids:
            self._llama.eval([token])
        return time.perf_counter() - start


Samples = dict[str, list[float]]  # seconds, by engine
Figure = Callable[[float], float]  # of seconds


def take_turns(engines: list[Any], repetitions: int, measure: Callable[[Any], float]) -> Samples:
    """Seconds per engine and repetition, the engines taking turns."""
    samples: Samples = {engine.name: [] for engine in engines}
    for _ in range(repetitions):
        for engine in engines:
            time.sleep(PAUSE)
            samples[engine.name].append(measure(engine))
    return samples


def timed_prefill(ids: list[int]) -> Callable[[Any], float]:
    """A measurement of the whole call."""

    def measure(engine: Any) -> float:
        start = time.perf_counter()
        engine.prefill(ids)
        return time.perf_counter() - start

    return measure


def timed_decode(ids: list[int]) -> Callable[[Any], float]:
    """A measurement of the engine's own."""
    return lambda engine: engine.decode(ids)


def rate_of(tokens: int) -> Figure:
    """Tokens per second."""
    return lambda seconds: tokens / seconds


def ratio(a: float, b: float) -> float | None:
    """None where noise left nothing to compare."""
    return a / b if a > 0 and b > 0 else None


def result(
    engines: list[Any], test: str, unit: str, samples: Samples, value: Figure
) -> dict[str, Any]:
    """Every engine's median and its ratio to the best llama.cpp of its group; above 1 is better."""
    medians = {name: value(statistics.median(times)) for name, times in samples.items()}
    groups = {engine.name: engine.group for engine in engines}
    rates = unit == "tokens/s"

    def best_peer(group: str) -> float:
        peers = [
            figure
            for name, figure in medians.items()
            if name.startswith("llama.cpp") and groups[name] == group
        ]
        return max(peers) if rates else min(peers)

    rows = [
        {
            "engine": name,
            "median": figure,
            "ratio": ratio(figure, best_peer(groups[name]))
            if rates
            else ratio(best_peer(groups[name]), figure),
            "samples": [value(seconds) for seconds in samples[name]],
        }
        for name, figure in medians.items()
    ]
    return {"test": test, "unit": unit, "rows": rows}


def agreement(engines: list[Any], ids: list[int]) -> dict[str, float]:
    """Normalised squared error of every engine's logits against the first's: the same model?"""
    reference = engines[0].prefill(ids).astype(np.float64)
    power = float(np.mean(reference**2))
    return {
        engine.name: float(np.mean((engine.prefill(ids) - reference) ** 2)) / power
        for engine in engines[1:]
    }


def quantised_gguf(gguf: Path, name: str, number: int, threads: int) -> Path:
    """What llama.cpp's quantise call makes of a GGUF of bf16, beside it."""
    import llama_cpp

    path = gguf.with_name(f"{gguf.stem}-{name}.gguf")
    if path.exists():
        return path
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, threads
    temporary = path.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(gguf).encode(), str(temporary).encode(), params) != 0:
        raise SystemExit(f"llama.cpp could not make {path}")
    temporary.rename(path)
    return path


def quantised_engines(args: argparse.Namespace, folder: Path, gguf: Path) -> list[Any]:
    """Weights of 8 and 4 bits, ours with the default cache and the smallest dense one."""
    import mustafar

    engines: list[Any] = []
    for weights, peers in QUANTISED.items():
        model = mustafar.Model(folder, threads=args.threads, weights=weights)
        size = f"{model.memory().weights_bytes / 1e6:.0f} MB"
        for preset in args.presets:
            kv = mustafar.KVConfig.preset(preset)
            engines.append(Mustafar(model, f"{weights} ({size}), {preset}", kv, weights))
        for name, number in peers.items():
            path = quantised_gguf(gguf, name, number, args.threads)
            label = f"{name} ({path.stat().st_size / 1e6:.0f} MB)"
            context = max(args.prefill) + 256
            engines.append(LlamaCpp(path, context, args.threads, True, label, weights))
    return engines


def make_engines(args: argparse.Namespace, folder: Path, gguf: Path) -> tuple[Any, list[Any]]:
    """The model and every engine over it."""
    import mustafar

    model = mustafar.Model(folder, threads=args.threads)
    if args.quantised:
        return model, quantised_engines(args, folder, gguf)
    published = {"k_sparsity": 0.625, "v_sparsity": 0.75, "value_dtype": "auto"}
    settings: dict[str, dict[str, Any]] = {"dense": {"value_dtype": "auto"}}
    if not args.dense_only:
        settings["bf16 K .625 V .75"] = published
        settings["int8 K .625 V .75"] = published | {"value_dtype": "int8"}
        settings["int4 K .5 V .5"] = {"sparsity": 0.5, "value_dtype": "int4"}
    engines: list[Any] = [
        Mustafar(model, name, mustafar.KVConfig(**values)) for name, values in settings.items()
    ]
    context = max(args.prefill) + 256
    engines += [LlamaCpp(gguf, context, args.threads, flash) for flash in (False, True)]
    return model, engines


def run(args: argparse.Namespace, vocab: int, folder: Path, gguf: Path) -> dict[str, Any]:
    """Every test, as JSON."""
    import llama_cpp

    import mustafar

    model, engines = make_engines(args, folder, gguf)
    rng = np.random.default_rng(SEED)
    ids = rng.integers(3, vocab, max(args.prefill) + 256).tolist()
    same = agreement(engines, ids[:64])
    print(f"logits against {engines[0].name}, NMSE: {same}", file=sys.stderr)
    if not args.quantised and max(same.values()) > 0.01:
        raise SystemExit("the engines do not run the same model")

    results = []
    shortest: Samples = {}
    for n in sorted(args.prefill):
        long = n > 2048
        print(f"prefill {n}", file=sys.stderr)
        if not long:  # a warm-up; for long prompts it would double the time
            take_turns(engines, 1, timed_prefill(ids[:n]))
        repetitions = args.long_repetitions if long else args.repetitions
        samples = take_turns(engines, repetitions, timed_prefill(ids[:n]))
        results.append(result(engines, f"prefill {n}", "tokens/s", samples, rate_of(n)))
        print(f"decode @ {n}", file=sys.stderr)
        samples = take_turns(engines, args.repetitions, timed_decode(ids[-args.decode :]))
        results.append(result(engines, f"decode @ {n}", "tokens/s", samples, rate_of(args.decode)))
        if not shortest:
            shortest = samples
            continue
        extra = {
            name: [statistics.median(times) - statistics.median(shortest[name])]
            for name, times in samples.items()
        }
        results.append(
            result(engines, f"attention @ {n}", "ms/token", extra, lambda s: 1000 * s / args.decode)
        )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": args.threads,
        "system": platform.platform(),
        "load_before": args.load,
        "mustafar": mustafar.__version__,
        "llama_cpp_python": llama_cpp.__version__,
        "device": repr(model).partition(" on ")[2].rstrip(">"),
        "shape": args.model.resolve().name if args.model else args.shape,
        "weights": ("" if args.model else "random ")
        + ("weights, rounded from bf16" if args.quantised else "bf16 weights"),
        "logits_nmse": same,
        "command": "python bench/peers.py " + " ".join(sys.argv[1:]),
        "results": results,
    }


def cpu_name() -> str:
    """As the system has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(": ", 1)[1]
    return platform.processor()


def markdown(report: dict[str, Any]) -> str:
    """The report as a table, one row per test and engine."""
    header = (
        f"{report['shape']}, {report['weights']}; {report['cpu']}, {report['threads']} threads; "
        f"{report['device']}; llama-cpp-python {report['llama_cpp_python']} (f16 cache); "
        f"{report['date']}."
    )
    lines = [
        header,
        "",
        f"`{report['command']}`",
        "",
        "| test | engine | median | unit | times the best llama.cpp |",
        "|---|---|---:|---|---:|",
    ]
    for test in report["results"]:
        for row in test["rows"]:
            times = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
            lines.append(
                f"| {test['test']} | {row['engine']} | {row['median']:.2f} | {test['unit']} "
                f"| {times} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the options, writes weights, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.2-1b:4", help="NAME or NAME:LAYERS")
    parser.add_argument("-m", "--model", type=Path, help="folder of a Llama in bf16, in its place")
    parser.add_argument("--quantised", action="store_true", help="weights of 8 and 4 bits")
    parser.add_argument(
        "--presets", nargs="+", default=["lossless", "balanced"], help="caches of --quantised"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 16384])
    parser.add_argument("--decode", type=int, default=32, help="tokens per sample")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--long-repetitions", type=int, default=1, help="of prompts beyond 2048")
    parser.add_argument("--dense-only", action="store_true", help="of ours, the dense cache alone")
    parser.add_argument(
        "--weights", type=Path, help="folder that keeps the weights; else temporary"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args()
    args.load = os.getloadavg()[0]

    shape = folder_shape(args.model) if args.model else parse_shape(args.shape)
    with tempfile.TemporaryDirectory() as temporary:
        root = args.weights or Path(temporary)
        folder, gguf = args.model or root / "hf", root / "model.gguf"
        if not gguf.exists():
            print(f"writing weights to {root}", file=sys.stderr)
            root.mkdir(parents=True, exist_ok=True)
            if not args.model:
                write_folder(shape, folder)
            write_gguf(shape, folder_tensors(folder) if args.model else tensors(shape), gguf)
        report = run(args, shape.vocab, folder, gguf)
    table = markdown(report)
    print(table)
    for path, text in ((args.json, json.dumps(report, indent=2) + "\n"), (args.markdown, table)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    main()
