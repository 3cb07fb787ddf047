"""How often replies after a JSON schema are valid JSON after it, and what the masks cost.

    python bench/structured_output.py MODEL_FOLDER [--seeds N] [--speed] [-o FILE.json]

Every schema of structured_output_schemas.json is asked for with each seed at temperature 1, through
``response_format``; what comes is read with ``json`` and checked with ``jsonschema``, replies that
were closed before ``max_tokens`` as well.
--speed: the time of a token with masks and without, in turns, for every third schema.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np

import mustafar
from mustafar.grammar import constraint_factory

SCHEMAS = Path(__file__).with_name("structured_output_schemas.json")


def ask(model: mustafar.Model, case: dict[str, Any], seed: int, limit: int) -> dict[str, Any]:
    """One reply: its text, why it ended, and what is wrong with it."""
    answer = model.chat_completion(
        [{"role": "user", "content": case["prompt"]}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "reply", "schema": case["schema"], "strict": True},
        },
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=seed,
        max_tokens=limit,
    )
    choice = answer["choices"][0]
    text, reason = choice["message"]["content"], choice["finish_reason"]
    error = ""
    try:
        jsonschema.validate(
            json.loads(text),
            case["schema"],
            format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
        )
    except (ValueError, jsonschema.ValidationError) as wrong:
        error = str(wrong).splitlines()[0]
    return {"reason": reason, "text": text, "error": error}


def mask_seconds(model: mustafar.Model, schema: dict[str, Any], token_ids: list[int]) -> float:
    """Seconds of this thread per token that masks take, over a reply's tokens."""
    make = constraint_factory(model._core, "json_schema", json.dumps(schema))
    mask = np.empty(model.config["vocab_size"] // 32 + 1, np.uint32)
    constraint = make()
    start = time.thread_time()
    for token in token_ids:
        constraint.allow(mask.ctypes.data, mask.nbytes, len(token_ids) + 1024)
        if not constraint.accept(token):
            break
    return (time.thread_time() - start) / len(token_ids)


def speed(model: mustafar.Model, case: dict[str, Any], rounds: int, limit: int) -> dict[str, Any]:
    """Decode seconds per token with masks and without, of as many tokens after one prompt."""
    ids = model.tokenizer.apply_chat_template([{"role": "user", "content": case["prompt"]}])
    kept: dict[str, list[float]] = {"masked": [], "free": []}
    tokens: list[int] = []
    for _ in range(rounds):
        for name, times in kept.items():
            masks = {"json_schema": case["schema"]} if name == "masked" else {"ignore_eos": True}
            count = limit if name == "masked" else len(tokens)
            with mustafar.Session(model) as session:
                result = session.generate(ids, max_new_tokens=count, seed=1, **masks)
            times.append(result.stats.decode_seconds / len(result.token_ids))
            if name == "masked":
                tokens = result.token_ids
    ratios = [m / f for m, f in zip(kept["masked"], kept["free"], strict=True)]
    return {
        "name": case["name"],
        "tokens": len(tokens),
        "free_ms": 1e3 * min(kept["free"]),
        "mask_us": 1e6 * mask_seconds(model, case["schema"], tokens),
        "ratio": min(kept["masked"]) / min(kept["free"]),
        "median_ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("--seeds", type=int, default=1, help="replies to each schema")
    parser.add_argument("--limit", type=int, default=512, help="tokens of a reply")
    parser.add_argument("--speed", action="store_true", help="measure the masks' cost too")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed's measurement")
    parser.add_argument("-o", "--output", type=Path, help="write everything as JSON")
    args = parser.parse_args()

    cases = json.loads(SCHEMAS.read_text())
    model = mustafar.Model(args.model)
    report: dict[str, Any] = {
        "model": model.folder.name,
        "llguidance": llguidance.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "limit": args.limit,
        "cases": [],
    }
    for case in cases:
        replies = [ask(model, case, seed, args.limit) for seed in range(args.seeds)]
        report["cases"].append({"name": case["name"], "replies": replies})
        closed = sum(reply["reason"] == "length" for reply in replies)
        wrong = [reply for reply in replies if reply["error"]]
        print(f"{case['name']:30} {len(replies)} replies, {closed} closed, {len(wrong)} wrong")
        for reply in wrong:
            print(f"    {reply['error']}: {reply['text']!r}")
    replies = [reply for case in report["cases"] for reply in case["replies"]]
    closed = sum(reply["reason"] == "length" for reply in replies)
    wrong = [reply for reply in replies if reply["error"]]
    print(
        f"{len(cases)} schemas, {len(replies)} replies: {len(replies) - len(wrong)} valid, "
        f"{closed} of all closed before the limit"
    )
    if args.speed:
        report["speed"] = [speed(model, case, args.rounds, 64) for case in cases[::3]]
        for entry in report["speed"]:
            print(
                f"{entry['name']:30} {entry['tokens']:3} tokens, free {entry['free_ms']:.2f} ms, "
                f"mask {entry['mask_us']:.0f} us of its own, masked / free {entry['ratio']:.3f}"
            )
        ratio = statistics.median(entry["ratio"] for entry in report["speed"])
        mask = statistics.median(entry["mask_us"] for entry in report["speed"])
        print(f"medians: a mask takes {mask:.0f} us, a masked token {ratio:.3f} times a free one")
    if args.output:
        args.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
