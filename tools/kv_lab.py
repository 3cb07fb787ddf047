#!/usr/bin/env python3
"""Measures KV-cache codecs on a real model, teacher-forced, under the runtime's own schedule.

    tools/kv_lab.py MODEL --calibration CALIBRATION.txt --scoring SCORING.txt [--chunks 4]

MODEL is a Hugging Face folder of a Llama. Query i reads tokens S .. S + 64 floor((i - S - W) / 64)
as the codec leaves them and all others exactly (S sinks, W window), so every scored token sees what
it would see in decoding. A chunk is 1,152 tokens of the second half of SCORING, the last 1,024 of
which are scored; results are kept per token under --cache, and rows that are there already are not
run again. The JSON file and the Markdown table beside it are written anew after every row; --table
takes all rows that the cache has and runs nothing. The cache knows rows by name alone: another
model, text or version of a codec wants another folder. Needs torch, safetensors and tokenizers.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kv_codecs import calibration, rows, tokens
from kv_codecs.codec import Codec
from kv_codecs.model import Attention, Llama, Schedule, coded_attention, dense_attention

CHUNK = 1152
FIRST_SCORED = 128
PLACES = (0, 4, 2, 6, 1, 5, 3, 7)  # eighths of the text, in the order in which they are used
ERROR_BLOCK = 64  # neighbouring tokens whose mean counts as one sample of the standard error
SIZES = (56.25, 37.5, 27.0, 20.5, 14.25)  # percent of dense bytes, with a little air

NOTES = """
## What the methods are, and what is left out

Every coder's docstring in tools/kv_codecs names its paper and section and says what was simplified.
None was checked against its authors' code. At 64 dims a head scales, zeros and factors cost twice
what they cost at the papers' 128 dims, and 1,024 tokens of one small model say little of reasoning
at length.

- Methods of channels (SparK, ThinK) and of rows need a bitmap or whole values, so they end at about
  a third of the bytes; low rank, streaming heads and eviction reach any size.
- KIVI and OSCAR keep long dense windows of their own: compare the columns for whole caches.
- Experiments: steps from static bits, each row at the same bytes. "One budget" spends bits where
  the Fisher information of calibration text says that they matter, over layers, heads, K and V;
  rows of different layers then differ in size. "Entropy coded" charges an ideal range coder with
  static tables (KVTC without DEFLATE) what the scored text costs; a block is decoded as a whole.
