"""Statements, white space and printed values of the native template engine against jinja2."""

from __future__ import annotations

from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from support.jinja_oracle import (
    JSON_VALUES,
    UNSUPPORTED,
    VARIABLES,
    assert_same,
    frozen_time,
    ours,
)

pytestmark = pytest.mark.usefixtures(frozen_time.__name__)


STATEMENTS = [
    "{% for i in nums %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}"
    "{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}|{% endfor %}",
    "{% for i in nums %}{{ loop.previtem }}<{{ i }}>{{ loop.nextitem }} {% endfor %}",
    "{% for i in nums %}{{ loop.cycle('a', 'b') }}{{ loop.changed(i > 2) }}{% endfor %}",
    "{% for i in nums if i > 1 %}{{ i }}/{{ loop.length }}{% if not loop.last %},{% endif %}{% endfor %}",
    "{% for i in nums|select('odd') %}{{ loop.last }}{{ loop.length }}{{ i }}{% endfor %}",
    "{% for i in [] %}x{% else %}none{% endfor %}",
    "{% for i in nums %}{% continue %}{% else %}else after continue{% endfor %}",
    "{% for i in nums %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% else %}e{% endfor %}",
    "{% for i in nums %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in d|dictsort %}{{ k }}={{ v }};{% endfor %}",
    "{% for k in d %}{{ k }}{% endfor %}{% for c in 'abé' %}{{ c }}.{% endfor %}",
    "{% for a, b in [(1, 2), (3,)] %}{{ a }}{% endfor %}",
    "{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
    "{% for i in missing %}x{% endfor %}ok",
    "{% for i in none %}x{% endfor %}",
    "{% for i in 5 %}x{% endfor %}",
    "{% for i in nums recursive %}{{ i }}{{ loop.depth }}{% if loop.first and loop.depth < 3 %}"
    "({{ loop([7, 8]) }}){% endif %}{% endfor %}",
    "{% for i in nums %}{{ loop([1]) }}{% endfor %}",
    "{% for i in nums %}{% for j in nums %}{{ loop.index }}{% endfor %}{{ loop.index }} {% endfor %}",
    "{% for i in nums %}{% set x = i %}{% endfor %}{{ x is defined }}",
    "{% set x = 1 %}{% for i in nums %}{{ x }}{% set x = i %}{{ x }} {% endfor %}{{ x }}",
    "{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}",
    "{% if false %}{% set s = 2 %}{% endif %}{{ s }}",
    "{% if no %}a{% elif nothing %}b{% elif yes %}c{% else %}d{% endif %}",
    "{% if missing %}a{% else %}b{% endif %}{% if nums %}c{% endif %}{% if empty %}d{% endif %}",
    "{% if 1, 2 %}tuple{% endif %}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set (a, b) = (b, a) %}{{ a }}{{ b }}",
    "{% set a, b = [1] %}",
    "{% set ns = namespace(x=1) %}{% for i in nums %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace() %}{% set ns.a, ns.b = 1, 2 %}{{ ns.a }}{{ ns.b }}{{ ns.c }}{{ ns }}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{% set d.x = 1 %}",
    "{% set nope.x = 1 %}",
    "{% set x %}block {{ n }}{% endset %}[{{ x }}]",
    "{% set x | upper %}block {{ n }}{% endset %}[{{ x }}]",
    "{% set x | replace('b', 'c') | upper %}block{% endset %}[{{ x }}]",
    "{% for i in nums %}{% set x %}{% break %}{% endset %}{% endfor %}{{ x is defined }}",
    "{% macro m(a, b=2, c='x') %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }} {{ m(1, c=3) }} {{ m() }}",
    "{% macro m(a) %}{{ a is defined }}{% endmacro %}{{ m() }}{{ m(none) }}",
    "{% macro m(a) %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, 3, k=4) }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(b=2) }}",
    "{% macro m(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ m(5) }}",
    "{% macro m() %}{{ n }}{{ x }}{% endmacro %}{% set x = 3 %}{{ m() }}",
    "{% macro m(x) %}{% if x > 0 %}{{ x }}{{ m(x - 1) }}{% endif %}{% endmacro %}{{ m(5) }}",
    "{% macro m() %}{% set q = 5 %}{{ q }}{% endmacro %}{{ m() }}{{ q is defined }}",
    "{% macro m() %}a{% endmacro %}{{ m.name }}{{ m.arguments }}{{ m.catch_kwargs }}{{ m }}",
    "{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}in {{ n }}{% endcall %}",
    "{% macro m() %}{{ caller(1, 2) }}{% endmacro %}{% call(a, b) m() %}{{ a }}-{{ b }}{% endcall %}",
    "{% macro m() %}x{% endmacro %}{% call m() %}y{% endcall %}",
    "{% macro m(x) %}{{ x }}{{ caller is defined }}{% endmacro %}{{ m(1) }}",
    "{% macro outer() %}{% macro inner() %}i{{ n }}{% endmacro %}{{ inner() }}{% endmacro %}{{ outer() }}",
    "{% macro m(*a) %}{% endmacro %}",
    "{% macro m(a=1, b) %}{% endmacro %}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(*[1]) }}{{ m(**{'a': 2}) }}{{ m(*[1], **{'a': 2}) }}",
    "{% for i in nums %}{% macro m() %}{{ i }}{% endmacro %}{{ m() }}{% endfor %}",
    "{% filter upper %}abc {{ s }}{% endfilter %}",
    "{% filter replace('a', 'b') | upper %}aaa{% endfilter %}",
    "{% with a = 1, b = n %}{{ a }}{{ b }}{% set a = 5 %}{{ a }}{% endwith %}{{ a is defined }}",
    "{% with %}{% set z = 1 %}{{ z }}{% endwith %}{{ z is defined }}",
    "{% with a = 1, b = a %}{{ b }}{% endwith %}",
    "{% print 1, 'a' %}",
    "{% generation %}gen {{ n }}{% set q = 1 %}{% endgeneration %}{{ q is defined }}",
    "{% for i in nums %}{% generation %}{{ i }}{{ loop.index }}{% endgeneration %}{% endfor %}",
    "{% for i in nums %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
    "{% break %}",
    "{% raw %}{{ x }}{% y %}{% endraw %}|{% raw -%}  a  {%- endraw %}|",
    "{# comment #}a{#- c -#}  b  {#+ c #}\n{# x #}\nz",
    "a {# unclosed",
    "{% raw %} unclosed",
    "{% if true %}unclosed",
    "{% endif %}",
    "{% nosuchtag %}",
    "{% do x.y() %}",
    "{% set loop = 1 %}{{ loop }}",
    "{% for loop in nums %}{% endfor %}",
    "{% for i in nums %}{% set loop = 1 %}{% endfor %}",
    "{% set true = 1 %}",
    "{% set 'a' = 1 %}",
    "{% for i in [1, 2] if loop.index %}{% endfor %}",
    "{% if false %}{{ x | nofilter }}{% endif %}ok",
    "{% if true %}{{ n | nofilter }}{% endif %}",
    "{{ 1 if true else (2 | nofilter) }}",
    "{{ 1 | nofilter }}",
    "{% if no %}{{ 1 is notest }}{% endif %}ok",
    "{{ 1 is notest }}",
    "{% for i in [] %}{{ 1 | nofilter }}{% endfor %}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.current }}{{ c.next() }}{{ c.next() }}{{ c.reset() }}{{ c.next() }}",
    "{% set j = joiner('; ') %}{{ j() }}a{{ j() }}b",
    "{% set g = nums | map('abs') %}{{ g | list }}{{ g | list }}",
    "{% set g = nums | select('odd') %}{{ g | first }}{{ g | list }}",
    "{% for x in (nums | map('string')) %}{{ x ~ loop.nextitem }},{% endfor %}",
    "{{ [1, 'x', 2] | select('odd') | first }}",
    "{{ [1, 'x', 2] | select('odd') | list }}",
    "{% set x = {'a': [1]} %}{% for k, v in x|items %}{{ k }}{{ v }}{% endfor %}",
    "{% set ns = namespace(found=false) %}{% for m in users %}{% if m.on and not ns.found %}"
    "{% set ns.found = true %}{{ m.name }}{% endif %}{% endfor %}{{ ns.found }}",
    "{% block b %}x{% endblock %}{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{%set x=1%}{{x}}{%if x%}y{%endif%}",
    "{% set x = 1 -%}   {{ x }}   {%- set y = 2 %}{{ y }}",
    "{{ '{{' }}{{ '%}' }}{{ \"}}\" }}",
    "{% if (1 and\n 2) %}multi\nline{% endif %}",
    "{{ {'a': {'b': 1}}['a']['b'] }}{{ {'a':{}} }}",
    "{{ }}",
    "{% %}",
    "{{ 1 }",
    "{% if x %}{% else %}{% elif y %}{% endif %}",
    "{% set x = [] %}{% set _ = x.append(1) %}{{ x }}",
    "{% set _ = d.update({'q': 1}) %}",
    "{% macro f(x, y=[]) %}{{ x }}{{ y }}{% endmacro %}{{ f(y=1, x=2) }}{{ f(1, y=2, x=3) }}",
    "{% set f = s.upper %}{{ f() }}",
    "{% for m in [1, 2, 3] %}{{ loop.index }}{% endfor %}{{ loop is defined }}",
    "{% set x = 5 if missing else 6 %}{{ x }}",
    "{% for i in range(3) %}{{ loop }}{% endfor %}",
    "{% for i in nums %}{{ loop.nope }}{{ loop['index'] }}{% endfor %}",
    "{% call 5 %}{% endcall %}",
    "{% for i in nums -%}\n  {{ i }}\n{%- endfor %}",
]


