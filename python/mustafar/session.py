"""One sequence of tokens and its cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._core import Profile
from .model import Model, Prompt
from .stream import Closing, Stream
from .types import GenerateResult, KVConfig, MemoryUsage, SamplingParams


class Session(Closing):
    """One sequence and its cache; one call at a time.

    A call beside another, from any thread, a callback or a signal handler, raises StateError and
    disturbs nothing; so does one between the pieces of a stream that has not ended: the session is
    the stream's until then. ``position``, ``tokens``, ``memory()`` and ``cancel()`` may be used at
    any time.

    Every call that raises leaves the session as it was before. A stream is a call for every piece:
    one that raises ends the stream, and the tokens made before stay.

    Args:
        model: A :class:`Model`, or a folder to load with defaults; None is the demo model.
        kv: How the cache is kept.
        max_tokens: Context limit; None takes the model's.
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str] | None = None,
        kv: KVConfig | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self._model = model if isinstance(model, Model) else Model(model)
        self._kv = kv or KVConfig()
        self._core = _core.Session(self._model._core, self._kv._native(), max_tokens)

    @classmethod
    def _wrap(cls, model: Model, kv: KVConfig, native: _core.Session) -> Session:
        session = cls.__new__(cls)
        session._model, session._kv, session._core = model, kv, native
        return session

    def prefill(self, token_ids: ArrayLike) -> NDArray[np.float32]:
        """Appends tokens in one forward call.

        Args:
            token_ids: [n] integers, n >= 1.

        Returns:
            Logits [vocab] after the last token.

        Raises:
            ValueError: No token, or an id outside the vocabulary.
            ContextOverflow: More tokens than ``max_tokens``.
            OutOfMemory: The cache would exceed the model's ``kv_budget``.
        """
        return self._core.prefill(token_ids)

    def decode(self, token_id: int) -> NDArray[np.float32]:
        """Appends one token; logits [vocab] after it. Raises as :meth:`prefill`."""
        return self._core.decode(token_id)

    @staticmethod
    def decode_batch(sessions: Sequence[Session], token_ids: ArrayLike) -> NDArray[np.float32]:
        """One decode step of several sessions of one model: weights are read once for all.

        Args:
            sessions: n different sessions, n >= 1.
            token_ids: [n] integers, appended to one session each.

        Returns:
            Logits [n, vocab]. A call that raises changes no session.
        """
        return _core.Session.decode_batch([session._core for session in sessions], token_ids)

    def logits(self) -> NDArray[np.float32]:
        """Logits [vocab] after the last token; StateError for an empty session."""
        return self._core.logits()

    def generate(
        self,
        prompt: Prompt = "",
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        **sampling: Any,
    ) -> GenerateResult:
        """Appends a prompt and continues it.

        Args:
            prompt: Text (BOS is added at position 0 only) or ids, taken as they are.
            params: Sampling parameters; keyword arguments of :class:`SamplingParams` on top.
            parse_special: Special tokens that a text spells become those tokens; by default they
                are text like any other.

        Returns:
            Text, which continues that of the tokens before it, and ids. All ids are in the cache;
            text cut off by a stop text is rewound.
        """
        native = SamplingParams.merge(params, sampling)._native(self._model._core)
        return GenerateResult._of(self._core.generate(prompt, native, parse_special))

    def stream(
        self,
        prompt: Prompt = "",
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        **sampling: Any,
    ) -> Stream:
        """As :meth:`generate`, handing out text as it is made."""
        native = SamplingParams.merge(params, sampling)._native(self._model._core)
        return Stream(self._core.start(prompt, native, parse_special))

    def score(self, token_ids: ArrayLike) -> NDArray[np.float32]:
        """Natural log-probabilities [n - 1] of each token given those before it.

        Computed on a fresh cache of this session's configuration, as decode would see it: query i
        attends to the tokens that would have been compressed by then in compressed form.
        """
        return self._core.score(token_ids)

    def score_logits(self, token_ids: ArrayLike) -> NDArray[np.float32]:
        """As :meth:`score`, all logits [n - 1, vocab]."""
        return self._core.score_logits(token_ids)

    @property
    def position(self) -> int:
        """Tokens in the cache; other threads may ask while a call runs."""
        return self._core.position()

    @property
    def tokens(self) -> list[int]:
        """Ids in the cache; other threads may ask while a call runs."""
        return self._core.tokens()

    @property
    def max_tokens(self) -> int:
        """Context limit, tokens."""
        return self._core.max_tokens()

    @property
    def model(self) -> Model:
        """The model this session runs on."""
        return self._model

    @property
    def kv(self) -> KVConfig:
        """How the cache is kept."""
        return self._kv

    def memory(self) -> MemoryUsage:
        """Measured bytes of the cache; while a call runs, as they were after the last token."""
        return MemoryUsage(**self._core.memory())

    def rewind(self, position: int) -> None:
        """Keeps the first ``position`` tokens.

        Where compressed blocks go, up to ``window + 63`` tokens before ``position`` are recomputed;
        all of them, where the store has dropped blocks that a sliding window would see again.
        """
        self._core.rewind(position)

    def fork(self) -> Session:
        """A session with the same contents: compressed pages shared, the tail copied."""
        return Session._wrap(self._model, self._kv, self._core.fork())

    def reset(self) -> None:
        """Drops all tokens."""
        self._core.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole session to a file, which appears complete or not at all.

        Raises:
            Error: The file can't be written; path and reason are named, an older file stays.
        """
        self._core.save(os.fspath(path))

    @classmethod
    def load(
        cls, model: Model, path: str | os.PathLike[str], profile: Profile | None = None
    ) -> Session:
        """A session from a file that :meth:`save` wrote; goes on bit-identically.

        Args:
            model: The same model, by its fingerprint, in the same dtype.
            path: The file.
            profile: The KV profile that the session had, where it was a calibrated one.

        Raises:
            StateError: The file is damaged or does not fit; says what differs.
        """
        native = _core.Session.load(model._core, os.fspath(path), profile)
        return cls._wrap(model, KVConfig(**native.kv()), native)

    def cancel(self) -> None:
        """Makes the call that runs, or the stream under way, raise :class:`Cancelled` soon.

        It is nothing to later calls: where nothing runs, nothing happens.
        """
        self._core.cancel()

    def close(self) -> None:
        """Frees the cache; later calls raise StateError.

        It does not wait: where another call runs it raises StateError (cancel that call first). A
        stream that has not ended ends.
        """
        self._core.close()

    def __len__(self) -> int:
        return self.position

    def __repr__(self) -> str:
        try:
            self._core.memory()  # a closed session says so
            position, limit = self.position, self.max_tokens
        except _core.StateError:
            return "<mustafar.Session, closed>"
        return f"<mustafar.Session with {position} of {limit} tokens, {self._kv!r}>"
