"""The safetensors reader accepts and refuses what the PyPI package does, but for STRICTER."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mustafar
from mustafar import _core

safetensors = pytest.importorskip("safetensors")

# Bits of one value.
DTYPES = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def file_bytes(
    header: str | bytes | dict[str, Any], data: bytes = b"", n: int | None = None
) -> bytes:
    """A file of a header, with its length or another one, and the bytes after it."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header) if n is None else n) + header + data


def tensor(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), n: int = 4) -> bytes:
    """A file with one tensor and n bytes of data."""
    return file_bytes({"a": tensor(dtype, shape, offsets)}, bytes(n))


def raw(fields: str) -> bytes:
    """A file with one tensor whose fields are given as text."""
    return file_bytes('{"a":{' + fields + "}}", b"1234")


def extra(value: str) -> bytes:
    """A good file with an unknown field."""
    return raw('"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + value)


def named(name: str | bytes) -> bytes:
    """A good file with a tensor of the name, given as in JSON."""
    text = name if isinstance(name, bytes) else name.encode("utf-8", "surrogatepass")
    return file_bytes(b'{"' + text + b'":' + json.dumps(tensor()).encode() + b"}", b"1234")


GOOD = json.dumps({"a": tensor()})

CASES = {
    "good": file_bytes(GOOD, b"1234"),
    "no tensors": file_bytes({}),
    "no tensors but data": file_bytes({}, b"1"),
    "trailing space": file_bytes(GOOD + " \n\t\r ", b"1234"),
    "trailing NUL": file_bytes(GOOD + "\0", b"1234"),
    "trailing form feed": file_bytes(GOOD + "\f", b"1234"),
    "trailing JSON": file_bytes(GOOD + "{}", b"1234"),
    "byte order mark": file_bytes("\ufeff" + GOOD, b"1234"),
    "list": file_bytes("[]"),
    "null": file_bytes("null"),
    "number": file_bytes("3"),
    "duplicate dtype": raw('"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]'),
    "duplicate shape": raw('"shape":[1],"dtype":"F32","shape":[1],"data_offsets":[0,4]'),
    "duplicate metadata": file_bytes('{"__metadata__":{},"__metadata__":{}}'),
    "duplicate metadata, null": file_bytes('{"__metadata__":null,"__metadata__":null}'),
    "duplicate metadata key": file_bytes('{"__metadata__":{"a":"b","a":"c"}}'),
    "metadata null": file_bytes({"__metadata__": None}),
    "metadata number": file_bytes({"__metadata__": {"a": 1}}),
    "metadata value null": file_bytes({"__metadata__": {"a": None}}),
    "metadata list": file_bytes({"__metadata__": []}),
    "metadata nested": file_bytes({"__metadata__": {"a": {"b": "c"}}}),
    "metadata like a tensor": file_bytes({"__metadata__": tensor()}, b"1234"),
    "metadata escaped": file_bytes('{"\\u005f_metadata__":{"a":"b"}}'),
    "unknown field": extra('[1,{"y":null}]'),
    "unknown field twice": extra('1,"x":"y"'),
    "unknown field, huge number": extra("1e400"),
    "unknown field, huge integer": extra("123456789012345678901234567890"),
    "unknown field, lone surrogate": extra('"\\ud800"'),
    "unknown field, NaN": extra("NaN"),
    "nested at the limit": extra("[" * 125 + "]" * 125),
    "nested beyond the limit": extra("[" * 126 + "]" * 126),
    "nested far beyond": extra("[" * 100_000 + "]" * 100_000),
    "float dim": one(shape=[1.0]),
    "exponent dim": raw('"dtype":"F32","shape":[1e0],"data_offsets":[0,4]'),
    "minus zero": raw('"dtype":"F32","shape":[1],"data_offsets":[-0,4]'),
    "leading zero": raw('"dtype":"F32","shape":[01],"data_offsets":[0,4]'),
    "negative dim": one(shape=[-1]),
    "bool dim": one(shape=[True]),
    "dtype number": one(dtype=3),
    "dtype lower": one(dtype="f32"),
    "dtype unknown": one(dtype="F128"),
    "dtype escaped": raw('"dtype":"\\u00463\\u0032","shape":[1],"data_offsets":[0,4]'),
    "field escaped": raw('"d\\u0074ype":"F32","shape":[1],"data_offsets":[0,4]'),
    "three offsets": one(offsets=[0, 4, 4]),
    "one offset": one(offsets=[4]),
    "offsets null": one(offsets=None),
    "offsets object": one(offsets={"0": 0, "1": 4}),
    "offset 2^64": one(offsets=[0, 2**64]),
    "offset 2^64 - 1": one(offsets=[0, 2**64 - 1]),
    "end before begin": one(offsets=[4, 0]),
    "shape null": one(shape=None),
    "shape missing": raw('"dtype":"F32","data_offsets":[0,4]'),
    "tensor null": file_bytes({"a": None}),
    "tensor number": file_bytes({"a": 1}),
    "scalar": one(shape=[]),
    "no values": one(shape=[0, 3], offsets=[0, 0], n=0),
    "zero before a huge dim": one(shape=[0, 2**63, 4], offsets=[0, 0], n=0),
    "zero after a huge dim": one(shape=[2**64 - 1, 0], offsets=[0, 0], n=0),
    "product overflow": one(shape=[2**63, 4, 0], offsets=[0, 0], n=0),
    "bits overflow": one(shape=[2**60], offsets=[0, 0], n=0),
    "rank 64": one(shape=[1] * 64),
    "half a byte": one("F4", [7]),
    "hole": file_bytes({"a": tensor(), "b": tensor(offsets=[5, 9])}, b"123456789"),
    "overlap": file_bytes({"a": tensor(), "b": tensor(offsets=[2, 6])}, b"123456"),
    "same bytes": file_bytes({"a": tensor(), "b": tensor()}, b"1234"),
    "first not at 0": one(offsets=[4, 8], n=8),
    "empty between": file_bytes(
        {"z": tensor(shape=[0], offsets=[4, 4]), "a": tensor(), "b": tensor(offsets=[4, 8])},
        b"12345678",
    ),
    "one byte short": file_bytes(GOOD, b"123"),
    "one byte extra": file_bytes(GOOD, b"12345"),
    "empty name": named(""),
    "DEL in a name": named("a\x7f"),
    "NUL in a name": named("a\\u0000"),
    "control in a name": named("a\n"),
    "noncharacter in a name": named("\ufffe"),
    "surrogate pair": named("\\ud83d\\ude00"),
    "lone high surrogate": named("\\ud800"),
    "lone low surrogate": named("\\udc00"),
    "encoded surrogate": named("\ud800"),
    "not UTF-8": named(b"\xff"),
    "overlong UTF-8": named(b"\xc0\xaf"),
    "comment": file_bytes("{/* */}"),
    "trailing comma": file_bytes('{"a":' + json.dumps(tensor()) + ",}", b"1234"),
    "single quotes": file_bytes("{'a':1}"),
    "no bytes": b"",
    "seven bytes": b"1234567",
    "header length 0": struct.pack("<Q", 0),
    "header beyond the file": file_bytes("{}", n=3),
    "header over the cap": file_bytes("{}", n=100_000_001),
    "header length 2^64 - 1": file_bytes("{}", n=2**64 - 1),
    "git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
}

# The reference accepts these and we refuse them.
STRICTER = {
    "duplicate name": file_bytes('{"a":%s,"a":%s}' % ((json.dumps(tensor()),) * 2), b"1234"),
    "leading space (the format asks for a brace)": file_bytes(" " + GOOD, b"1234"),
    "a list for a tensor": file_bytes({"a": ["F32", [1], [0, 4]]}, b"1234"),
    "an object for a dtype": one(dtype={"F32": None}),
    "rank 65": one(shape=[1] * 65),
    "rank 10000": one(shape=[1] * 10_000),
}


def theirs(content: bytes) -> dict[str, Any] | None:
    """Name -> (dtype, shape, bytes), or None where the reference refuses."""
    try:
        return {
            name: (info["dtype"], list(info["shape"]), bytes(info["data"]))
            for name, info in safetensors.deserialize(content)
        }
    except safetensors.SafetensorError:
        return None


def ours(path: Path, content: bytes) -> dict[str, Any] | None:
    """The same of our reader."""
    path.write_bytes(content)
    try:
        header = _core._safetensors_header(path)
    except mustafar.ModelError as error:
        assert str(path) in str(error)
        return None
    return {
        name: (dtype, list(shape), content[begin:end])
        for name, (dtype, shape, begin, end) in header.items()
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "x.safetensors"


@pytest.mark.parametrize("name", CASES)
def test_agrees_on_listed_files(name: str, path: Path) -> None:
    assert ours(path, CASES[name]) == theirs(CASES[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_on_every_dtype(dtype: str, path: Path) -> None:
    content = one(dtype, [8], [0, DTYPES[dtype]], DTYPES[dtype])
    read = ours(path, content)
    assert read is not None
    assert read == theirs(content)


@pytest.mark.parametrize("name", STRICTER)
def test_stricter_by_intent(name: str, path: Path) -> None:
    assert theirs(STRICTER[name]) is not None
    assert ours(path, STRICTER[name]) is None


@st.composite
def valid_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A header and its data."""
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        texts = st.text(max_size=5)
        header["__metadata__"] = draw(st.dictionaries(texts, texts, max_size=2))
    at = 0
    for name in draw(st.lists(st.text(max_size=6), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if DTYPES[dtype] < 8:
            shape.append(8)
        n_values = 1
        for dim in shape:
            n_values *= dim
        n_bytes = n_values * DTYPES[dtype] // 8
        header[name] = tensor(dtype, shape, [at, at + n_bytes])
        at += n_bytes
    items = draw(st.permutations(list(header.items())))
    text = json.dumps(dict(items), ensure_ascii=draw(st.booleans()))
    return text + " " * draw(st.integers(0, 8)), draw(st.binary(min_size=at, max_size=at))


def is_stricter_case(content: bytes) -> bool:
    """Whether a file that the reference accepts is of a kind that STRICTER lists."""
    header = content[8 : 8 + struct.unpack("<Q", content[:8])[0]]
    if not header.startswith(b"{"):
        return True
    duplicates = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            duplicates.append(pairs)
        return dict(pairs)

    top = json.loads(header, object_pairs_hook=look)
    return bool(duplicates) or any(
        not isinstance(entry, dict)
        or not isinstance(entry["dtype"], str)
        or len(entry["shape"]) > 64
        for name, entry in top.items()
        if name != "__metadata__"
    )


MANY = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
INSERTIONS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"1", b"9", b"-", b".", b"e", b" ", b"\\",
    b"\0", b"\x80", b"\xff", b"null", b"F32", b'"a":', b"__metadata__", b"18446744073709551615",
    b'"shape":[1],',
]  # fmt: skip


@MANY
@given(made=valid_files())
def test_agrees_on_valid_files(made: tuple[str, bytes], path: Path) -> None:
    content = file_bytes(made[0], made[1])
    read = theirs(content)
    assert read is not None
    assert ours(path, content) == read


@MANY
@given(
    made=valid_files(),
    edits=st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from(INSERTIONS)),
        min_size=1,
        max_size=3,
    ),
    longer=st.sampled_from([0, 0, 0, 0, 1, -1, 7, -8]),
)
def test_agrees_on_mutated_files(
    made: tuple[str, bytes], edits: list[tuple[int, int, bytes]], longer: int, path: Path
) -> None:
    header = made[0].encode()
    for where, removed, inserted in edits:
        at = where % (len(header) + 1)
        header = header[:at] + inserted + header[at + removed :]
    content = file_bytes(header, made[1], max(0, len(header) + longer))
    mine, reference = ours(path, content), theirs(content)
    if mine is None and reference is not None and is_stricter_case(content):
        return
    assert mine == reference


@MANY
@given(content=st.binary(max_size=64))
def test_agrees_on_noise(content: bytes, path: Path) -> None:
    assert ours(path, content) == theirs(content)


def test_names_a_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(mustafar.ModelError, match=r"no\\xffthing: cannot be opened") as caught:
        _core._safetensors_header(os.fsdecode(os.fsencode(tmp_path) + b"/no\xffthing"))
    assert isinstance(caught.value, mustafar.Error)
    assert isinstance(caught.value, RuntimeError)
