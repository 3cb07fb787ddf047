"""The tokenizer against the PyPI tokenizers package, on texts of every kind."""

from __future__ import annotations

import json
import threading
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mustafar
from support.paths import ROOT, SHARED

tokenizers = pytest.importorskip("tokenizers")
pre = pytest.importorskip("tokenizers.pre_tokenizers")
norm = pytest.importorskip("tokenizers.normalizers")
dec = pytest.importorskip("tokenizers.decoders")


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4 = (
    r"(?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ADDED = [
    tokenizers.AddedToken("foo", single_word=True),
    tokenizers.AddedToken("fo"),
    tokenizers.AddedToken("  bar", normalized=False),
    tokenizers.AddedToken("<x>", lstrip=True, normalized=False),
    tokenizers.AddedToken("<y>", rstrip=True),
    tokenizers.AddedToken(" the", lstrip=True, rstrip=True, normalized=False),
]
SPECIAL = [
    tokenizers.AddedToken("<|s|>", lstrip=True, rstrip=True),
    tokenizers.AddedToken("<|im_start|>", normalized=False),
    tokenizers.AddedToken("<|im"),
]


def byte_level(**kwargs: Any) -> Any:
    return pre.ByteLevel(add_prefix_space=False, **kwargs)


def split(pattern: str) -> Any:
    return pre.Sequence(
        [pre.Split(tokenizers.Regex(pattern), "isolated"), byte_level(use_regex=False)]
    )


def pieces(behavior: str, invert: bool) -> Any:
    return pre.Sequence(
        [
            pre.Split(tokenizers.Regex(r"[aeiou\s]"), behavior, invert=invert),
            pre.Split("th", behavior, invert=invert),
            pre.Split(tokenizers.Regex("x*"), behavior),
            byte_level(use_regex=False),
        ]
    )


def sentencepiece_decoder() -> Any:
    return dec.Sequence(
        [dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)]
    )


# name: (pre-tokenizer, normalizer, decoder, added tokens, model options)
MADE: dict[str, tuple[Any, Any, Any, bool, dict[str, Any]]] = {
    "gpt2": (byte_level(), None, None, False, {}),
    "gpt2_prefix": (pre.ByteLevel(add_prefix_space=True), None, None, True, {}),
    "gpt2_added": (byte_level(), None, None, True, {}),
    "qwen2": (split(QWEN2), norm.NFC(), None, True, {}),
    "gpt4": (split(GPT4), norm.NFD(), None, False, {}),
    "gpt4o": (split(GPT4O), None, None, False, {}),
    "lower": (
        pre.Sequence([pre.Digits(individual_digits=True), pre.Punctuation(), byte_level()]),
        norm.Sequence([norm.NFD(), norm.Lowercase(), norm.Strip()]),
        None,
        True,
        {},
    ),
    "digits": (
        pre.Sequence([pre.Digits(), pre.Punctuation("contiguous"), byte_level()]),
        None,
        None,
        False,
        {},
    ),
    "words": (
        pre.Sequence([pre.Whitespace(), split(r"\b\w\w\b|\B\W|\h+")]),
        norm.Replace(tokenizers.Regex(r"\d+"), "7"),
        None,
        False,
        {},
    ),
    "metaspace_first": (
        pre.Metaspace(prepend_scheme="first"),
        None,
        dec.Metaspace(prepend_scheme="first"),
        True,
        {"unk_token": "<unk>", "fuse_unk": True},
    ),
    "metaspace_always": (
        pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace(prepend_scheme="always")]),
        None,
        dec.Metaspace(prepend_scheme="always"),
        False,
        {"unk_token": "<unk>"},
    ),
    "metaspace_never": (
        pre.Metaspace(prepend_scheme="never", split=False),
        None,
        dec.Metaspace(prepend_scheme="never"),
        False,
        {"unk_token": "<unk>", "fuse_unk": True},
    ),
    "sentencepiece": (
        None,
        norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")]),
        sentencepiece_decoder(),
        True,
        {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
    ),
}
for _behavior in (
    "removed",
    "isolated",
    "merged_with_previous",
    "merged_with_next",
    "contiguous",
):
    MADE[f"split_{_behavior}"] = (pieces(_behavior, False), None, None, False, {})
    MADE[f"split_{_behavior}_inverted"] = (
        pieces(_behavior, True),
        None,
        None,
        False,
        {},
    )

