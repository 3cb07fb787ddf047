"""Prompts of given lengths, cut from a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .. import _core
from .http import Address, HttpError, ask_json
from .traffic import TEXTS, Lengths

_MOST_TEXT = 1 << 19  # characters of a text that are used
_MOST_CORRECTIONS = 8


class Tokenizer(Protocol):
    """What knows the tokens of a server's prompts."""

    async def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with those that the server puts before it."""

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""


class FolderTokenizer:
    """A model folder's own."""

    def __init__(self, folder: Path) -> None:
        self._native = _core.Tokenizer(folder)

    async def encode(self, text: str) -> list[int]:
        """Ids, BOS and the like among them."""
        return self._native.encode(text)

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without BOS and the like."""
        return self._native.decode(ids, skip_special=True)


@dataclass(frozen=True)
class _Dialect:
    """How a kind of server tokenizes over HTTP: paths, and fields of requests and answers."""

    encode: str
    text: str
    decode: str
    decoded: str
    more: tuple[tuple[str, bool], ...] = ()


_DIALECTS = (  # of this server and vLLM's, of llama-server, of llama-cpp-python
    _Dialect("/tokenize", "prompt", "/detokenize", "prompt"),
    _Dialect("/tokenize", "content", "/detokenize", "content", (("add_special", True),)),
    _Dialect("/extras/tokenize", "input", "/extras/detokenize", "text"),
)


class ServerTokenizer:
    """That of a server; make it with :meth:`find`."""

    def __init__(self, address: Address, dialect: _Dialect) -> None:
        self._address = address
        self._dialect = dialect

    @classmethod
    async def find(cls, address: Address) -> ServerTokenizer | None:
        """The server's tokenizer, or None where it offers none that is known."""
        for dialect in _DIALECTS:
            tokenizer = cls(address, dialect)
            try:
                if await tokenizer.decode(await tokenizer.encode("some words")):
                    return tokenizer
            except HttpError:
                pass
        return None

    async def encode(self, text: str) -> list[int]:
        """Ids, with those that the server puts before a prompt."""
        body = {self._dialect.text: text, **dict(self._dialect.more)}
        found = await self._ask(self._dialect.encode, body, "tokens")
        if not isinstance(found, list):
            raise HttpError(f"{self._dialect.encode} answers without tokens")
        return found

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        body = {"tokens": list(ids)}
        found = await self._ask(self._dialect.decode, body, self._dialect.decoded)
        if not isinstance(found, str):
            raise HttpError(f"{self._dialect.decode} answers without {self._dialect.decoded}")
        return found

    async def _ask(self, path: str, body: Mapping[str, Any], name: str) -> object:
        found = await ask_json(self._address, "POST", path, body)
        return found.get(name) if isinstance(found, dict) else None


@dataclass(frozen=True)
class Prompt:
    """What is sent. tokens: as the tokenizer counts them; 0: nobody did."""

    text: str
    tokens: int
    output_tokens: int


def usual_text() -> str:
    """Python's reference, which comes with Python. Raises ValueError where it does not."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python has no text to make prompts of: --text FILE") from None
    return "\n".join(str(topics[name]) for name in sorted(topics))


class PromptMaker:
    """Cuts prompts from a text; make it with :meth:`of`.

    Args:
        tokenizer: Knows their lengths.
        ids: Of the text, without those that are put before a prompt.
        n_before: How many these are.
        shared: Tokens at the beginning that all prompts have in common.
        seed: Of the places where they are cut.
    """

    def __init__(
        self, tokenizer: Tokenizer, ids: Sequence[int], n_before: int, shared: int, seed: int
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = ids
        self._n_before = n_before
        self._shared = shared
        self._random = np.random.default_rng([seed, TEXTS])

    @classmethod
    async def of(cls, tokenizer: Tokenizer, text: str, shared: int, seed: int) -> PromptMaker:
        """One for a text; raises ValueError where it has no tokens."""
        n_before = len(await tokenizer.encode(""))
        ids = (await tokenizer.encode(text[:_MOST_TEXT]))[n_before:]
        if not ids:
            raise ValueError("the text to make prompts of has no tokens")
        return cls(tokenizer, ids, n_before, shared, seed)

    async def make(self, lengths: Lengths) -> Prompt:
        """A prompt of that length, or as near to it as the text lets it be."""
        if lengths.prompt is not None:
            tokens = len(await self._tokenizer.encode(lengths.prompt))
            return Prompt(lengths.prompt, tokens, lengths.output_tokens)
        wanted = lengths.prompt_tokens
        start = int(self._random.integers(len(self._ids)))
        take = max(wanted - self._n_before, 1)
        best: Prompt | None = None
        # Tokens that are cut apart from their neighbours may become others: it is counted again.
        for _ in range(_MOST_CORRECTIONS):
            text = await self._tokenizer.decode(self._piece(start, take))
            tokens = len(await self._tokenizer.encode(text))
            if best is None or abs(tokens - wanted) < abs(best.tokens - wanted):
                best = Prompt(text, tokens, lengths.output_tokens)
            if tokens == wanted or take + wanted - tokens < 1:
                break
            take += wanted - tokens
        assert best is not None
        return best

    def _piece(self, start: int, count: int) -> list[int]:
        n_shared = min(self._shared, count)
        common = [self._ids[i % len(self._ids)] for i in range(n_shared)]
        own = [self._ids[(start + i) % len(self._ids)] for i in range(count - n_shared)]
        return common + own
