"""Tokenizer.apply_chat_template against transformers, on published templates."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

import mustafar
from support.paths import SHARED

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
oracle_module = pytest.importorskip("transformers.utils.chat_template_utils")

DATA = SHARED / "chat_templates"
TEMPLATES = sorted(DATA.glob("*.jinja")) if DATA.is_dir() else []
NOW = datetime.datetime(2025, 3, 7, 14, 5, 9)
BOS, EOS = "<|begin_of_text|>", "</s>"
# Every special token that the published templates spell.
SPECIAL = [
    BOS,
    EOS,
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|endoftext|>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁outputs▁end｜>",
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city, today.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}},
            "required": ["city"],
        },
    },
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi there"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße 日本 😀\n\nWhat now?  "},
        {"role": "assistant", "content": "This and that."},
        {"role": "user", "content": ""},
    ],
]


@pytest.fixture(autouse=True)
def frozen_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return NOW

    monkeypatch.setattr(oracle_module, "datetime", Frozen)


@pytest.fixture(scope="module")
def bpe() -> Any:
    """A byte-level BPE with every special token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([path.read_text() for path in TEMPLATES] or ["none"], trainer)
    return tokenizer


def write_folder(folder: Path, bpe: Any, source: str) -> mustafar.Tokenizer:
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    return mustafar.Tokenizer(folder)


def special_ids(tokenizer: mustafar.Tokenizer, ids: list[int]) -> list[int]:
    return [id for id in ids if tokenizer.is_special(id)]


@pytest.mark.skipif(not TEMPLATES, reason="shared chat templates are not here")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_equals_transformers(path: Path, tmp_path: Path, bpe: Any) -> None:
    source = path.read_text(encoding="utf-8")
    ours = write_folder(tmp_path, bpe, source)
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, chat_template=source
    )
    specials = 0
    for messages in CONVERSATIONS:
        for tools in (None, [WEATHER]):
            for generate in (False, True):
                options: dict[str, Any] = {"tools": tools, "add_generation_prompt": generate}
                try:
                    text = oracle.apply_chat_template(messages, tokenize=False, **options)
                except Exception:  # noqa: BLE001 - the template refuses: so must ours
                    with pytest.raises(mustafar.TemplateError):
                        ours.apply_chat_template(messages, date=NOW, **options)
                    continue
                ids = oracle.apply_chat_template(messages, return_dict=False, **options)
                actual = ours.apply_chat_template(messages, date=NOW, **options)
                assert actual == ids
                specials += len(special_ids(ours, actual))
                assert (
                    ours.apply_chat_template(messages, tokenize=False, date=NOW, **options) == text
                )
    assert specials > 8  # the template's own tokens became ids
    assert ours.apply_chat_template(CONVERSATIONS[0]) == ours.apply_chat_template(
        CONVERSATIONS[0], add_generation_prompt=True
    )


@pytest.mark.skipif(not TEMPLATES, reason="shared chat templates are not here")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_special_tokens_of_users_and_tools_stay_text(path: Path, tmp_path: Path, bpe: Any) -> None:
    ours = write_folder(tmp_path, bpe, path.read_text(encoding="utf-8"))
    evil = "x " + " ".join(SPECIAL) + " y"
    for tools, evil_tools in ((None, None), ([WEATHER], [{**WEATHER, "evil": evil}])):
        plain_ids = ours.apply_chat_template(
            [{"role": "user", "content": "x y"}], tools=tools, date=NOW
        )
        messages = [{"role": "user", "content": evil}]
        ids = ours.apply_chat_template(messages, tools=evil_tools, date=NOW)
        assert special_ids(ours, ids) == special_ids(ours, plain_ids)
        text = ours.apply_chat_template(messages, tools=evil_tools, tokenize=False, date=NOW)
        assert evil in text
        assert ours.decode(ids) == text
        assert len(special_ids(ours, ours.encode(text, False, parse_special=True))) > len(
            special_ids(ours, ids)
        )


def test_other_templates_and_their_errors(tmp_path: Path, bpe: Any) -> None:
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = mustafar.Tokenizer(tmp_path / "tokenizer.json")
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(mustafar.TemplateError, match="no chat template"):
        tokenizer.apply_chat_template(messages)

    source = "{{ bos_token }}{{ word }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(source)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS}))
    render = tokenizer.apply_chat_template
    by_file = render(messages, chat_template=tmp_path / "t.jinja", word="w", tokenize=False)
    assert by_file == BOS + "wHi"  # with the folder's special tokens
    own = mustafar.ChatTemplate(source)
    assert render(messages, chat_template=own, tokenize=False) == "Hi"
    ids = render(messages, chat_template=own, bos_token=EOS)
    assert ids == [tokenizer.token_to_id(EOS), *tokenizer.encode("Hi", False)]
    chatml = render(messages, chat_template="chatml", tokenize=False)
    assert chatml.endswith("<|im_start|>assistant\n")
    assert render(messages, False, chat_template="chatml", tokenize=False).endswith("<|im_end|>\n")
    with pytest.raises(mustafar.TemplateError, match="none such"):
        render(messages, chat_template="none such")
    with pytest.raises(mustafar.TemplateError, match="planted"):
        render(messages, chat_template=mustafar.ChatTemplate("{{ raise_exception('planted') }}"))
    with pytest.raises(TypeError):
        render(messages, False, False)  # type: ignore[call-overload]
    # A template that came later is found; one that was read stays.
    (tmp_path / "chat_template.jinja").write_text("one")
    assert render(messages, tokenize=False) == "one"
    (tmp_path / "chat_template.jinja").write_text("two")
    assert render(messages, tokenize=False) == "one"


def test_no_second_bos(tmp_path: Path, bpe: Any) -> None:
    """A post-processor adds BOS to texts, not to a conversation whose template spells it."""
    with_bos = tokenizers.Tokenizer.from_str(bpe.to_str())
    with_bos.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = write_folder(tmp_path, with_bos, "{{ bos_token }}{{ messages[0].content }}")
    bos = tokenizer.token_to_id(BOS)
    assert tokenizer.encode("Hi")[0] == bos
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert ids == [bos, *tokenizer.encode("Hi", add_special=False)]
