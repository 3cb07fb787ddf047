"""Time to the first token of requests that share a pinned prefix: the first, and those after it.

    python bench/prefix_reuse.py MODEL TEXT [--tokens 4096] [--requests 32] [--kv lossless ...]

Requests run one after another; each asks something else of 32 tokens behind the same prefix.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import mustafar

_QUESTION_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder")
    parser.add_argument("text", type=Path, help="prose that prefix and questions are cut from")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prefix")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kv", nargs="+", default=["lossless", "balanced"], help="presets")
    options = parser.parse_args()
    needed = options.tokens + options.requests * _QUESTION_TOKENS
    with mustafar.Model(options.model, threads=options.threads) as model:
        ids = model.tokenizer.encode(options.text.read_text()[: 16 * needed])
        if len(ids) < needed:
            parser.error(f"the text has {len(ids)} tokens, and {needed} are needed")
        prefix = ids[: options.tokens]
        for preset in options.kv:
            with mustafar.Engine(model, mustafar.KVConfig.preset(preset)) as engine:
                engine.pin(prefix)
                seconds = []
                for start in range(options.tokens, needed, _QUESTION_TOKENS):
                    began = time.perf_counter()
                    question = ids[start : start + _QUESTION_TOKENS]
                    engine.submit(prefix + question, max_new_tokens=1, temperature=0).result()
                    seconds.append(time.perf_counter() - began)
                stats = engine.stats()
            first, *others = seconds
            later = statistics.median(others)
            print(
                f"{preset}: first {first:.3f} s, second {others[0]:.4f} s "
                f"({others[0] / first:.2%}), median of those after the first {later:.4f} s "
                f"({later / first:.2%}); {stats.prompt_tokens} tokens computed, "
                f"{stats.reused_tokens} kept, in {stats.prefix_bytes / 2**20:.1f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
