"""Settings and token ids for the tests of sessions."""

from __future__ import annotations

import numpy as np

from mustafar import KVConfig

GREEDY = {"temperature": 0.0, "ignore_eos": True}
KVS = {
    "dense": KVConfig.preset("dense"),
    "half": KVConfig(sparsity=0.5, value_dtype="auto"),
    "row": KVConfig(sparsity=0.7, pattern="row", window=0, sink_tokens=4, value_dtype="auto"),
    "int8": KVConfig(sparsity=0.5, value_dtype="int8", window=7),
}


def ids_of(n: int, seed: int = 1, vocab: int = 2048) -> list[int]:
    """n random ids that are no special tokens; the same for the same seed."""
    return [int(x) for x in np.random.default_rng(seed).integers(3, vocab, n)]
