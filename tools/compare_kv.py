"""Compares what a smaller KV cache costs: this runtime, llama.cpp's cache types, kvpress's presses.

    python tools/compare_kv.py mustafar  --model FOLDER --text FILE [--profile FILE]
    python tools/compare_kv.py llama.cpp --model FOLDER --text FILE --gguf FILE
    python tools/compare_kv.py kvpress   --model FOLDER --text FILE

One model, one text, one tokenizer; every method is measured against its own engine's dense cache.
Chunks are those of `mustafar perplexity -c 1024` on the last part of the text. Two protocols:

    whole           Every token of a chunk is scored over a cache in its compressed form: ours as
                    decode sees it, llama.cpp's with all rows quantised.
    prefill 768     768 tokens in one exact call, which compresses; then the rest of the chunk,
                    teacher-forced. Presses drop tokens or channels once, after the prompt, and keep
                    all later tokens; ours goes on compressing what leaves the window.

Rows in --out are replaced by method, setting and protocol. They carry sums after every chunk: an
ended run goes on where it stopped. of_dense_bytes is that of compressed tokens, against 2 bytes a
value; cache_of_dense is the whole cache's, windows and later tokens included, averaged over the
scored tokens.

Needs the packages that it compares with: llama-cpp-python (with the GGUF file that the folder was
made of), or kvpress and a transformers that it takes.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import mustafar
from mustafar import KVConfig, Session

CHUNK, PREFILL = 1024, 768  # tokens
WHOLE, PREFILLED = "whole", f"prefill {PREFILL}"

Logits = NDArray[np.float32]  # [scored tokens, vocab]


class Setting(NamedTuple):
    """A cache that is measured; the first of an engine's is its dense one."""

    name: str
    of_dense: float  # bytes of a compressed token
    cache_of_dense: float  # of the whole cache, over the scored tokens


# Engines: settings, and logits of every wanted setting for a chunk of token ids.


def scored_lengths(protocol: str) -> range:
    """Tokens in the cache when each scored token is predicted."""
    return range(1 if protocol == WHOLE else PREFILL + 1, CHUNK)