FILES = {
    "llama-2": SHARED / "tokenizers" / "llama-2",
    "llama-3": SHARED / "tokenizers" / "llama-3",
    "story": SHARED / "models" / "story",
    "stories260K": SHARED / "models" / "stories260K",
}

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Characters that both sides' Unicode versions know, but not the three whose composition is newer than
# the oracle's tables.
NEW = "\U00011930\U00011935\U00011938"
assigned = st.characters(exclude_categories=("Cs", "Cn"), exclude_characters=NEW)
awkward = st.sampled_from(
    [*" \n\t\r\x0b\x85\xa0\u2028\u3000\u180e\u200b\u200d'’sStTdDéÉ\u0301\u0323ıİßſKΣςﬁﾊﾞ가ᄀ\u1161"]
    + [*"\u11a8①Ⅷ٣½²😀\ufeff\ufffd\0▁_-123"]
    + [
        "foo",
        "fo",
        "  bar",
        "<x>",
        "<y>",
        "<|s|>",
        "<|im_start|>",
        "<|im",
        "<s>",
        "</s>",
        "<unk>",
    ]
    + [
        "<|begin_of_text|>",
        "<|end_story|>",
        "<0x0A>",
        "'s",
        "'LL",
        "\n\n",
        "    ",
        " the ",
        "th",
    ]
    + [
        "123456",
        "x",
        "def f(x):\n\treturn x\n",
        "http://a.b/c?d=1",
        "你好",
        "안녕",
        "مرحبا",
    ]
    + [
        "👨‍👩‍👧",
        "हिन्दी",
        "Hello",
        " world",
        "getValue",
        "snake_case",
        "ab" * 30,
        "e\u0301" * 20,
    ]
)
texts = st.lists(st.one_of(awkward, assigned, st.text("abcdefgh ", max_size=12)), max_size=30).map(
    "".join
)


def make(name: str, folder: Path) -> Path:
    """Trains a small tokenizer with the PyPI package and saves it."""
    pre_tokenizer, normalizer, decoder, added, options = MADE[name]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoder or dec.ByteLevel()
    special = ["<unk>"] if "unk_token" in options else []
    if options.get("byte_fallback"):
        special += [f"<0x{b:02X}>" for b in range(256)]
    corpus = [Path(__file__).read_text(), (ROOT / "CMakeLists.txt").read_text()]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200,
        show_progress=False,
        initial_alphabet=[] if decoder else pre.ByteLevel.alphabet(),
        special_tokens=special,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if added:
        tokenizer.add_tokens(ADDED)
        tokenizer.add_special_tokens(SPECIAL)
    path = folder / f"{name}.json"
    tokenizer.save(str(path))
    return path


def open_both(name: str, folder: Path) -> tuple[mustafar.Tokenizer, Any]:
    """The same tokenizer.json here and in the oracle."""
    if name in FILES:
        path = FILES[name] / "tokenizer.json"
        if not path.exists():
            pytest.skip(f"no tokenizer at {path}")
    else:
        path = make(name, folder)
    return mustafar.Tokenizer(path), tokenizers.Tokenizer.from_file(str(path))


