"""Special tokens that a prompt spells: text by default, tokens with parse_special."""

from __future__ import annotations

import json
from typing import Any

import pytest

import mustafar
from mustafar import Session
from support.command import needs_command, run
from support.paths import DEMO

TEXT = "<|user|>Hello<|end_of_turn|><|assistant|>"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def model() -> mustafar.Model:
    return mustafar.Model(DEMO, threads=1)


def test_generate_stream_and_batch(model: mustafar.Model) -> None:
    encode = model.tokenizer.encode
    as_text, as_tokens = encode(TEXT), encode(TEXT, parse_special=True)
    assert len(as_tokens) < len(as_text)
    for special, ids in ((False, as_text), (True, as_tokens)):
        expected = Session(model).generate(ids, **GREEDY)
        session = Session(model)
        result = session.generate(TEXT, parse_special=special, **GREEDY)
        assert result.token_ids == expected.token_ids
        assert session.tokens[: len(ids)] == ids
        session = Session(model)
        stream = session.stream(TEXT, parse_special=special, **GREEDY)
        assert "".join(stream) == expected.text
        assert session.tokens[: len(ids)] == ids
        batch = model.generate([TEXT, ids], parse_special=special, **GREEDY)
        assert [r.stats.prompt_tokens for r in batch] == [len(ids)] * 2
        assert batch[0].token_ids == batch[1].token_ids
    session = Session(model)
    session.generate(TEXT, **GREEDY)  # text by default
    assert session.tokens[: len(as_text)] == as_text


@needs_command
def test_command(model: mustafar.Model) -> None:
    for flags, special in (([], False), (["--special"], True)):
        out = run("generate", "-m", DEMO, "-p", TEXT, "-n", 2, "--temp", 0, "--json", *flags)
        prompt_tokens = json.loads(out.stdout)["stats"]["prompt_tokens"]
        assert prompt_tokens == len(model.tokenizer.encode(TEXT, parse_special=special))
