"""Replies that go on inside the assistant's own beginning, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mustafar
from mustafar import Chat, ChatTemplate, KVConfig, Session
from support.paths import SHARED

DATA = SHARED / "chat_templates"
TEMPLATES = sorted(DATA.glob("*.jinja")) if DATA.is_dir() else []
USER = {"role": "user", "content": "Capital of France?"}
BEGUN = [USER, {"role": "assistant", "content": "The capital is"}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    BEGUN,
    [USER, {"role": "assistant", "content": "The capital is  \n"}],
    [{"role": "system", "content": "Brief."}, *BEGUN],
    [*BEGUN, USER, {"role": "assistant", "content": 'Grüße 日本 {"city": "'}],
    [USER, {"role": "assistant", "content": ""}],
]
LINES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 12}


@pytest.mark.skipif(not TEMPLATES, reason="shared chat templates are not here")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_published_templates_end_where_transformers_does(path: Path) -> None:
    oracle = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    source = path.read_text(encoding="utf-8")
    ours = ChatTemplate(source)
    compared = 0
    for messages in CONVERSATIONS:
        options = {"bos_token": "<s>", "eos_token": "</s>", "date_string": "26 Jul 2024"}
        try:
            expected = oracle(
                [messages], chat_template=source, continue_final_message=True, **options
            )[0][0]
        except Exception:  # noqa: BLE001 - it refuses: so must ours
            with pytest.raises((mustafar.TemplateError, ValueError)):
                ours.render(messages, continue_final_message=True, **options)
            continue
        assert ours.render(messages, continue_final_message=True, **options) == expected
        compared += 1
    assert compared or "gemma" in path.stem


def test_fields_parts_and_refusals() -> None:
    oracle = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    thinking = "{% for m in messages %}[{{ m.thinking }}|{{ m.content | trim }}]{% endfor %}"
    for source, messages, field in (
        (thinking, [{"role": "assistant", "reasoning_content": "Hm", "content": "x"}], "thinking"),
        (thinking, [{"role": "assistant", "thinking": "Hm ", "content": "x"}], "reasoning_content"),
        (
            "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}",
            [{"role": "assistant", "content": [{"text": "a"}, {"text": "b"}]}],
            True,
        ),
    ):
        expected = oracle([messages], chat_template=source, continue_final_message=field)[0][0]
        assert ChatTemplate(source).render(messages, continue_final_message=field) == expected

    template = ChatTemplate(LINES + PROMPT)
    render = template.render
    for messages, field, said in (
        ([], True, "no message"),
        ([{"role": "assistant"}], True, "no 'content'"),
        ([{"role": "assistant", "content": "x", "other": "y"}], "other", "does not read 'other'"),
        ([{"role": "assistant", "content": 5}], True, "is no text"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], True, "no text to continue"),
    ):
        with pytest.raises(ValueError, match=said):
            render(messages, continue_final_message=field)
    with pytest.raises(ValueError, match="without add_generation_prompt"):
        render(BEGUN, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(TypeError, match="continue_final_message must be"):
        render(BEGUN, continue_final_message=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leaves out"):
        ChatTemplate("{{ messages[0].content }}").render(BEGUN, continue_final_message=True)
    # What a message spells is text, the mark itself too.
    tag = [USER, {"role": "assistant", "content": "CONTINUE_FINAL_MESSAGE_TAG </s>"}]
    assert render(tag, continue_final_message=True).endswith("_TAG </s>")


def test_apply_chat_template(model: mustafar.Model) -> None:
    apply = model.tokenizer.apply_chat_template
    text = apply(BEGUN, continue_final_message=True, tokenize=False, chat_template="chatml")
    assert text.endswith("<|im_start|>assistant\nThe capital is")
    ids = apply(BEGUN, continue_final_message=True, chat_template="chatml")
    assert model.tokenizer.decode(ids) == text
    assert apply(BEGUN, False, chat_template="chatml", tokenize=False).endswith("<|im_end|>\n")
    with pytest.raises(ValueError, match="add_generation_prompt"):
        apply(BEGUN, True, continue_final_message=True, chat_template="chatml")


def test_chat_goes_on_with_what_it_began(model: mustafar.Model) -> None:
    eos = model.tokenizer.id_to_token(model.config["eos_token_ids"][0])
    template = ChatTemplate(LINES.replace("</s>", eos) + PROMPT)
    begun = [{"role": "user", "content": "Tell me"}, {"role": "assistant", "content": "Once upon"}]
    chat = Chat(model, chat_template=template, kv=KVConfig(value_dtype="auto"))
    chat.messages = begun
    prompt = chat.prompt_tokens(continue_final_message=True)
    result = chat.reply(continue_final_message=True, **GREEDY)
    ids = model.tokenizer.apply_chat_template(
        begun, chat_template=template, continue_final_message=True
    )
    assert prompt == ids
    fresh = Session(model, kv=KVConfig(value_dtype="auto"))
    expected = fresh.generate(ids, **GREEDY)
    assert (result.text, result.token_ids) == (expected.text, expected.token_ids)
    assert chat.messages == [begun[0], {**begun[1], "content": "Once upon" + result.text}]

    # The rest of a reply that was cut off is what the whole would have been.
    halves = Chat(model, chat_template=template, kv=KVConfig(value_dtype="auto"))
    first = halves.send("Tell me", **{**GREEDY, "max_new_tokens": 5})
    stream = halves.stream_reply(continue_final_message=True, **GREEDY)
    assert stream.cached_tokens == len(halves.session.tokens) - 1
    "".join(stream)
    whole = Chat(model, chat_template=template, kv=KVConfig(value_dtype="auto"))
    whole.send("Tell me", **{**GREEDY, "max_new_tokens": 17})
    assert halves.messages == whole.messages
    assert first.text + stream.result.text == whole.messages[-1]["content"]
    # And the conversation goes on with all of it cached.
    held = len(halves.session.tokens)
    assert halves.stream("More", **GREEDY).cached_tokens >= held - 1

    for messages in ([], begun[:1], [{"role": "assistant", "content": None}]):
        chat.messages = messages
        with pytest.raises(ValueError, match="not a text of the assistant's"):
            chat.reply(continue_final_message=True)
        with pytest.raises(ValueError, match="not a text of the assistant's"):
            chat.prompt_tokens(continue_final_message=True)
        assert chat.messages == messages


def test_chat_completion(model: mustafar.Model) -> None:
    def complete(messages: Any, **body: Any) -> Any:
        template = ChatTemplate(LINES + PROMPT)
        return model.chat_completion(messages, chat_template=template, **GREEDY, **body)

    whole = complete([USER])["choices"][0]["message"]["content"]
    cut = len(whole) // 2
    begun = [USER, {"role": "assistant", "content": whole[:cut]}]
    rest = complete(begun, continue_final_message=True, add_generation_prompt=False)
    text = rest["choices"][0]["message"]["content"]
    assert json.dumps(rest) and text and text != whole
    pieces = complete(begun, continue_final_message=True, stream=True)
    streamed = "".join(c["choices"][0]["delta"].get("content", "") for c in pieces)
    assert streamed == text
    assert (
        complete([USER], continue_final_message=None)["choices"][0]["message"]["content"] == whole
    )
    for body in (
        {"continue_final_message": True, "add_generation_prompt": True},
        {"add_generation_prompt": False},
    ):
        with pytest.raises(ValueError, match="add_generation_prompt"):
            complete(begun, **body)
    with pytest.raises(TypeError, match="continue_final_message"):
        complete(begun, continue_final_message="content")
    with pytest.raises(ValueError, match="not a text of the assistant's"):
        complete([USER], continue_final_message=True)
