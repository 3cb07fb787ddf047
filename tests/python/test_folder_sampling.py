"""Sampling that a model's folder asks for in generation_config.json, and what callers say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mustafar
from mustafar import Chat, SamplingParams, Session
from support.command import needs_command, run
from support.paths import DEMO

OWN = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "penalty_window": 64,
}
PROMPT = "def add(a, b):"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(**generation: Any) -> Path:
        path = tmp_path / "model"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(DEMO, path)
        (path / "generation_config.json").write_text(json.dumps(generation))
        return path

    return make


def decided(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in OWN}


def test_what_the_folder_says_is_the_default(folder: Callable[..., Path]) -> None:
    with mustafar.Model(DEMO, threads=1) as plain:
        assert decided(plain.default_sampling) == OWN
    given = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    with mustafar.Model(folder(**given), threads=1) as model:
        assert decided(model.default_sampling) == {**OWN, "temperature": 0.6, "top_p": 0.9}
        same = {**OWN, "temperature": 0.6, "top_p": 0.9, "seed": 3, "max_new_tokens": 24}
        expected = Session(model).generate(PROMPT, **same).token_ids
        assert Session(model).generate(PROMPT, seed=3, max_new_tokens=24).token_ids == expected
        assert (
            Session(model).generate(PROMPT, temperature=None, seed=3, max_new_tokens=24).token_ids
            == expected
        )
        stream = Session(model).stream(PROMPT, seed=3, max_new_tokens=24)
        "".join(stream)
        assert stream.result.token_ids == expected
        [batch] = model.generate([PROMPT], seed=3, max_new_tokens=24)
        assert batch.token_ids == expected
        # What a caller says counts, field by field.
        hot = {**same, "temperature": 1.5}
        other = Session(model).generate(PROMPT, temperature=1.5, seed=3, max_new_tokens=24)
        assert other.token_ids == Session(model).generate(PROMPT, **hot).token_ids
        usual = Session(model).generate(PROMPT, **{**same, "temperature": 0.8, "top_p": 0.95})
        params = SamplingParams(temperature=0.8, top_p=0.95)
        result = Session(model).generate(PROMPT, params, seed=3, max_new_tokens=24)
        assert result.token_ids == usual.token_ids
    with mustafar.Model(folder(top_k=-1, min_p=0, presence_penalty=-1), threads=1) as model:
        assert decided(model.default_sampling) == {
            **OWN,
            "top_k": 0,
            "min_p": 0,
            "presence_penalty": -1,
        }


def test_no_sampling_is_greedy(folder: Callable[..., Path]) -> None:
    with mustafar.Model(folder(do_sample=False, temperature=0.7), threads=1) as model:
        assert model.default_sampling.temperature == 0
        greedy = Session(model).generate(PROMPT, temperature=0, max_new_tokens=12)
        assert Session(model).generate(PROMPT, max_new_tokens=12).token_ids == greedy.token_ids
        chat, same = Chat(model), Chat(model)
        said = chat.send("Hello", max_new_tokens=12).token_ids
        assert said == same.send("Hello", temperature=0, max_new_tokens=12).token_ids
        answer = model.chat_completion([{"role": "user", "content": "Hello"}], max_tokens=12)
        assert isinstance(answer, dict)
        assert answer["choices"][0]["message"]["content"] == same.messages[-1]["content"]
        hot = [
            Session(model).generate(PROMPT, temperature=2, top_k=0, min_p=0, top_p=1, seed=i)
            for i in range(3)
        ]
        assert len({tuple(result.token_ids) for result in hot}) > 1


def test_the_folders_penalty_looks_at_everything(folder: Callable[..., Path]) -> None:
    """As in transformers, whose penalties the numbers in these files were chosen for."""
    with mustafar.Model(folder(do_sample=False, repetition_penalty=1.3), threads=1) as model:
        assert model.default_sampling.penalty_window == -1
        ids = model.tokenizer.encode(PROMPT) + model.tokenizer.encode("x = 1\n" * 60, False)
        mine = Session(model).generate(ids, max_new_tokens=16)
        given = {"temperature": 0, "repetition_penalty": 1.3, "max_new_tokens": 16}
        every = Session(model).generate(ids, penalty_window=-1, **given)
        assert mine.token_ids == every.token_ids
        off = Session(model).generate(ids, repetition_penalty=1, temperature=0, max_new_tokens=16)
        assert off.token_ids != mine.token_ids


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", "hot", "a number that is 0 or more"),
        ("temperature", -1, "a number that is 0 or more"),
        ("temperature", float("nan"), "a number that is 0 or more"),
        ("top_k", 2.5, "an integer"),
        ("top_p", 1.5, "a number from 0 to 1"),
        ("min_p", True, "a number from 0 to 1"),
        ("repetition_penalty", 0, "a number above 0"),
        ("frequency_penalty", [], "a number"),
        ("do_sample", "no", "true or false"),
    ],
)
def test_values_of_the_wrong_kind(
    folder: Callable[..., Path], field: str, value: Any, expected: str
) -> None:
    path = folder(**{field: value})
    with pytest.raises(
        mustafar.ModelError, match=f'generation_config.json: "{field}": .*{expected}'
    ):
        mustafar.Model(path)


@needs_command
def test_command(folder: Callable[..., Path]) -> None:
    path = folder(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[1, 5])
    info = json.loads(run("info", "-m", path, "--json").stdout)["sampling"]
    assert info.pop("from_folder") == ["temperature", "top_p"]
    assert info == {**OWN, "temperature": 0.6, "top_p": 0.9}
    text = run("info", "-m", path).stdout
    assert "temperature 0.6, top_p 0.9 of the folder; top_k 40, min_p 0.05" in text
    with mustafar.Model(path) as model:
        expected = Session(model).generate(PROMPT, seed=5, max_new_tokens=24)
    out = run("generate", "-m", path, "-p", PROMPT, "-n", 24, "-s", 5, "--json")
    assert json.loads(out.stdout)["token_ids"] == expected.token_ids
    chat = run("chat", "-m", path, "--commands", stdin="/set\n/set top-p=1\n/set\n")
    assert "temp=0.6  top-k=40  top-p=0.9  min-p=0.05" in chat.stderr
    assert "temp=0.6  top-k=40  top-p=1  min-p=0.05" in chat.stderr
