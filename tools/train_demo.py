"""Train mustafar's demo model from the Python standard library of this machine, end to end.

The text is the interpreter's own library: its sources, and questions about its functions whose
answers are the summary lines of their docstrings, read with `ast`, never imported.  The result
is a Hugging Face folder: Llama architecture, bf16, under 12 MB, with its own byte-level BPE.

    python tools/train_demo.py [prepare] [train] [export] [evaluate]    # default: all four
    python tools/train_demo.py --evaluate DIR     # measure a model folder, print JSON
    python tools/train_demo.py --smoke            # everything in miniature, under a minute

Needs torch >= 2.9, numpy, tokenizers and safetensors.  Muon (Jordan et al., 2024) trains the
matrices, AdamW the rest, at a constant rate that falls to zero over the last `fall` of the token
budget.  A stopped run resumes from its checkpoint, before the fall even with another budget.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from demo_training.data import prepare
from demo_training.evaluate import evaluate
from demo_training.settings import SMOKE, Settings
from demo_training.train import export, train


def main() -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(description="Train and measure mustafar's demo model")
    parser.add_argument("stages", nargs="*", metavar="prepare|train|export|evaluate")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="only measure this folder")
    parser.add_argument("--work", type=Path, default=Path("build/demo-train"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="model folder")
    parser.add_argument("--tokens", type=int, help="training budget")
    parser.add_argument("--head-dim", type=int, help="width of a head, in place of 64")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, in under a minute")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    s = SMOKE if args.smoke else Settings()
    s = replace(s, tokens=args.tokens or s.tokens, head_dim=args.head_dim or s.head_dim)
    stages = {
        "prepare": lambda: prepare(s, args.work),
        "train": lambda: train(s, args.work, not (args.no_compile or args.smoke)),
        "export": lambda: export(s, args.work, args.out),
        "evaluate": lambda: print(json.dumps(evaluate(s, args.evaluate or args.out), indent=1)),
    }
    chosen = ["evaluate"] if args.evaluate else args.stages or list(stages)
    if unknown := set(chosen) - set(stages):
        parser.error(f"unknown stages {sorted(unknown)}, expected {list(stages)}")
    for stage in chosen:
        stages[stage]()


if __name__ == "__main__":
    main()
