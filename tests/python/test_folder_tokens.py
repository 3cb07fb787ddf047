"""Tokens and chat templates that stand in files beside tokenizer.json, as transformers reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import mustafar
from support.paths import model_folder

transformers = pytest.importorskip("transformers")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
MESSAGES = [{"role": "user", "content": "Hi"}]


def token(content: str, **flags: bool) -> dict[str, Any]:
    names = ("lstrip", "normalized", "rstrip", "single_word")
    return {"content": content, "special": True, **dict.fromkeys(names, False), **flags}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tokenizer of 512 ids by itself."""
    for name in ("tokenizer.json", "config.json"):
        shutil.copyfile(model_folder("stories260K") / name, tmp_path / name)
    return tmp_path


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def both(folder: Path) -> tuple[mustafar.Tokenizer, Any]:
    oracle = transformers.AutoTokenizer.from_pretrained(str(folder))
    return mustafar.Tokenizer(folder), oracle


def expect_same(folder: Path, text: str) -> mustafar.Tokenizer:
    ours, oracle = both(folder)
    ids = ours.encode(text, parse_special=True)
    assert ids == oracle.encode(text)
    assert ours.decode(ids) == oracle.decode(ids)
    assert ours.decode(ids, skip_special=True) == oracle.decode(ids, skip_special_tokens=True)
    for content, token_id in oracle.get_added_vocab().items():
        assert ours.token_to_id(content) == token_id
        assert ours.is_special(token_id) == oracle.added_tokens_decoder[token_id].special
    return ours


CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_added_tokens_decoder(folder: Path) -> None:
    added = {
        "512": token("<|im_start|>"),
        "513": token("<|im_end|>"),
        "514": token("<tool>", special=False),
        "0": token("<unk>"),
    }
    write(folder, "tokenizer_config.json", {**CONFIG, "added_tokens_decoder": added})
    ours = expect_same(folder, "<|im_start|>user Hi<|im_end|><tool>x")
    assert ours.vocab_size == 515
    assert ours.encode("<|im_start|>", add_special=False, parse_special=True) == [512]
    # A file by itself is taken as it is.
    assert mustafar.Tokenizer(folder / "tokenizer.json").token_to_id("<|im_start|>") is None


def test_ids_with_gaps_become_the_next_ones(folder: Path) -> None:
    added = {"600": token("<b>"), "520": token("<a>")}
    write(folder, "tokenizer_config.json", {**CONFIG, "added_tokens_decoder": added})
    ours = expect_same(folder, "x<a>y<b>z")
    assert (ours.token_to_id("<a>"), ours.token_to_id("<b>")) == (512, 513)


def test_added_tokens_json_and_special_tokens_map(folder: Path) -> None:
    write(folder, "tokenizer_config.json", CONFIG)
    write(folder, "added_tokens.json", {"<|end|>": 513, "<|start|>": 512, "<note>": 514})
    write(
        folder,
        "special_tokens_map.json",
        {"eos_token": token("<|end|>"), "extra_special_tokens": ["<|start|>", "<|more|>"]},
    )
    ours = expect_same(folder, "<|start|>a<note>b<|more|>c<|end|>")
    assert ours.token_to_id("<|end|>") == 513


def test_named_special_tokens(folder: Path) -> None:
    config = {**CONFIG, "pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>"}
    write(folder, "tokenizer_config.json", config)
    expect_same(folder, "a[PAD]b</s>")


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer_config.json", [1]),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": token("a")}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"512": 3}}),
        ("added_tokens.json", {"a": "b"}),
    ],
)
def test_broken_files_are_named(folder: Path, name: str, content: Any) -> None:
    write(folder, name, content)
    with pytest.raises(mustafar.TokenizerError, match=name):
        mustafar.Tokenizer(folder)


def rendered(folder: Path, **arguments: Any) -> tuple[list[str], list[str]]:
    ours, oracle = both(folder)
    cases: list[dict[str, Any]] = [{}, {"tools": TOOLS}]
    return (
        [
            ours.apply_chat_template(
                MESSAGES, add_generation_prompt=False, tokenize=False, **case, **arguments
            )
            for case in cases
        ],
        [
            oracle.apply_chat_template(MESSAGES, tokenize=False, **case, **arguments)
            for case in cases
        ],
    )


def write_jinja(folder: Path, **templates: str) -> None:
    (folder / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    (folder / "additional_chat_templates" / "notes.txt").write_text("{% no template")


def test_additional_chat_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("default {{ messages[0].content }}")
    write_jinja(folder, tool_use="tools {{ tools | length }}", rag="rag {{ messages | length }}")
    ours, theirs = rendered(folder)
    assert ours == theirs == ["default Hi", "tools 1"]
    ours, theirs = rendered(folder, chat_template="rag")
    assert ours == theirs == ["rag 1", "rag 1"]
    assert mustafar.ChatTemplate.from_folder(folder, "rag").render(MESSAGES) == "rag 1"


def test_only_additional_chat_templates(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {**CONFIG, "chat_template": "config"})
    write_jinja(folder, tool_use="tools {{ tools | length }}")
    ours, oracle = both(folder)
    prompt = ours.apply_chat_template(MESSAGES, False, tokenize=False, tools=TOOLS)
    assert prompt == oracle.apply_chat_template(MESSAGES, tokenize=False, tools=TOOLS) == "tools 1"
    with pytest.raises(ValueError):
        oracle.apply_chat_template(MESSAGES, tokenize=False)
    with pytest.raises(mustafar.TemplateError, match="tool_use"):
        ours.apply_chat_template(MESSAGES, False, tokenize=False)


def test_list_of_named_chat_templates(folder: Path) -> None:
    templates = [
        {"name": "default", "template": "default"},
        {"name": "tool_use", "template": "tools {{ tools is none }}"},
    ]
    write(folder, "tokenizer_config.json", {**CONFIG, "chat_template": templates})
    ours, theirs = rendered(folder)
    assert ours == theirs == ["default", "tools False"]
    ours, theirs = rendered(folder, chat_template="tool_use")
    assert ours == theirs == ["tools True", "tools False"]


def test_numbers_that_are_none_do_no_harm(folder: Path) -> None:
    """Python writes Infinity and NaN into its files, which other parsers refuse."""
    config = {
        "model_max_length": float("inf"),
        "added_tokens_decoder": {"512": token("<start>")},
        "chat_template": "{% for m in messages %}<start>{{ m.content }}{% endfor %}",
        "eos_token": "</s>",
    }
    write(folder, "tokenizer_config.json", config)
    ours = expect_same(folder, "<start>Once")
    assert ours.apply_chat_template(MESSAGES, tokenize=False) == "<start>Hi"
