"""What caches cost where text is read token by token, as a reply is made, by decode's kernels.

    python bench/decode_quality.py MODEL_FOLDER TEXT_FILE [--pieces N] [--kv NAME ...]

`mustafar eval` reads text in pieces, whose attention expands the cache and multiplies in floats.
Here every piece of 1,024 tokens is read one token at a time; the divergence (KLD, nats) is from the
dense cache read in one call. Names are presets, or codedN for coded rows of N bits.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

import mustafar
from weights_quality import log_softmax

PIECE = 1024  # tokens


def setting(name: str) -> mustafar.KVConfig:
    """A preset, or coded rows."""
    if name.startswith("coded"):
        return mustafar.KVConfig(value_dtype="coded", profile="auto", bits=float(name[5:]))
    return mustafar.KVConfig.preset(name)


def by_token(model: mustafar.Model, name: str, ids: list[int]) -> NDArray[np.float64]:
    """Log probabilities after each token but the last."""
    with mustafar.Session(model, kv=setting(name)) as session:
        rows = [np.array(session.prefill(ids[:1]))]
        rows += [np.array(session.decode(token)) for token in ids[1:-1]]
    return log_softmax(np.stack(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--pieces", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kv", nargs="+", default=["lossless", "balanced", "small", "mustafar"])
    options = parser.parse_args()
    model = mustafar.Model(options.model, threads=options.threads)
    with open(options.text, encoding="utf-8") as file:
        ids = model.tokenizer.encode(file.read())
    # Apart from each other, so that more of the text is seen.
    pieces = [ids[3 * PIECE * i :][:PIECE] for i in range(options.pieces)]
    if len(pieces[-1]) < PIECE:
        parser.error(f"{options.text} is too short for {options.pieces} pieces")
    expected = []
    for piece in pieces:
        with mustafar.Session(model, kv=mustafar.KVConfig.preset("dense")) as session:
            expected.append(log_softmax(session.score_logits(piece)))
    print("| setting | KLD | 99.9 % | NLL |\n|---|---:|---:|---:|")
    for name in options.kv:
        divergences, losses = [], []
        for piece, dense in zip(pieces, expected, strict=True):
            rows = by_token(model, name, piece)
            divergences.append((np.exp(dense) * (dense - rows)).sum(axis=1))
            losses.append(-rows[np.arange(len(rows)), piece[1:]])
        kld, nll = np.concatenate(divergences), np.concatenate(losses)
        error = kld.std() / len(kld) ** 0.5
        print(
            f"| {name} | {kld.mean():.5f} ± {error:.5f} | {np.quantile(kld, 0.999):.4f} "
            f"| {nll.mean():.5f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
