"""Operators, filters, tests and methods of the native template engine over values of every kind."""

from __future__ import annotations

import itertools

import pytest

from support.jinja_oracle import (
    VARIABLES,
    compare_many,
    frozen_time,
)

pytestmark = pytest.mark.usefixtures(frozen_time.__name__)


OPERANDS = [
    "0",
    "1",
    "-2",
    "7",
    "2.5",
    "-0.5",
    "true",
    "none",
    "''",
    "'a'",
    "'ab'",
    "'%s'",
    "[]",
    "[1]",
    "['a', 2]",
    "(1, 2)",
    "()",
    "{}",
    "{'a': 1}",
    "missing",
    "range(3)",
    "'7'",
    "1e300",
    "namespace(a=1)",
    "(nums|map('abs'))",
]


@pytest.mark.parametrize(
    "op",
    [
        "+",
        "-",
        "*",
        "/",
        "//",
        "%",
        "**",
        "~",
        "==",
        "!=",
        "<",
        "<=",
        ">",
        ">=",
        "in",
        "not in",
        "and",
        "or",
        "is sameas",
    ],
)
def test_operators_over_all_pairs(op: str) -> None:
    pairs = [f"{{{{ {a} {op} {b} }}}}" for a, b in itertools.product(OPERANDS, OPERANDS)]
    compare_many(pairs, VARIABLES, allow_unsupported=True)


FILTERS = [
    "abs",
    "capitalize",
    "count",
    "default",
    "d('x', true)",
    "dictsort",
    "e",
    "first",
    "float",
    "int",
    "items|list",
    "join",
    "join('-')",
    "last",
    "length",
    "list",
    "lower",
    "map('upper')|list",
    "map(attribute='a')|list",
    "max",
    "min",
    "reject|list",
    "replace('a', 'b')",
    "reverse|list",
    "round",
    "round(1)",
    "safe",
    "select|list",
    "selectattr('a')|list",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "tojson(indent=2)",
    "trim",
    "unique|list",
    "upper",
    "wordcount",
    "batch(2)|list",
    "slice(2)|list",
    "center(9)",
    "indent",
    "truncate(5)",
    "format",
    "attr('upper')|string|length > 0",
    "groupby('a')|list",
    "forceescape",
    "striptags",
    "urlencode",
]


@pytest.mark.parametrize("name", FILTERS)
def test_filters_over_all_values(name: str) -> None:
    compare_many(
        [f"{{{{ ({value})|{name} }}}}" for value in [*OPERANDS, *VARIABLES]],
        VARIABLES,
        allow_unsupported=True,
    )


TESTS = [
    "defined",
    "undefined",
    "none",
    "boolean",
    "true",
    "false",
    "integer",
    "float",
    "lower",
    "upper",
    "string",
    "mapping",
    "number",
    "sequence",
    "iterable",
    "callable",
    "escaped",
    "odd",
    "even",
    "divisibleby 2",
    "eq 1",
    "ne 'a'",
    "lt 2",
    "le 2",
    "gt 2",
    "ge 2",
    "in [1, 'a']",
    "in 'abc'",
    "sameas none",
    "filter",
    "test",
]


@pytest.mark.parametrize("name", TESTS)
def test_tests_over_all_values(name: str) -> None:
    compare_many(
        [f"{{{{ ({value}) is {name} }}}}" for value in [*OPERANDS, *VARIABLES]],
        VARIABLES,
        allow_unsupported=True,
    )


METHODS = [
    "upper()",
    "lower()",
    "title()",
    "strip()",
    "split()",
    "split(',')",
    "splitlines()",
    "replace('a', 'b')",
    "startswith('a')",
    "endswith('')",
    "find('a')",
    "count('')",
    "join('ab')",
    "format(1)",
    "isdigit()",
    "isupper()",
    "items()",
    "keys()",
    "values()",
    "get('a')",
    "copy()",
    "index(1)",
    "count(1)",
    "append(1)",
    "pop()",
    "update()",
    "zfill(4)",
    "partition('a')",
    "__len__",
    "__class__",
    "nope",
    "real",
    "capitalize()",
    "swapcase()",
    "lstrip('a')",
    "istitle()",
]


@pytest.mark.parametrize("name", METHODS)
def test_methods_over_all_values(name: str) -> None:
    compare_many(
        [f"{{{{ ({value}).{name} }}}}" for value in [*OPERANDS, *VARIABLES]],
        VARIABLES,
        allow_unsupported=True,
    )
