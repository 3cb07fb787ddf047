#!/usr/bin/env python3
"""Writes the tables of cpp/text/unicode/, each of two files from a Unicode version of its own:

    python tools/make_unicode_tables.py tokenizer > cpp/text/unicode/tokenizer_tables.cc
    python tools/make_unicode_tables.py python > cpp/text/unicode/python_tables.cc

tokenizer: normal forms and word characters, from the newest Unicode there is, as the libraries
behind tokenizer.json have it: from the PyPI package unicodedata2 where that is installed, else from
Python's own database.
python: character properties and case mappings of this Python's str. Templates are promised the
results of Python's str methods, so these must not be newer.
"""

import argparse
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence

try:
    import unicodedata2 as newest
except ImportError:
    newest = unicodedata

# Surrogates are no characters, and what no version has assigned is in no table.
CODE_POINTS = [c for c in range(0x110000) if newest.category(chr(c)) not in ("Cs", "Cn")]
HANGUL_SYLLABLES = range(0xAC00, 0xD7A4)  # composed by arithmetic, in no table
# Vowels and tails of Hangul syllables, which may join the character before them.
HANGUL_JAMO = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}
# Circled and squared letters, which are Alphabetic although their category is So.
ALPHABETIC_SYMBOLS = {
    *range(0x24B6, 0x24EA),
    *range(0x1F130, 0x1F14A),
    *range(0x1F150, 0x1F16A),
    *range(0x1F170, 0x1F18A),
}
ZERO_WIDTH_JOINERS = {0x200C, 0x200D}


class Table:
    """Rows of one C++ array, and where it goes in the struct of all tables."""

    def __init__(self, name: str, kind: str, rows: Iterable[str]) -> None:
        self.name, self.kind, self.rows = name, kind, list(rows)

    def array(self) -> str:
        return "k" + "".join(part.capitalize() for part in self.name.split("_"))

    def write(self) -> None:
        print(f"constexpr {self.kind} {self.array()}[] = {{")
        line = "   "
        for row in self.rows:
            if len(line) + len(row) + 2 > 100:
                print(line)
                line = "   "
            line += f" {row},"
        print(f"{line}\n}};\n")


def row(*fields: int | str) -> str:
    return "{" + ", ".join(str(field) for field in fields) + "}"


def code(c: int) -> str:
    return f"0x{c:X}"