- Left out: KVzip and KVzap (they choose tokens by a second pass over the prompt, which a
  teacher-forced schedule does not have); LeanK (its mask is trained); KVQuant (its codebooks by
  sensitivity are close to the Fisher codebooks here, its 1 % of outliers to GEAR's); HieraSparse
  (its pattern is the row 2:4); xKV and other bases over several layers (they need the other layers'
  rows to decode one); training of any kind.
"""


def encode(model: Path, text: str) -> Tensor:
    """Token ids [T] of a text, without special tokens."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)


def calibration_chunks(ids: Tensor, count: int, length: int = 1024) -> list[Tensor]:
    """`count` pieces of ids, spread evenly."""
    step = max(1, (len(ids) - length) // max(1, count - 1))
    return [ids[i * step : i * step + length] for i in range(count)]


def _in_f32(attention: Attention) -> Attention:
    """Attention, and the codec in it, in float32 whatever the weights are multiplied in."""

    def precise(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        out = attention(layer, q, k, v)
        torch.set_float32_matmul_precision(precision)
        return out

    return precise


class Scorer:
    """Scores codecs on chunks of a text against the dense cache."""

    def __init__(self, model: Llama, ids: Tensor, cache: Path) -> None:
        self.model, self.cache = model, cache
        step = (len(ids) - CHUNK - 1) // (len(PLACES) - 1)
        if step < CHUNK:
            raise ValueError(
                f"the scoring text has {len(ids)} tokens: at least 8 chunks' are needed"
            )
        self.chunks = [ids[place * step : place * step + CHUNK + 1] for place in PLACES]
        self.dense = functools.cache(self._dense)

    def _dense(self, chunk: int) -> dict[str, Tensor]:
        """What the dense cache says of a chunk: probabilities and what scores need of them."""
        ids = self.chunks[chunk]
        logs = self.model.forward(ids[:-1], _in_f32(dense_attention), FIRST_SCORED)
        loss, top = -logs.gather(1, ids[FIRST_SCORED + 1 :, None])[:, 0], logs.argmax(-1)
        probabilities = logs.exp()
        entropy = -torch.einsum("tv,tv->t", probabilities, logs)
        return {"probabilities": probabilities, "entropy": entropy, "loss": loss, "top": top}

    def score(self, codec: Codec, chunk: int) -> dict[str, Tensor]:
        """By scored token: kld, loss and dense_loss in nats, same_top."""
        model, schedule = self.model, codec.schedule

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            coded_k, coded_v = codec.encode(layer, k, v, q, model.rope)
            visible = codec.visible(layer, k, v, q)
            return coded_attention(schedule, q, k, v, coded_k, coded_v, visible)

        ids, dense = self.chunks[chunk], self.dense(chunk)
        logs = model.forward(ids[:-1], _in_f32(attention), FIRST_SCORED)
        cross = torch.einsum("tv,tv->t", dense["probabilities"], logs)
        return {
            "kld": -cross - dense["entropy"],
            "loss": -logs.gather(1, ids[FIRST_SCORED + 1 :, None])[:, 0],
            "dense_loss": dense["loss"],
            "same_top": logs.argmax(-1) == dense["top"],
        }

    def paths(self, row: rows.Row) -> list[Path]:
        """Files of the row's scores, one a chunk, whether they exist or not."""
        slug = re.sub(r"[^a-z0-9.]+", "-", row.name.lower()).strip("-")
        return [self.cache / "rows" / slug / f"{chunk}.pt" for chunk in range(len(PLACES))]

    def row(self, row: rows.Row, chunks: int) -> dict[str, Any]:
        """The row's figures over `chunks` chunks, from the cache as far as they are there."""
        paths = self.paths(row)[:chunks]
        missing = [chunk for chunk, path in enumerate(paths) if not path.exists()]
        if missing:
            codec = row.build()
            paths[0].parent.mkdir(parents=True, exist_ok=True)
        for chunk in missing:
            codec.start()
            scored = self.score(codec, chunk)
            unfinished = paths[chunk].with_suffix(".part")
            torch.save({**scored, "codec": describe(codec, self.model.head_dim)}, unfinished)
            unfinished.replace(paths[chunk])
        parts = [torch.load(path) for path in paths]
        return {"name": row.name, "family": row.family, "chunks": chunks} | summary(parts)


def describe(codec: Codec, dim: int) -> dict[str, Any]:
    """Sizes and schedule of a codec, plain data."""
    return {
        "sinks": codec.schedule.sinks,
        "window": codec.schedule.window,
        "bytes_per_token": codec.bytes_per_token,
        "percent": 100 * codec.share(dim),
        "percent_at_1024": 100 * codec.share_at(1024, dim),
        "percent_at_16384": 100 * codec.share_at(16384, dim),
    }


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a row from its chunks' tokens."""
    joined = {
        name: torch.cat([p[name].double() for p in parts]) for name in parts[0] if name != "codec"
    }
    kld, change = joined["kld"], joined["loss"] - joined["dense_loss"]
    codec = {
        key: sum(part["codec"][key] for part in parts) / len(parts) for key in parts[0]["codec"]
    }
    ratio = math.exp(change.mean().item())
    return {
        **{key: round(value, 4) for key, value in codec.items()},
        "tokens": len(kld),
        "dense_ppl": round(math.exp(joined["dense_loss"].mean().item()), 4),
        "ppl_ratio": round(ratio, 5),
        "ppl_ratio_error": round(ratio * _error(change), 5),
        "kld": round(kld.mean().item(), 6),
        "kld_error": round(_error(kld), 6),
        "kld_first_chunk": round(parts[0]["kld"].double().mean().item(), 6),
        "kld_median": round(kld.median().item(), 6),
        "kld_999": round(kld.quantile(0.999).item(), 4),
        "same_top": round(joined["same_top"].mean().item(), 5),
    }


def _error(x: Tensor) -> float:
    """Standard error of the mean, from means of blocks of neighbouring tokens."""
    means = x.view(-1, ERROR_BLOCK).mean(-1)
    return (means.std() / len(means) ** 0.5).item()


def table(results: dict[str, Any]) -> str:
    """The Markdown page of a results file."""
    about, measured = results["about"], results["rows"]
    lines = [
        "# KV codecs compared",
        "",
        "Written by `tools/kv_lab.py`; the same figures in quality-lab.json.",
        "",
        f"{about['model']}, dense cache PPL {measured[0]['dense_ppl']:.2f}; calibrated on"
        f" {about['calibration']}, scored on {about['scoring']}; {about['arithmetic']}; kept values"
        " and scales rounded to bf16. Bytes are percent of 2-byte dense keys and values with masks,"
        " scales, indices, factors and outliers: of coded tokens, and of a whole cache at 1,024 and"
        " 16,384 tokens, where sinks and tail are dense. Calibrated bases, tables and codebooks"
        " belong to the model and are not counted. 4 sinks and a window of 32 unless a name says"
        " otherwise. The error is that of the mean KLD, from blocks of 64 tokens; rows see the same"
        " tokens, so differences between them are surer than their errors. Rows have one or more"
        " chunks of 1,024 scored tokens: compare those of different lengths by their first chunk.",
        "",
        "## The least KLD at each size",
        "",
        "Of rows with 4 sinks and a window of 32, on the first chunk alone, which all rows have"
        " scored. Experiments are not in the product.",
        "",
        "| coded bytes up to | best | bytes | KLD | best of the published | bytes | KLD |",
        "|---|---|---|---|---|---|---|",
    ]
    usual = [r for r in measured if (r["sinks"], r["window"]) == (4, 32) and r["kld"] > 0]
    for size in SIZES:
        fitting = [r for r in usual if r["percent"] <= size]
        ranked = sorted(fitting, key=lambda r: r["kld_first_chunk"])
        published = [r for r in ranked if r["family"].startswith("Published")]
        cells = [f"{size:g} %"]
        for found in (ranked, published):
            best = found[0] if found else None
            cells += (
                [best["name"], f"{best['percent']:.1f} %", f"{best['kld_first_chunk']:.4f}"]
                if best
                else ["none", "", ""]
            )
        lines.append("| " + " | ".join(cells) + " |")
    families = list(dict.fromkeys(r["family"] for r in measured))
    for family in families:
        lines += [
            "",
            f"## {family}",
            "",
            "| codec | coded bytes | at 1K | at 16K | PPL ratio | KLD | first chunk"
            " | median | 99.9 % | same top | tokens |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in (r for r in measured if r["family"] == family):
            lines.append(
                f"| {r['name']} | {r['percent']:.1f} % | {r['percent_at_1024']:.1f} % |"
                f" {r['percent_at_16384']:.1f} % | {r['ppl_ratio']:.4f} |"
                f" {r['kld']:.4f} +- {r['kld_error']:.4f} |"
                f" {r['kld_first_chunk']:.4f} | {r['kld_median']:.4f} |"
                f" {r['kld_999']:.2f} | {100 * r['same_top']:.1f} % | {r['tokens']} |"
            )
    missing = about["not_measured"]
    if missing:
        lines += ["", f"## Not measured yet ({len(missing)} rows)", "", "; ".join(missing) + "."]
    return "\n".join(lines) + "\n" + NOTES


def write(
    path: Path, about: dict[str, Any], every: list[rows.Row], measured: dict[str, dict[str, Any]]
) -> None:
    """The JSON file and the Markdown table beside it, in the order of the list of rows."""
    missing = [row.name for row in every if row.name not in measured]
    results = {
        "about": about | {"not_measured": missing},
        "rows": [measured[row.name] for row in every if row.name in measured],
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(results), encoding="utf-8")


def chosen(every: list[rows.Row], patterns: list[str]) -> list[rows.Row]:
    """Rows that match a pattern, those of the first pattern first."""
    found = [row for p in patterns for row in every if re.search(p, f"{row.family}: {row.name}")]
    return list({row.name: row for row in found}.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--scoring", type=Path, required=True)
    parser.add_argument("--label", help="the model's name in the results (default: its folder's)")
    parser.add_argument("--chunks", type=int, default=2, help=f"1 to {len(PLACES)}")
    parser.add_argument("--calibration-chunks", type=int, default=8)
    parser.add_argument(
        "--only",
        action="append",
        help="regular expression on 'family: name'; repeatable, measured in that order",
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/quality-lab.json"))
    parser.add_argument("--cache", type=Path, default=Path("build/kv_lab"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--exact",
        action="store_true",
        help="weights in float32 products; otherwise bfloat16 products, float32 sums, which costs"
        " a KLD of about 0.0001 that no codec is to blame for",
    )
    parser.add_argument("--table", action="store_true", help="write what the cache has")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)

    model = Llama(options.model)
    text = options.scoring.read_text(encoding="utf-8")
    scorer = Scorer(model, encode(options.model, text[len(text) // 2 :]), options.cache)
    calibration_texts = calibration_chunks(
        encode(options.model, options.calibration.read_text(encoding="utf-8")),
        options.calibration_chunks,
    )

    @functools.cache
    def statistics() -> calibration.Statistics:
        return calibration.cached_statistics(
            model, calibration_texts, options.cache / "statistics.pt"
        )

    @functools.cache
    def head_order() -> list[tuple[int, int]]:
        path = options.cache / "heads.json"
        if not path.exists():
            order = tokens.rank_heads(model, calibration_texts[0][:384], Schedule())
            path.write_text(json.dumps(order))
        return [(layer, head) for layer, head in json.loads(path.read_text())]

    torch.set_float32_matmul_precision("highest" if options.exact else "medium")
    amount = f"{len(calibration_texts)} x {len(calibration_texts[0])} tokens"
    about = {
        "model": options.label or options.model.name,
        "calibration": f"{options.calibration.stem}, {amount}",
        "arithmetic": "float32" if options.exact else "weights in bfloat16 products, else float32",
        "scoring": f"the second half of {options.scoring.stem}",
    }
    measured: dict[str, dict[str, Any]] = {}
    if options.output.exists():
        old = json.loads(options.output.read_text(encoding="utf-8"))
        measured = {row["name"]: row for row in old["rows"]}
    every = list(rows.all_rows(model, statistics, head_order))
    for row in chosen(every, options.only or [""]):
        done = measured.get(row.name)
        there = sum(path.exists() for path in scorer.paths(row))
        if done and done["chunks"] >= (there if options.table else options.chunks):
            continue
        if options.table and not there:
            continue
        start = time.monotonic()
        chunks = there if options.table else max(there, options.chunks)
        measured[row.name] = result = scorer.row(row, chunks)
        print(
            f"{row.name:48s} {result['percent']:5.1f} %  PPL x {result['ppl_ratio']:.4f}"
            f"  KLD {result['kld']:.5f} +- {result['kld_error']:.5f}"
            f"  ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
        write(options.output, about, every, measured)
    write(options.output, about, every, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
