"""What quantised weights cost: perplexity, and divergence from the model as stored.

    python bench/weights_quality.py MODEL_FOLDER TEXT_FILE [--tokens N] [--piece N] [--threads N]
    ... --quantised NAME=FOLDER ...   also folders that `mustafar quantize` wrote of the same model
    ... --peers FOLDER                also what llama.cpp's quantise call makes of the same bf16
                                      weights (llama-cpp-python, gguf); FOLDER keeps the files

Prompts multiply with the rounded weights as they are, but for 4-bit weights on AVX-512 without AMX;
there, and in decode everywhere, activations are rounded, too. So every piece of the text is read
twice on a dense cache: in one call, and token by token, as a reply is made (--calls-only leaves
that out). llama.cpp rounds activations in both, and reads pieces in one call.
The mean divergence (KLD, nats) is from the model as stored, read in one call; bits are those of a
weight in all, embedding, scales and what is left in bf16 among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mustafar

WEIGHTS = ("auto", "int8", "int4", "int4:64", "int4:128")
# Numbers of llama.h's llama_ftype.
PEERS = {"Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15}

Rows = NDArray[np.float32]
Read = Callable[[list[int]], Rows]  # ids to logits [n - 1, vocab] after each token but the last


def log_softmax(logits: Rows) -> NDArray[np.float64]:
    """Of every row."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def in_one_call(model: mustafar.Model) -> Read:
    """A piece as a prompt."""

    def read(ids: list[int]) -> Rows:
        with mustafar.Session(model, kv=mustafar.KVConfig.preset("dense")) as session:
            return session.score_logits(ids)

    return read


def by_token(model: mustafar.Model) -> Read:
    """A piece as a reply."""

    def read(ids: list[int]) -> Rows:
        with mustafar.Session(model, kv=mustafar.KVConfig.preset("dense")) as session:
            rows = [np.array(session.prefill(ids[:1]))]
            return np.stack(rows + [np.array(session.decode(token)) for token in ids[1:-1]])

    return read


def peers(args: argparse.Namespace) -> Iterator[tuple[str, int, Read]]:
    """llama.cpp's files: names, bytes of weights, readers."""
    import llama_cpp

    from peers import quantised_gguf
    from random_llama import folder_shape, folder_tensors, write_gguf

    stored = args.peers / "model.gguf"
    if not stored.exists():
        args.peers.mkdir(parents=True, exist_ok=True)
        write_gguf(folder_shape(args.model), folder_tensors(args.model), stored)
    for name, number in {"BF16": None, **PEERS}.items():
        path = stored
        if number is not None:
            path = quantised_gguf(stored, name.lower(), number, args.threads)
        llama = llama_cpp.Llama(
            str(path),
            n_ctx=args.piece,
            n_batch=args.piece,
            n_threads=args.threads or None,
            n_threads_batch=args.threads or None,
            logits_all=True,
            verbose=False,
        )

        def read(ids: list[int], llama: Any = llama) -> Rows:
            llama.reset()
            llama.eval(ids)
            return np.array(llama.scores[: len(ids) - 1], np.float32)

        yield f"llama.cpp {name}", tensor_bytes(path), read
        llama.close()


def tensor_bytes(path: Path) -> int:
    """Of a GGUF's tensors."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def readers(args: argparse.Namespace) -> Iterator[tuple[str, int, Read]]:
    """What to measure, the model as stored first: names, bytes of weights, readers."""
    given = [(name, args.model, name) for name in WEIGHTS]
    given += [(name, Path(folder), "auto") for name, folder in args.quantised]
    for name, folder, weights in given:
        with mustafar.Model(
            folder, device="cpu", threads=args.threads, weights=weights, dtype=args.dtype
        ) as model:
            size = model.memory().weights_bytes
            yield name, size, in_one_call(model)
            if not args.calls_only:
                yield f"{name}, by token", size, by_token(model)
    if args.peers:
        yield from peers(args)


def main() -> None:
    """Reads the options, measures, prints Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--piece", type=int, default=512, help="tokens that see each other")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="f32: activations are not rounded")
    parser.add_argument(
        "--quantised", nargs="+", default=[], type=lambda text: tuple(text.split("=", 1))
    )
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--calls-only", action="store_true")
    args = parser.parse_args()
    ids = mustafar.Tokenizer(args.model).encode(args.text.read_text())[: args.tokens]
    pieces = [ids[at : at + args.piece] for at in range(0, len(ids) - 1, args.piece)]
    stored: list[Rows] = []  # log-probabilities
    n_weights = 0
    first = 0.0
    print("| weights | MB | bits | PPL | | KLD |\n|---|---:|---:|---:|---:|---:|")
    for name, size, read in readers(args):
        n_weights = n_weights or size // 2
        loss, divergence, n = 0.0, 0.0, 0
        for i, piece in enumerate(pieces):
            rows = log_softmax(read(piece))
            if name == "auto":
                stored.append(rows.astype(np.float32))
            reference = stored[i].astype(np.float64)
            n += len(rows)
            loss -= float(rows[np.arange(len(rows)), piece[1:]].sum())
            divergence += float((np.exp(reference) * (reference - rows)).sum())
        ppl = float(np.exp(loss / n))
        first = first or ppl
        print(
            f"| {name} | {size / 1e6:.1f} | {8 * size / n_weights:.2f} | {ppl:.3f} "
            f"| {100 * (ppl / first - 1):+.2f} % | {divergence / n:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