def ranges(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(first, last, value) of the runs of consecutive code points with the same value."""
    out: list[tuple[int, int, int]] = []
    for c, value in pairs:
        if out and out[-1][1] == c - 1 and out[-1][2] == value:
            out[-1] = (out[-1][0], c, value)
        else:
            out.append((c, c, value))
    return out


def set_table(name: str, contains: Callable[[str], bool]) -> Table:
    members = ((c, 0) for c in CODE_POINTS if contains(chr(c)))
    return Table(name, "CodePointRange", (row(code(a), code(b)) for a, b, _ in ranges(members)))


# --- for tokenizers


def decompositions(form: str) -> dict[int, tuple[int, ...]]:
    found = {}
    for c in CODE_POINTS:
        whole = newest.normalize(form, chr(c))
        if whole != chr(c) and c not in HANGUL_SYLLABLES:
            found[c] = tuple(ord(part) for part in whole)
    return found


def primary_composites(canonical: Iterable[int]) -> list[tuple[int, int, int]]:
    """(first, second, composed), sorted."""
    found = []
    for c in canonical:
        fields = newest.decomposition(chr(c)).split()
        if len(fields) == 2 and newest.normalize("NFC", chr(c)) == chr(c):
            found.append((int(fields[0], 16), int(fields[1], 16), c))
    return sorted(found)


def is_word(c: str) -> bool:
    category = newest.category(c)
    return (
        category[0] in "LM"
        or category in ("Nd", "Nl", "Pc")
        or ord(c) in ALPHABETIC_SYMBOLS
        or ord(c) in ZERO_WIDTH_JOINERS
    )


def tokenizer_tables() -> list[Table]:
    canonical = decompositions("NFD")
    compatibility = {c: d for c, d in decompositions("NFKD").items() if d != canonical.get(c)}
    compositions = primary_composites(canonical)
    joins_before = {second for _, second, _ in compositions} | HANGUL_JAMO

    pool: list[int] = []
    offsets: dict[tuple[int, ...], int] = {}

    def decomposition_rows(listed: dict[int, tuple[int, ...]]) -> list[str]:
        rows = []
        for c, parts in listed.items():
            if parts not in offsets:
                offsets[parts] = len(pool)
                pool.extend(parts)
            rows.append(row(code(c), offsets[parts], len(parts)))
        return rows

    def unstable(form: str) -> Callable[[str], bool]:
        composes = form in ("NFC", "NFKC")
        return lambda c: (
            (composes and ord(c) in joins_before)
            or newest.combining(c) != 0
            or newest.normalize(form, c) != c
        )

    classes = ((c, newest.combining(chr(c))) for c in CODE_POINTS)
    class_ranges = ranges((c, value) for c, value in classes if value)
    return [
        Table("canonical", "Decomposition", decomposition_rows(canonical)),
        Table("compatibility", "Decomposition", decomposition_rows(compatibility)),
        Table("decomposition_pool", "char32_t", (code(c) for c in pool)),
        Table("compositions", "Composition", (row(*map(code, entry)) for entry in compositions)),
        Table(
            "combining_classes",
            "CombiningClassRange",
            (row(code(a), code(b), value) for a, b, value in class_ranges),
        ),
        *(set_table("unstable_" + form.lower(), unstable(form))
          for form in ("NFC", "NFD", "NFKC", "NFKD")),
        set_table("word", is_word),
    ]  # fmt: skip


# --- for templates


def is_cased(c: str) -> bool:
    """A sigma behind a cased letter is lowered to the form that ends a word."""
    return (" " + c + "\u03a3").lower()[-1] == "\u03c2"


def is_case_ignorable(c: str) -> bool:
    """The same, through a character that the rule skips."""
    return ("A" + c + "\u03a3").lower()[-1] == "\u03c2" and not is_cased(c)


def case_runs(convert: Callable[[str], str]) -> list[tuple[int, int, int, int]]:
    """(first, last, stride, delta) runs of the characters that map to one other character."""
    out: list[tuple[int, int, int, int]] = []
    for c in CODE_POINTS:
        mapped = convert(chr(c))
        if len(mapped) != 1 or ord(mapped) == c:
            continue
        if out:
            first, last, stride, delta = out[-1]
            step = c - last
            if ord(mapped) - c == delta and step in (1, 2) and (first == last or step == stride):
                out[-1] = (first, c, step, delta)
                continue
        out.append((c, c, 1, ord(mapped) - c))
    return out


def case_expansions(convert: Callable[[str], str]) -> list[tuple[int, str]]:
    """(code point, mapped) of the characters that map to several."""
    mapped = ((c, convert(chr(c))) for c in CODE_POINTS)
    return [(c, to) for c, to in mapped if len(to) > 1]


def case_tables(name: str, convert: Callable[[str], str]) -> list[Table]:
    most = 3  # characters of an expansion, as in tables.h
    return [
        Table(
            name + "_runs",
            "CaseRun",
            (row(code(a), code(b), stride, delta) for a, b, stride, delta in case_runs(convert)),
        ),
        Table(
            name + "_expansions",
            "CaseExpansion",
            (
                row(code(c), row(*(code(ord(part)) for part in to.ljust(most, "\0"))))
                for c, to in case_expansions(convert)
            ),
        ),
    ]


def python_tables() -> list[Table]:
    return [
        set_table("alpha", str.isalpha),
        set_table("decimal", str.isdecimal),
        set_table("digit", str.isdigit),
        set_table("numeric", str.isnumeric),
        set_table("upper", str.isupper),
        set_table("lower", str.islower),
        set_table("title", lambda c: unicodedata.category(c) == "Lt"),
        set_table("printable", str.isprintable),
        set_table("cased", is_cased),
        set_table("case_ignorable", is_case_ignorable),
        *case_tables("to_upper", str.upper),
        *case_tables("to_lower", str.lower),
        *case_tables("to_title", str.title),
    ]


def write_file(which: str, version: str, origin: str, tables: Sequence[Table]) -> None:
    print(f"// Generated by tools/make_unicode_tables.py {which}; do not edit.")
    print(f"// Unicode {version}, {origin}.")
    print('#include "text/unicode/tables.h"\n')
    print("// clang-format off")
    print("namespace mustafar::unicode {\n\nnamespace {\n")
    for table in tables:
        table.write()
    print("}  // namespace\n")
    name = which.capitalize() + "Tables"
    print(f"const {name} k{name} = {{")
    for table in tables:
        print(f"    .{table.name} = {table.array()},")
    print("};\n\n}  // namespace mustafar::unicode")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes one of the tables to standard output.")
    parser.add_argument("which", choices=["tokenizer", "python"])
    which = parser.parse_args().which
    if which == "tokenizer":
        origin = "the newest there was"
        write_file(which, newest.unidata_version, origin, tokenizer_tables())
    else:
        version = ".".join(map(str, sys.version_info[:2]))
        origin = f"as in the str of Python {version}"
        write_file(which, unicodedata.unidata_version, origin, python_tables())


if __name__ == "__main__":
    main()