@pytest.fixture(scope="module", params=[*FILES, *MADE])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each tokenizer in turn, here and in the oracle."""
    return open_both(request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> mustafar.Tokenizer:
    """A byte-level tokenizer with added tokens."""
    return mustafar.Tokenizer(make("gpt2_added", tmp_path_factory.mktemp("tokenizer")))


@SETTINGS
@given(text=texts, parse_special=st.booleans())
def test_encode_and_decode_match_the_oracle(pair: Any, text: str, parse_special: bool) -> None:
    ours, oracle = pair
    oracle.encode_special_tokens = not parse_special
    expected = oracle.encode(text).ids
    ids = ours.encode(text, parse_special=parse_special)
    assert ids == expected
    # The oracle decodes a token that is matched in normalized text as normalized, and so does not
    # skip a special one; here every added token decodes as it is spelled.
    if not any(_is_normalized_added(oracle, i) for i in ids):
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids, skip_special=True) == oracle.decode(ids)
    stream = ours.stream(skip_special=False)
    assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)


@SETTINGS
@given(data=st.data())
def test_decode_of_any_ids_matches_the_oracle(pair: Any, data: st.DataObject) -> None:
    ours, oracle = pair
    valid = st.integers(0, ours.vocab_size + 20)  # some that no token has
    bytes_first = st.integers(0, min(300, ours.vocab_size - 1))
    ids = data.draw(st.lists(st.one_of(valid, bytes_first), max_size=20))
    ids = [i for i in ids if not _is_normalized_added(oracle, i)]
    for skip in (False, True):
        text = ours.decode(ids, skip_special=skip)
        assert text == oracle.decode(ids, skip_special_tokens=skip)
        stream = ours.stream(skip_special=skip)
        assert "".join(map(stream.push, ids)) + stream.flush() == text


def _is_normalized_added(oracle: Any, token_id: int) -> bool:
    token = oracle.get_added_tokens_decoder().get(token_id) if token_id < 3000 else None
    return token is not None and bool(token.normalized)


@pytest.mark.parametrize("name", ["llama-3", "qwen2", "gpt4o", "lower", "words"])
def test_every_assigned_character(name: str, tmp_path: Path) -> None:
    ours, oracle = open_both(name, tmp_path)
    oracle.encode_special_tokens = True
    points = (chr(c) for c in range(0x110000))
    text = "".join(
        c for c in points if unicodedata.category(c) not in ("Cs", "Cn") and c not in NEW
    )
    for start in range(0, len(text), 4096):
        part = "|".join(text[start : start + 4096])
        assert ours.encode(part) == oracle.encode(part).ids


def test_vocabulary_matches_the_oracle(pair: Any) -> None:
    ours, oracle = pair
    assert ours.vocab_size == oracle.get_vocab_size(with_added_tokens=True)
    added = oracle.get_added_tokens_decoder()
    for token_id in [*range(0, ours.vocab_size, 101), *added]:
        spelled = added[token_id].content if token_id in added else oracle.id_to_token(token_id)
        assert ours.id_to_token(token_id) == spelled
        assert ours.token_to_id(spelled) == token_id
        assert ours.is_special(token_id) == (token_id in added and added[token_id].special)
    assert ours.token_to_id("no such token") is None


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@given(text=st.text(assigned, max_size=20))
@SETTINGS
def test_normal_forms_match_unicodedata(form: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if not path.exists():
        vocab = {f"<0x{b:02X}>": b for b in range(256)}
        model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True}
        path.write_text(json.dumps({"model": model, "normalizer": {"type": form}}))
    ids = mustafar.Tokenizer(path).encode(text)
    assert bytes(ids).decode() == unicodedata.normalize(form, text)


def test_special_tokens_in_text_are_text_unless_asked(
    small: mustafar.Tokenizer,
) -> None:
    special = small.token_to_id("<|im_start|>")
    text = "a<|im_start|>b"
    assert special not in small.encode(text)
    assert special in small.encode(text, parse_special=True)
    assert small.decode(small.encode(text)) == text
    assert small.decode(small.encode(text, parse_special=True), skip_special=True) == "ab"


def test_ids_of_every_kind(small: mustafar.Tokenizer) -> None:
    ids = small.encode("Hello wide world")
    text = small.decode(ids)
    for dtype in (np.int32, np.int64, np.uint16):
        assert small.decode(np.array(ids, dtype)) == text
    assert small.decode(np.repeat(np.array(ids), 2)[::2]) == text
    assert small.decode(tuple(ids)) == text
    assert small.decode([]) == ""
    for bad in ([1.5], "12", b"12", [[1]], 3, None, ["a"]):
        with pytest.raises(TypeError):
            small.decode(bad)
    for token_id in (-1, small.vocab_size, 2**31 - 1):
        with pytest.raises(mustafar.TokenizerError, match=str(token_id)):
            small.id_to_token(token_id)
    with pytest.raises(mustafar.TokenizerError, match="-1"):
        small.decode([-1])
    with pytest.raises(mustafar.TokenizerError, match="-1"):
        small.stream().push(-1)
    with pytest.raises(ValueError):
        small.decode([2**40])


def test_text_that_can_not_be_encoded(small: mustafar.Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        small.encode("a\ud800b")
    with pytest.raises(TypeError):
        small.encode(b"bytes")
    assert small.decode(small.encode("nul\0nul")) == "nul\0nul"


def test_files_that_can_not_be_used(tmp_path: Path) -> None:
    with pytest.raises(mustafar.TokenizerError, match="no such file"):
        mustafar.Tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(mustafar.TokenizerError, match="Unigram"):
        mustafar.Tokenizer(tmp_path)
    with pytest.raises(TypeError):
        mustafar.Tokenizer(3)


def test_stream_outlives_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = mustafar.Tokenizer(make("gpt2", tmp_path))
    ids = tokenizer.encode("emoji 😀!")
    stream = tokenizer.stream()
    del tokenizer
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == "emoji 😀!"
    assert all(piece == piece.encode().decode() for piece in pieces)


def test_encode_in_threads(small: mustafar.Tokenizer) -> None:
    text = Path(__file__).read_text() * 4
    expected = small.encode(text)
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(small.encode(text))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4
