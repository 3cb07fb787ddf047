"""What people who know other libraries try first."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mustafar
from mustafar import Chat, KVConfig, SamplingParams, Session, Tokenizer
from support.paths import DEMO

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def model() -> mustafar.Model:
    return mustafar.Model(DEMO, threads=1)


def test_ids_of_the_ends_of_a_text(model: mustafar.Model, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoTokenizer.from_pretrained(DEMO)
    tokenizer = model.tokenizer
    assert tokenizer.bos_id == oracle.bos_token_id
    assert tokenizer.eos_ids[0] == oracle.eos_token_id
    assert set(tokenizer.eos_ids) == set(model.config["eos_token_ids"])
    # Of tokenizer.json alone: what a text begins with.
    shutil.copyfile(DEMO / "tokenizer.json", tmp_path / "tokenizer.json")
    alone = Tokenizer(tmp_path)
    prefix = alone.special_prefix
    assert (alone.bos_id, alone.eos_ids) == (prefix[0] if prefix else None, [])
    for file, fields, bos, eos in (
        ("config.json", {"bos_token_id": 3, "eos_token_id": [4, -1, 10**9]}, 3, [4]),
        ("generation_config.json", {"eos_token_id": 5}, 3, [4, 5]),
        ("tokenizer_config.json", {"eos_token": {"content": "<|end_of_text|>"}}, 3, [1, 4, 5]),
        ("special_tokens_map.json", {"bos_token": "<|user|>"}, 3, [1, 4, 5]),
    ):
        (tmp_path / file).write_text(json.dumps(fields))
        alone = Tokenizer(tmp_path / "tokenizer.json")
        assert (alone.bos_id, alone.eos_ids) == (bos, eos)
    (tmp_path / "config.json").write_text("{")
    assert Tokenizer(tmp_path / "tokenizer.json").eos_ids == [1, 5]


def test_forks_of_a_chat_go_their_ways(model: mustafar.Model) -> None:
    chat = Chat(model, "Be brief.", kv=KVConfig(window=16))
    chat.send("def add(a, b):", **GREEDY)
    fork = chat.fork()
    assert fork.messages == chat.messages
    assert fork.session is not chat.session
    stream = fork.stream("One", **GREEDY)
    assert stream.cached_tokens >= len(chat.session.tokens) - 1
    "".join(stream)
    chat.send("Two", **GREEDY)
    assert (fork.messages[-2]["content"], chat.messages[-2]["content"]) == ("One", "Two")
    assert len(fork.messages) == len(chat.messages) == 5
    whole = Chat(model, "Be brief.", kv=KVConfig(window=16))
    whole.send("def add(a, b):", **GREEDY)
    whole.send("One", **GREEDY)
    assert fork.messages == whole.messages
    del chat
    assert fork.send("More", **GREEDY).token_ids


def test_a_chat_is_cancelled_from_another_thread(model: mustafar.Model) -> None:
    chat = Chat(model)
    begun, cancelled = threading.Event(), threading.Event()
    said: list[str] = []

    def talk() -> None:
        with pytest.raises(mustafar.Cancelled):
            for piece in chat.stream("Hello", temperature=1, ignore_eos=True, max_new_tokens=900):
                said.append(piece)
                begun.set()
                cancelled.wait(60)

    thread = threading.Thread(target=talk)
    thread.start()
    assert begun.wait(60)
    chat.cancel()
    cancelled.set()
    thread.join(60)
    assert not thread.is_alive()
    assert chat.messages[-1]["role"] == "assistant"
    assert chat.messages[-1]["content"].startswith("".join(said)[:10])
    assert chat.send("Still there?", **GREEDY).token_ids


def test_reprs(model: mustafar.Model) -> None:
    session = Session(model, max_tokens=100)
    stream = session.stream("def", **GREEDY)
    next(stream)
    assert repr(stream).startswith("<mustafar.Stream of ")
    stream.close()
    text = repr(session)
    assert f"with {session.position} of 100 tokens, KVConfig(" in text
    chat = Chat(session)
    chat.messages = [{"role": "user", "content": "Hi"}]
    assert repr(chat) == f"<mustafar.Chat of 1 messages in {session!r}>"
    assert "ChatTemplate" in repr(model.chat_template)
    session.close()
    assert repr(session) == "<mustafar.Session, closed>"


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"value_dtype": "int3"}, ValueError, "value_dtype must be one of .*int3"),
        ({"value_dtype": 8}, TypeError, "value_dtype must be a text"),
        ({"pattern": "rows"}, ValueError, "pattern"),
        ({"k_policy": "best"}, ValueError, "policy"),
        ({"sparsity": 1.0}, ValueError, "sparsity"),
        ({"sparsity": "0.5"}, TypeError, "sparsity must be a number"),
        ({"k_sparsity": float("nan")}, ValueError, "k_sparsity"),
        ({"window": 1.5}, TypeError, "window must be an integer"),
        ({"sink_tokens": -1}, ValueError, "sink_tokens"),
        ({"value_dtype": "coded", "bits": 9}, ValueError, "bits"),
    ],
)
def test_a_cache_that_cannot_be_is_refused_when_described(
    changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        KVConfig(**changes)


def test_descriptions_of_caches_take_what_counts_as_numbers() -> None:
    config = KVConfig(sparsity=np.float32(0.5), window=np.int64(8), sink_tokens=None)  # type: ignore[arg-type]
    assert config == KVConfig(sparsity=0.5, window=8)
    assert type(config.window) is int


def test_missing_files_are_file_not_found_errors(
    model: mustafar.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # nothing is downloaded
    none = tmp_path / "none"
    (tmp_path / "empty").mkdir()
    for error, call in (
        (mustafar.ModelError, lambda: mustafar.Model(none)),
        (mustafar.ModelError, lambda: mustafar.Model(tmp_path / "empty")),
        (mustafar.ModelError, lambda: mustafar.Model("nobody/no-such-model")),
        (mustafar.TokenizerError, lambda: Tokenizer(none)),
        (mustafar.StateError, lambda: Session.load(model, none)),
        (mustafar.Error, lambda: Chat(model).load(none)),
        (mustafar.Error, lambda: mustafar.Profile.load(none)),
    ):
        with pytest.raises(FileNotFoundError, match="no") as caught:
            call()
        assert isinstance(caught.value, error)
        assert type(caught.value).__module__ == "mustafar"
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(mustafar.TokenizerError) as there:
        Tokenizer(tmp_path / "bad.json")
    assert not isinstance(there.value, FileNotFoundError)


def test_log_probabilities_of_the_chosen_alone(model: mustafar.Model) -> None:
    none = Session(model).generate("def", **GREEDY)
    assert none.logprobs == []
    assert Session(model).generate("def", logprobs=-1, **GREEDY).logprobs == []
    chosen = Session(model).generate("def", logprobs=0, **GREEDY)
    two = Session(model).generate("def", logprobs=2, **GREEDY)
    assert [e.token_id for e in chosen.logprobs] == chosen.token_ids == two.token_ids
    assert all(entry.top == {} for entry in chosen.logprobs)
    assert [e.logprob for e in chosen.logprobs] == pytest.approx([e.logprob for e in two.logprobs])
    messages = [{"role": "user", "content": "Hi"}]
    answer = model.chat_completion(messages, logprobs=True, max_tokens=3, temperature=0)
    assert [e["top_logprobs"] for e in answer["choices"][0]["logprobs"]["content"]] == [[]] * 3


def test_every_prompt_has_its_own_parameters() -> None:
    model = mustafar.Model(DEMO, threads=1, dtype="f32")  # bit by bit the same in every batch
    prompts = ["def add(", "class A", "import "]
    each = [
        SamplingParams(temperature=0, max_new_tokens=4),
        SamplingParams(seed=3, temperature=1.5, max_new_tokens=7, logprobs=1),
        None,
    ]
    together = model.generate(prompts, each, ignore_eos=True, min_new_tokens=2, seed=3)
    for prompt, params, result in zip(prompts, each, together, strict=True):
        alone = model.generate([prompt], params, ignore_eos=True, min_new_tokens=2, seed=3)[0]
        assert result.token_ids == alone.token_ids
        assert len(result.logprobs) == len(alone.logprobs)
    assert [len(r.token_ids) for r in together] == [4, 7, 256]
    with pytest.raises(ValueError, match="params has 2 elements for 3 prompts"):
        model.generate(prompts, each[:2])
    assert model.generate([], []) == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads came with 3.11")
def test_types_of_answers() -> None:
    overloads = typing.get_overloads(mustafar.Model.chat_completion)
    types = {o.__annotations__["stream"]: o.__annotations__["return"] for o in overloads}
    assert types["Literal[False] | None"] == "dict[str, Any]"
    assert types["Literal[True]"] == "Iterator[dict[str, Any]]"
