"""What quantised weights cost where a text is read token by token, as a reply is made.

    python bench/weights_quality.py MODEL_FOLDER TEXT_FILE [--tokens N] [--piece N] [--threads N]

Prompts multiply with the rounded weights as they are (``mustafar eval --tasks ppl -w int8``
measures that); decode rounds activations, too. Every piece of the text is decoded by itself on a
dense cache, as stored and with each of WEIGHTS: perplexity, and the mean divergence (KLD, nats)
from the model as stored, as a Markdown table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import mustafar

WEIGHTS = (("auto", "auto"), ("int8", "auto"), ("int8", "f32"), ("int4", "auto"), ("int4", "f32"))


def decoded(model: mustafar.Model, ids: list[int]) -> NDArray[np.float32]:
    """Log-probabilities [n - 1, vocab] after each token but the last."""
    with mustafar.Session(model, kv=mustafar.KVConfig.preset("dense")) as session:
        rows = [np.array(session.prefill(ids[:1]))]
        rows += [np.array(session.decode(token)) for token in ids[1:-1]]
    logits = np.stack(rows).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--piece", type=int, default=512, help="tokens decoded one after another")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    ids = mustafar.Tokenizer(args.model).encode(args.text.read_text())[: args.tokens]
    pieces = [ids[at : at + args.piece] for at in range(0, len(ids) - 1, args.piece)]
    stored: list[NDArray[np.float32]] = []
    print("| weights | dtype | PPL | KLD |\n|---|---|---:|---:|")
    for weights, dtype in WEIGHTS:
        loss, divergence, n = 0.0, 0.0, 0
        with mustafar.Model(
            args.model, device="cpu", threads=args.threads, weights=weights, dtype=dtype
        ) as model:
            for i, piece in enumerate(pieces):
                rows = decoded(model, piece)
                if weights == "auto":
                    stored.append(rows)
                n += len(rows)
                loss -= float(rows[np.arange(len(rows)), piece[1:]].sum())
                divergence += float((np.exp(stored[i]) * (stored[i] - rows)).sum())
        ppl = np.exp(loss / n)
        print(f"| {weights} | {dtype} | {ppl:.3f} | {divergence / n:.4f} |", flush=True)


if __name__ == "__main__":
    main()
