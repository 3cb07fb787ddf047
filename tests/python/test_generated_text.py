"""The text of generated tokens: where it joins the prompt's, and ids and stop texts that no text has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mustafar
from mustafar import Session
from support.paths import model_folder
from support.sessions import GREEDY
from support.tiny_model import write_tiny_model

tokenizers = pytest.importorskip("tokenizers")

PROMPTS = ["Once upon a time", "Lily and her mom went to the", "The dog was very", "One day, 🦙"]


@pytest.fixture(scope="module")
def words() -> Iterator[mustafar.Model]:
    """A model whose decoder, as SentencePiece, drops the space at the start of a text."""
    with mustafar.Model(model_folder("stories260K"), device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def oracle() -> Any:
    return tokenizers.Tokenizer.from_file(str(model_folder("stories260K") / "tokenizer.json"))


def text_after(oracle: Any, before: list[int], made: list[int]) -> str:
    """What the text of all has behind the text of the first."""
    whole, start = oracle.decode(before + made), oracle.decode(before)
    assert whole.startswith(start)
    return str(whole[len(start) :])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_completion_continues_the_prompt(words: mustafar.Model, oracle: Any, prompt: str) -> None:
    ids = words.tokenizer.encode(prompt)
    session = Session(words)
    made = session.generate(prompt, max_new_tokens=8, **GREEDY)
    expected = text_after(oracle, ids, made.token_ids)
    assert made.text == expected
    stream = Session(words).stream(prompt, max_new_tokens=8, **GREEDY)
    assert "".join(stream) == stream.result.text == expected
    batch = words.generate([prompt, ids], max_new_tokens=8, **GREEDY)
    assert [each.text for each in batch] == [expected] * 2
    # A generation that goes on without a prompt continues what was made before.
    more = session.generate(max_new_tokens=8, **GREEDY)
    assert more.text == text_after(oracle, ids + made.token_ids, more.token_ids)


def test_words_are_not_glued_together(words: mustafar.Model) -> None:
    park = words.tokenizer.encode(" park", add_special=False)
    first = next(i for i in park if words.tokenizer.id_to_token(i).startswith("▁p"))
    made = Session(words).generate("to the", max_new_tokens=1, logit_bias={first: 1000.0}, **GREEDY)
    assert made.token_ids == [first]
    assert made.text.startswith(" p")


def test_a_reply_is_a_text_of_its_own(words: mustafar.Model) -> None:
    template = mustafar.ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    chat = mustafar.Chat(Session(words), chat_template=template)
    reply = chat.send("Once upon a time", max_new_tokens=8, **GREEDY)
    assert reply.text == words.tokenizer.decode(reply.token_ids, skip_special=True)
    assert chat.messages[-1]["content"] == reply.text


@pytest.mark.parametrize("text", ["a 🦙 b", "caf\u00e9", "a b", "\u00e9🦙🦙", "  a  b "])
def test_streams_continue_any_tokens(text: str) -> None:
    tokenizer = mustafar.Tokenizer(model_folder("stories260K"))
    ids = tokenizer.encode(text, add_special=False)
    assert tokenizer.decode(ids) == text
    for cut in range(len(ids)):
        stream = tokenizer.stream(after=ids[:cut])
        rest = "".join(map(stream.push, ids[cut:])) + stream.flush()
        # A character that the cut divides, by up to three bytes, comes whole.
        assert any(tokenizer.decode(ids[: cut - n]) + rest == text for n in range(min(cut, 3) + 1))
        # Afterwards the stream is as new.
        assert stream.push(ids[0]) + stream.flush() == tokenizer.decode(ids[:1])


def test_the_end_of_an_incomplete_character_comes_once() -> None:
    tokenizer = mustafar.Tokenizer(model_folder("stories260K"))
    llama = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🦙".encode()]
    a = tokenizer.encode("a", add_special=False)
    assert None not in llama
    stream = tokenizer.stream(after=a + llama[:2])
    assert [*map(stream.push, llama[2:]), stream.flush()] == ["", "", "🦙"]
    stream = tokenizer.stream(after=a + llama[:2])
    assert stream.flush() == ""  # the prompt's own text has it already
    stream = tokenizer.stream(after=a + llama)
    assert stream.push(llama[0]) + stream.flush() == "\ufffd"  # one byte, not the whole run


def padded_model(folder: Path) -> mustafar.Model:
    """Its vocabulary is larger than its tokenizer's: the last 16 ids are no tokens."""
    write_tiny_model(folder, context=256)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.pad(embedding, ((0, 16), (0, 0)))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += 16
    (folder / "config.json").write_text(json.dumps(config))
    return mustafar.Model(folder, device="cpu")


def test_ids_of_a_padded_vocabulary_have_no_text(tmp_path: Path) -> None:
    with padded_model(tmp_path / "padded") as model:
        pad = model.config["vocab_size"] - 1
        assert model.tokenizer.vocab_size <= pad
        oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "padded" / "tokenizer.json"))
        assert model.tokenizer.decode([pad] * 3) == oracle.decode([pad] * 3) == ""
        params = {**GREEDY, "max_new_tokens": 3, "logit_bias": {pad: 1000.0}}
        session = Session(model)
        result = session.generate("Once", **params)
        assert (result.token_ids, result.text, result.finish_reason) == ([pad] * 3, "", "length")
        assert session.tokens[-3:] == [pad] * 3
        assert "".join(Session(model).stream("Once", **params)) == ""
        (batched,) = model.generate(["Once"], **params)
        assert (batched.token_ids, batched.text) == ([pad] * 3, "")
        chat = mustafar.Chat(Session(model), chat_template="chatml")
        assert chat.send("Once", **params).text == ""


def test_stop_texts_that_spell_special_tokens(tmp_path: Path) -> None:
    with mustafar.Model(write_tiny_model(tmp_path, context=256), device="cpu") as model:
        tokenizer = model.tokenizer
        end = json.loads((tmp_path / "config.json").read_text())["eos_token_id"][0]
        spelled = tokenizer.id_to_token(end)
        assert tokenizer.is_special(end)
        script = [
            *tokenizer.encode(" cat", add_special=False),
            end,
            *tokenizer.encode("dog", False),
        ]

        def forced(ids: Any, logits: Any) -> None:
            logits[script[len(ids) - start]] = 1e9

        start = len(tokenizer.encode("A"))
        params: dict[str, Any] = dict(
            GREEDY, max_new_tokens=len(script), ignore_eos=True, logits_processor=forced
        )
        whole = Session(model).generate("A", **params)
        assert (whole.token_ids, whole.text) == (script, " catdog")
        before = script[: script.index(end)]
        for stop, text in {
            spelled: " cat",
            "t" + spelled: " ca",
            spelled + "do": " cat",
            "cat" + spelled + "d": " ",
            "tdo": " ca",  # what is not spelled with the token is found in the text alone
        }.items():
            session = Session(model)
            result = session.generate("A", stop=["no such text", stop], **params)
            assert (result.text, result.finish_reason) == (text, "stop"), stop
            assert script[: len(result.token_ids)] == result.token_ids
            assert session.tokens[start:] == result.token_ids
            assert len(result.token_ids) <= len(before)
            assert "".join(Session(model).stream("A", stop=[stop], **params)) == text
            (batched,) = model.generate(["A"], stop=[stop], **params)
            assert (batched.text, batched.finish_reason) == (text, "stop")
        unmatched = Session(model).generate(
            "A", stop=[spelled + "x", "cat" + spelled + "x"], **params
        )
        assert (unmatched.text, unmatched.finish_reason) == (" catdog", "length")