@pytest.mark.parametrize("source", STATEMENTS)
def test_statement(source: str) -> None:
    actual = ours(source, **VARIABLES)
    if not (actual[0] == "error" and UNSUPPORTED in actual[1]):
        assert_same(source, **VARIABLES)


PIECES = [
    "\n",
    " ",
    "  ",
    "\t",
    "a",
    "\n\n",
    "{% if 1 %}",
    "{%- if 1 %}",
    "{% if 1 -%}",
    "{%+ if 1 %}",
    "{% if 1 +%}",
    "{% endif %}",
    "{%- endif -%}",
    "{{ 1 }}",
    "{{- 1 -}}",
    "{{+ 1 }}",
    "{# c #}",
    "{#- c -#}",
    "{%- raw %} {{ {%- endraw %}",
    "{% raw -%}\n x {% endraw +%}",
    "\r\n",
    "\u2028",
    "{% set x = 1 %}",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_whitespace_control(pieces: list[str]) -> None:
    depth, kept = 0, []
    for piece in pieces:  # only templates whose ifs balance are interesting
        if "endif" in piece and depth == 0:
            continue
        depth += "if 1" in piece
        depth -= "endif" in piece
        kept.append(piece)
    assert_same("".join(kept) + "{% endif %}" * depth)


@settings(max_examples=300, deadline=None)
@given(JSON_VALUES)
def test_values_print_as_python_prints_them(value: Any) -> None:
    for source in (
        "{{ v }}",
        "{{ v|tojson }}",
        "{{ v|tojson(indent=2, ensure_ascii=true) }}",
        "{{ [v]|string|upper }}",
        "{{ v|string|title }}{{ (v|string).swapcase() }}",
    ):
        assert_same(source, v=value)


@settings(max_examples=300, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-5, 12))
def test_round(value: float, digits: int) -> None:
    assert_same(
        "{{ v|round(n) }} {{ '%.3f' % v }} {{ '%g' % v }} {{ v|int }}"
        if abs(value) < 2**62
        else "{{ v|round(n) }}",
        v=value,
        n=digits,
    )