class Mustafar:
    """This runtime."""

    method = f"mustafar {mustafar.__version__}"

    def __init__(self, args: argparse.Namespace, protocol: str) -> None:
        self._model = mustafar.Model(args.model, threads=args.threads)
        self._protocol = protocol
        pruned = {"k_sparsity": 0.625, "v_sparsity": 0.75, "value_dtype": "auto"}
        self._configs = {
            "dense": KVConfig.preset("dense"),
            "int8": KVConfig(value_dtype="int8"),
            "int4": KVConfig(value_dtype="int4"),
            "int4 hadamard": KVConfig(value_dtype="int4", profile="hadamard"),
            "sparse .5": KVConfig(sparsity=0.5, value_dtype="auto"),
            "sparse K .625 V .75": KVConfig(**pruned),
        }
        if args.profile:
            for dtype in ("auto", "int8", "int4"):
                name = "sparse .5" + (f" {dtype}" if dtype != "auto" else "") + " calibrated"
                self._configs[name] = KVConfig(value_dtype=dtype, profile=args.profile)
            self._configs["int4 calibrated"] = KVConfig(
                sparsity=0, value_dtype="int4", profile=args.profile
            )
        self.settings = [self._measure(name) for name in self._configs]

    def _measure(self, name: str) -> Setting:
        config = self._configs[name]
        session = Session(self._model, config)
        tokens = 256  # enough for blocks to leave the window
        session.prefill(np.arange(tokens))
        memory = session.memory()
        store = memory.masks + memory.values + memory.scales + memory.padding
        dense = memory.dense_equivalent / tokens * memory.compressed_tokens
        of_dense = store / dense if dense else 1.0
        free = config.sink_tokens + config.window  # dense tokens; blocks are of 64
        whole = [
            1 - (1 - of_dense) * max(0, (n - free) // 64) * 64 / n
            for n in scored_lengths(self._protocol)
        ]
        return Setting(name, of_dense, float(np.mean(whole)))

    def logits(self, chunk: list[int], wanted: list[str]) -> Iterator[tuple[str, Logits]]:
        """Pairs of setting and logits."""
        sessions = {name: Session(self._model, self._configs[name]) for name in wanted}
        if self._protocol == WHOLE:
            for name, session in sessions.items():
                yield name, session.score_logits(chunk)
            return
        for session in sessions.values():
            session.prefill(chunk[:PREFILL])
        steps = [
            Session.decode_batch(list(sessions.values()), [token] * len(sessions))
            for token in chunk[PREFILL:-1]
        ]
        for index, name in enumerate(sessions):
            yield name, np.stack([step[index] for step in steps])


class LlamaCpp:
    """llama.cpp: the cache's types for keys and values, with flash attention.

    Its weights are widened to float32 first: products with quantised ones round activations to 8
    bits, which alone makes a divergence of 0.004, many times that of a cache in q8_0.
    """

    # Bytes of 32 values.
    TYPES = {"f16": (1, 64), "q8_0": (8, 34), "q5_0": (6, 22), "q4_0": (2, 18)}

    def __init__(self, args: argparse.Namespace, protocol: str) -> None:
        import llama_cpp

        self.method = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        self._make, self._args = llama_cpp.Llama, args
        self._weights = tempfile.TemporaryDirectory()
        self._path = Path(self._weights.name) / "f32.gguf"
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
        parameters.allow_requantize = True
        if llama_cpp.llama_model_quantize(
            os.fsencode(args.gguf), os.fsencode(self._path), ctypes.byref(parameters)
        ):
            raise SystemExit(f"llama.cpp cannot read {args.gguf}")
        self._engines: dict[str, Any] = {}
        pairs = [(name, name) for name in self.TYPES] + [("q8_0", "q4_0")]
        self._types = {k if k == v else f"K {k} V {v}": (k, v) for k, v in pairs}
        shares = {
            name: (self.TYPES[k][1] + self.TYPES[v][1]) / 128
            for name, (k, v) in self._types.items()
        }
        self.settings = [Setting(name, share, share) for name, share in shares.items()]

    def _engine(self, name: str) -> Any:
        if name not in self._engines:
            k, v = self._types[name]
            self._engines[name] = self._make(
                str(self._path),
                n_ctx=CHUNK,
                n_batch=256,
                n_threads=self._args.threads,
                n_threads_batch=self._args.threads,
                type_k=self.TYPES[k][0],
                type_v=self.TYPES[v][0],
                flash_attn=True,
                logits_all=True,
                verbose=False,
            )
        return self._engines[name]

    def logits(self, chunk: list[int], wanted: list[str]) -> Iterator[tuple[str, Logits]]:
        """Pairs of setting and logits, which the next call overwrites."""
        for name in wanted:
            engine = self._engine(name)
            engine.reset()
            engine.eval(chunk[:-1])
            yield name, engine.scores[: len(chunk) - 1]


class KVPress:
    """kvpress over transformers in float32: tokens or key channels dropped once, after a prompt."""

    def __init__(self, args: argparse.Namespace, protocol: str) -> None:
        from importlib.metadata import version

        import kvpress
        import torch
        import transformers

        self.method = f"kvpress {version('kvpress')} (transformers {transformers.__version__})"
        torch.set_num_threads(args.threads)
        self._torch, self._cache = torch, transformers.DynamicCache
        # ObservedAttention looks at attention weights, which eager attention alone has.
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._presses: dict[str, Any] = {"dense": None}
        shares = {"dense": 1.0}
        for ratio in (0.5, 0.75):
            for name in ("SnapKV", "ObservedAttention", "StreamingLLM", "ExpectedAttention"):
                setting = f"{name} {ratio}"
                self._presses[setting] = getattr(kvpress, name + "Press")(compression_ratio=ratio)
                shares[setting] = 1 - ratio
            setting = f"ThinK {ratio} of key channels"
            self._presses[setting] = kvpress.ThinKPress(key_channel_compression_ratio=ratio)
            shares[setting] = 1 - ratio / 2
        lengths = scored_lengths(protocol)
        self.settings = [
            Setting(name, share, float(np.mean([1 - (1 - share) * PREFILL / n for n in lengths])))
            for name, share in shares.items()
        ]

    def logits(self, chunk: list[int], wanted: list[str]) -> Iterator[tuple[str, Logits]]:
        """Pairs of setting and logits."""
        ids = self._torch.tensor([chunk[:-1]])
        positions = self._torch.arange(PREFILL, CHUNK - 1)[None]
        for name in wanted:
            cache, press = self._cache(), self._presses[name]
            with self._torch.no_grad():
                if press is None:
                    self._model.model(ids[:, :PREFILL], past_key_values=cache)
                else:
                    with press(self._model):
                        self._model.model(ids[:, :PREFILL], past_key_values=cache)
                out = self._model(ids[:, PREFILL:], past_key_values=cache, position_ids=positions)
            yield name, out.logits[0].numpy()


ENGINES: dict[str, tuple[Any, list[str]]] = {
    "mustafar": (Mustafar, [WHOLE, PREFILLED]),
    "llama.cpp": (LlamaCpp, [WHOLE]),
    "kvpress": (KVPress, [PREFILLED]),
}


# Figures


def log_softmax(logits: Logits) -> Logits:
    """Natural, row by row."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype("f4")


def sums_of(logits: Logits, dense: Logits, targets: list[int]) -> NDArray[np.float64]:
    """[5]: count, sums of NLL and its square, of KL divergence and its square, nats.

    Args:
        logits: Of the setting, [n, vocab].
        dense: Log-probabilities of the dense cache, [n, vocab].
        targets: The text's own next tokens, [n].
    """
    own = log_softmax(logits)
    nll = -own[np.arange(len(own)), targets].astype(np.float64)
    divergence = (np.exp(dense) * (dense - own)).sum(-1, dtype=np.float64)
    return np.array([len(nll), nll.sum(), (nll**2).sum(), divergence.sum(), (divergence**2).sum()])


def figures(sums: Iterable[float]) -> dict[str, float | int]:
    """Perplexity, mean divergence and their standard errors, from :func:`sums_of`."""
    count, nll, nll_squares, divergence, divergence_squares = sums

    def error(total: float, squares: float) -> float:
        return math.sqrt(max(0.0, squares / count - (total / count) ** 2) / (count - 1))

    perplexity = math.exp(nll / count)
    return {
        "tokens": int(count),
        "ppl": perplexity,
        "ppl_error": perplexity * error(nll, nll_squares),
        "kld_mean": divergence / count,
        "kld_mean_error": error(divergence, divergence_squares),
    }


class Table:
    """The rows of a JSON file, by method, setting and protocol."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[tuple[str, ...], dict[str, Any]] = {}
        if path.exists():
            for row in json.loads(path.read_text()):
                self._rows[self._key(row)] = row

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["method"].split()[0], row["setting"], row["protocol"]

    def sums(self, row: dict[str, Any]) -> tuple[int, NDArray[np.float64]]:
        """Chunks done and their sums, of a row measured by the same command."""
        old = self._rows.get(self._key(row), {})
        if any(old.get(key) != row[key] for key in ("method", "command", "of_dense_bytes")):
            return 0, np.zeros(5)
        return old["chunks"], np.array(old["sums"])

    def put(self, row: dict[str, Any]) -> None:
        """Adds or replaces a row and writes the file."""
        self._rows[self._key(row)] = row
        rows = [self._rows[key] for key in sorted(self._rows)]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_name(self._path.name + ".part")
        aside.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(aside, self._path)


# The text


def chunks_of(args: argparse.Namespace) -> list[list[int]]:
    """As `mustafar perplexity` cuts a text: special prefix and text, CHUNK tokens in all."""
    text = args.text.read_bytes()
    start = text.find(b"\n", int(args.start * len(text))) + 1  # the next line's start
    tokenizer = mustafar.Tokenizer(args.model)
    prefix = tokenizer.special_prefix
    ids = tokenizer.encode(text[start:].decode(), add_special=False)
    step = CHUNK - len(prefix)
    starts = range(0, len(ids) - step + 1, step)[: args.chunks]
    return [prefix + ids[at : at + step] for at in starts]


def measure(args: argparse.Namespace, protocol: str, chunks: list[list[int]]) -> None:
    """Every setting of an engine under one protocol."""
    engine = ENGINES[args.engine][0](args, protocol)
    command = f"python tools/compare_kv.py {args.engine} --model {args.model.name}"
    command += f" --text {args.text.name} --start {args.start} --threads {args.threads}"
    if args.engine == "llama.cpp":
        command += f" --gguf {args.gguf.name}"
    table = Table(args.out)
    rows: dict[str, dict[str, Any]] = {}
    done: dict[str, tuple[int, NDArray[np.float64]]] = {}
    for setting in engine.settings:
        profile = f" --profile {args.profile.name}" if "calibrated" in setting.name else ""
        rows[setting.name] = {
            "method": engine.method,
            "setting": setting.name,
            "of_dense_bytes": round(setting.of_dense, 4),
            "cache_of_dense": round(setting.cache_of_dense, 4),
            "protocol": protocol,
            "command": command + profile,
        }
        done[setting.name] = table.sums(rows[setting.name])
    dense_name = engine.settings[0].name
    for index, chunk in enumerate(chunks):
        missing = [name for name, (count, _) in done.items() if count <= index]
        if not missing:
            continue
        wanted = missing if dense_name in missing else [dense_name, *missing]
        targets = chunk[scored_lengths(protocol)[0] :]
        dense: Logits | None = None
        for name, logits in engine.logits(chunk, wanted):
            if dense is None:
                dense = log_softmax(logits)
            if name not in missing:
                continue
            sums = done[name][1] + sums_of(logits, dense, targets)
            done[name] = (index + 1, sums)
            today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            row = rows[name] | figures(sums) | {"date": today, "chunks": index + 1}
            table.put(row | {"sums": sums.tolist()})
        print(f"{engine.method}, {protocol}: chunk {index + 1} of {len(chunks)}", flush=True)
    for name, row in rows.items():
        f = figures(done[name][1])
        print(
            f"{name:32} {100 * row['of_dense_bytes']:6.1f} % PPL {f['ppl']:.4f} ± "
            f"{f['ppl_error']:.4f}  KLD {f['kld_mean']:.5f} ± {f['kld_mean_error']:.5f}"
        )


def main() -> None:
    """Measures one engine under each of its protocols."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--start", type=float, default=0.8, help="of the text's bytes that are skipped"
    )
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--gguf", type=Path, help="for llama.cpp: what the folder was made of")
    parser.add_argument("--profile", type=Path, help="for mustafar: a calibrated KV profile")
    parser.add_argument("--protocol", choices=[WHOLE, PREFILLED], help="that alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/quality-neighbours.json"))
    args = parser.parse_args()
    if args.engine == "llama.cpp" and not args.gguf:
        parser.error("llama.cpp needs --gguf")
    chunks = chunks_of(args)
    for protocol in ENGINES[args.engine][1]:
        if args.protocol in (None, protocol):
            measure(args, protocol, chunks)


if __name__ == "__main__":
    main()
