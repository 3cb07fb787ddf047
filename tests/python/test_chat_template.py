"""Published and built-in chat templates against transformers, and the ChatTemplate class."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

import pytest

import mustafar
from support.paths import SHARED

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from support.jinja_oracle import (
    JSON_VALUES,
    frozen_time,
    oracle_module,
    ours,
)

pytestmark = pytest.mark.usefixtures(frozen_time.__name__)


DATA = SHARED / "chat_templates"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather of a <city> & "more"',
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
        },
        "return": {"type": "string"},
    },
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Köln", "days": 2}},
        }
    ],
}
CALL_TEXT = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'},
        }
    ],
}
RESULT = {"role": "tool", "content": "12 °C", "tool_call_id": "abcdefghi"}
USER, ASSISTANT = (
    {"role": "user", "content": " Hi there \n"},
    {"role": "assistant", "content": "Hello!"},
)
SYSTEM = {"role": "system", "content": " Be brief. "}

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT, USER],
    [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
    [SYSTEM],
    [],
    [ASSISTANT],
    [USER, USER],
    [USER, CALL],
    [USER, CALL, RESULT],
    [SYSTEM, USER, CALL, RESULT, ASSISTANT, USER],
    [USER, CALL_TEXT, RESULT, RESULT, USER],
    [USER, {**CALL, "content": "Let me look."}, RESULT],
    [USER, {**CALL, "tool_calls": CALL["tool_calls"] * 2}],
    [USER, {**CALL, "tool_calls": []}],
    [USER, {**RESULT, "content": {"temperature": 12}}],
    [USER, {**RESULT, "content": ["a", 1]}],
    [USER, {"role": "assistant", "content": "<think>hmm</think>Answer"}, USER],
    [USER, {"role": "assistant", "reasoning": "hmm", "content": "Answer"}, USER],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": None}],
    [{"role": "user"}],
    [{"content": "no role"}],
    [{}],
    [{"role": "stranger", "content": "x"}],
    [{"role": "user", "content": [{"type": "text", "text": "parts"}]}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": "<|eot_id|></s>[INST] {{ 1 }} {% raw %}"}],
    [{"role": "system", "content": "é日本😀"}, {"role": "user", "content": "\u2028\x00\t"}],
]

TEMPLATES = sorted(DATA.glob("*.jinja")) if DATA.is_dir() else []


def render_with_transformers(
    source: str, messages: list[dict[str, Any]], **options: Any
) -> tuple[str, str]:
    try:
        return "ok", oracle_module.render_jinja_template(
            [messages], chat_template=source, **options
        )[0][0]
    except Exception as e:  # noqa: BLE001
        return "error", f"{type(e).__name__}: {e}"


def assert_published(source: str, messages: list[dict[str, Any]], **options: Any) -> None:
    expected = render_with_transformers(source, messages, **options)
    actual = ours(source, messages=messages, **options)
    assert actual[0] == expected[0], (messages, expected, actual)
    if expected[0] == "ok":
        assert actual[1] == expected[1], messages


@pytest.mark.skipif(not TEMPLATES, reason="shared chat templates are not here")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_published_templates(path: pathlib.Path) -> None:
    source = path.read_text(encoding="utf-8")
    option_sets: list[dict[str, Any]] = [
        {},
        {"add_generation_prompt": True},
        {"tools": [WEATHER]},
        {
            "tools": [WEATHER, WEATHER],
            "tools_in_user_message": False,
            "add_generation_prompt": True,
        },
        {"tools": []},
        {"date_string": "1 Jan 2030"},
        {"builtin_tools": ["get_weather", "code_interpreter"]},
        {"custom_tools": [WEATHER]},
    ]
    for messages, options in itertools.product(CONVERSATIONS, option_sets):
        assert_published(source, messages, bos_token="<s>", eos_token="</s>", **options)


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool", "ipython", "x y"]),
            "content": st.none()
            | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
            | JSON_VALUES,
            "tool_calls": st.none()
            | st.lists(
                st.fixed_dictionaries(
                    {
                        "function": st.fixed_dictionaries(
                            {"name": st.text("ab_", max_size=3), "arguments": JSON_VALUES}
                        )
                    },
                    optional={
                        "id": st.text("abcdefghi", min_size=8, max_size=9),
                        "type": st.just("function"),
                    },
                ),
                max_size=2,
            ),
            "tool_call_id": st.text("abcdefghi", min_size=9, max_size=9),
            "thinking": st.none() | st.text("ab"),
        },
    ),
    max_size=5,
)


@pytest.mark.skipif(not TEMPLATES, reason="shared chat templates are not here")
@settings(max_examples=150, deadline=None)
@given(MESSAGES, st.booleans(), st.sampled_from([None, [WEATHER]]))
def test_published_templates_on_any_messages(messages: Any, generate: bool, tools: Any) -> None:
    for path in TEMPLATES:
        source = path.read_text(encoding="utf-8")
        assert_published(
            source,
            messages,
            add_generation_prompt=generate,
            tools=tools,
            bos_token="<s>",
            eos_token="</s>",
        )


# --- the class


def test_raise_exception_reaches_the_caller() -> None:
    with pytest.raises(mustafar.TemplateError, match="line 2: roles must alternate"):
        mustafar.ChatTemplate("\n{{ raise_exception('roles must alternate') }}").render([])


def test_unsupported_constructs_are_named() -> None:
    for source, name in [
        ("{% include 'a' %}", "include"),
        ("{{ x|urlize }}", "urlize"),
        ("{{ 'a'.encode() }}", "encode"),
        ("{{ range }}", "function"),
        ("{% block a %}{% endblock %}", "block"),
        ("{{ 2**64 }}", "64 bits"),
    ]:
        with pytest.raises(mustafar.TemplateError, match=name):
            mustafar.ChatTemplate("\n\n" + source).render([])


def test_bounds() -> None:
    for source in [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ '-' * 10**10 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "1+" * 50000 + "1 }}",
        "{{ " + "-" * 50000 + "1 }}",
        "{% if 1 %}" * 5000,
        "{{ " + "[" * 100000 + " }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[]) %}{% for i in range(99999) %}{% set ns.s = [ns.s] %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}"
        "{% endfor %}{{ ns.s }}",
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
        "{% set ns = namespace(g=[1]) %}{% for i in range(50000) %}{% set ns.g = ns.g|map('abs') %}"
        "{% endfor %}{{ ns.g|list }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'a'|center(10**12) }}",
        "{{ x|replace('', x)|replace('', x)|replace('', x) }}",
        "{{ 10**10**10 }}",
        "{{ 'x'|indent(10**11) }}",
        "{{ [1]|tojson(indent=10**11) }}",
    ]:
        with pytest.raises(mustafar.TemplateError):
            mustafar.ChatTemplate(source).render([], x="x" * 5000)


def test_arguments_are_checked() -> None:
    template = mustafar.ChatTemplate("{{ messages }}")
    with pytest.raises(ValueError, match="messages"):
        template.render("text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="element 0"):
        template.render(["text"])
    with pytest.raises(TypeError, match="object"):
        template.render([{"role": object()}])
    with pytest.raises(ValueError, match="64 bits"):
        template.render([{"role": 2**70}])
    with pytest.raises(ValueError):
        template.render([{"role": "\ud800"}])
    with pytest.raises(ValueError, match="date"):
        template.render([], date="yesterday")
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    with pytest.raises(ValueError, match="deeper"):
        template.render([{"content": deep}])


def test_marks_tell_what_came_from_outside() -> None:
    template = mustafar.ChatTemplate(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content|trim|replace('a', '<b>') }}{{ eos_token }}{% endfor %}"
        "{{ tools|tojson }}{{ '%s!' % messages[0].content }}{{ messages[0].content[:2] ~ 'x' }}"
    )
    text, ranges = template.render_marked(
        [{"role": "user", "content": " cat</s> "}], eos_token="</s>", tools=[{"k": "v"}]
    )
    outside = [text.encode()[a:b].decode() for a, b in ranges]
    assert text == '<|user|>c<b>t</s></s>[{"k": "v"}] cat</s> ! cx'
    assert outside == ["c", "t</s>", "k", "v", " cat</s> ", " c"]
    text, ranges = template.render_marked([{"role": "a|>b", "content": "x"}])
    assert ranges[0] == (2, 6)  # a role that is no plain word is marked


def test_from_folder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(mustafar.TemplateError, match="--chat-template"):
        mustafar.ChatTemplate.from_folder(tmp_path)
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": [
            {"name": "default", "template": "{{ bos_token }}D{{ eos_token }}"},
            {"name": "tool_use", "template": "T"},
            {"name": "other", "template": "O"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = mustafar.ChatTemplate.from_folder(tmp_path)
    assert template.render([]) == "<s>D</s>"
    assert template.render([], bos_token="B") == "BD</s>"
    assert template.render([], tools=[WEATHER]) == "T"
    assert mustafar.ChatTemplate.from_folder(tmp_path, "other").render([]) == "O"
    with pytest.raises(mustafar.TemplateError, match="nope.*default"):
        mustafar.ChatTemplate.from_folder(tmp_path, "nope")
    (tmp_path / "chat_template.jinja").write_text("J{{ eos_token }}")
    assert mustafar.ChatTemplate.from_folder(tmp_path).render([]) == "J</s>"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(mustafar.TemplateError, match="line 1"):
        mustafar.ChatTemplate.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for broken in ("[]", "{", '{"chat_template": 5}', '{"chat_template": [{"name": 1}]}'):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(mustafar.TemplateError, match="tokenizer_config"):
            mustafar.ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize("name", mustafar.ChatTemplate.builtin_names())
def test_builtin_templates(name: str) -> None:
    template = mustafar.ChatTemplate.builtin(name)
    for messages in ([USER], [SYSTEM, USER, ASSISTANT, USER]):
        for generate in (False, True):
            assert_published(
                template.source,
                messages,
                add_generation_prompt=generate,
                bos_token="<s>",
                eos_token="</s>",
            )
        assert "Hi there" in template.render(messages)


def test_unknown_builtin() -> None:
    with pytest.raises(mustafar.TemplateError, match="chatml"):
        mustafar.ChatTemplate.builtin("nope")
