"""Writes cpp/text/jinja/unicode_data.cc: character properties and case mappings as Python has them.

The template engine promises the results of Python's str methods, so its tables come from a Python
interpreter. Run: python tools/make_jinja_unicode_data.py > cpp/text/jinja/unicode_data.cc
"""

import sys
import unicodedata
from collections.abc import Callable, Iterable

CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def ranges(keep: Callable[[str], bool]) -> list[tuple[int, int]]:
    out: list[list[int]] = []
    for code in CODE_POINTS:
        if keep(chr(code)):
            if out and out[-1][1] == code - 1:
                out[-1][1] = code
            else:
                out.append([code, code])
    return [(first, last) for first, last in out]


def is_cased(c: str) -> bool:
    return (" " + c + "\u03a3").lower()[-1] == "\u03c2"


def is_ignorable(c: str) -> bool:
    return ("A" + c + "\u03a3").lower()[-1] == "\u03c2" and not is_cased(c)


def simple_runs(convert: Callable[[str], str]) -> list[tuple[int, int, int, int]]:
    """(first, last, stride, delta) runs of the characters that map to one other character."""
    pairs = [(c, ord(convert(chr(c)))) for c in CODE_POINTS if len(convert(chr(c))) == 1]
    out: list[list[int]] = []
    for code, mapped in ((c, m) for c, m in pairs if c != m):
        if out:
            first, last, stride, delta = out[-1]
            step = code - last
            if mapped - code == delta and step in (1, 2) and (first == last or step == stride):
                out[-1] = [first, code, step, delta]
                continue
        out.append([code, code, 1, mapped - code])
    return [(a, b, c, d) for a, b, c, d in out]


def special(convert: Callable[[str], str]) -> list[tuple[int, ...]]:
    out = []
    for code in CODE_POINTS:
        mapped = convert(chr(code))
        if len(mapped) > 1:
            out.append((code, *[ord(c) for c in mapped], *[0] * (3 - len(mapped))))
    return out


def emit(kind: str, name: str, rows: Iterable[tuple[int, ...]]) -> None:
    print(f"const {kind} {name}[] = {{")
    line = "   "
    count = 0
    for row in rows:
        cell = " {" + ",".join(str(v) if v < 0 else f"{v:#x}" for v in row) + "},"
        if len(line) + len(cell) > 100:
            print(line)
            line = "   "
        line += cell
        count += 1
    print(line)
    print("};")
    print(f"const size_t {name}Count = {count};\n")


def main() -> None:
    print("// Written by tools/make_jinja_unicode_data.py; do not edit.")
    print(f"// Unicode {unicodedata.unidata_version}, Python {sys.version.split()[0]}.")
    print('#include "text/jinja/unicode_data.h"\n\n// clang-format off\n')
    print("namespace mustafar::jinja {\n")
    emit("CodeRange", "kAlpha", ranges(str.isalpha))
    emit("CodeRange", "kDecimal", ranges(str.isdecimal))
    emit("CodeRange", "kDigit", ranges(str.isdigit))
    emit("CodeRange", "kNumeric", ranges(str.isnumeric))
    emit("CodeRange", "kUpper", ranges(str.isupper))
    emit("CodeRange", "kLower", ranges(str.islower))
    emit("CodeRange", "kTitle", ranges(lambda c: unicodedata.category(c) == "Lt"))
    emit("CodeRange", "kPrintable", ranges(str.isprintable))
    emit("CodeRange", "kCased", ranges(is_cased))
    emit("CodeRange", "kIgnorable", ranges(is_ignorable))
    for name, convert in (("Upper", str.upper), ("Lower", str.lower), ("Title", str.title)):
        emit("CaseRun", f"kTo{name}", simple_runs(convert))
        emit("CaseSpecial", f"kTo{name}Special", special(convert))
    print("}  // namespace mustafar::jinja")


if __name__ == "__main__":
    main()
