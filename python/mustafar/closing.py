"""How an output after a grammar comes to a valid end before a limit cuts it.

A walk from where the output stands finds tokens that end it: strings are closed, then objects and
lists, what is required is put in as short as it goes. While the limit is far, walks are rare; where
it is near, the walk's tokens are what may follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

_LONGEST_WALK = 1024  # tokens
# Tokens by which a walk may become longer while one is chosen, about: the output of a nested object
# begins, say.
_GROWTH = 16
_MARGIN = 32  # tokens left beside the walk where it begins; an eighth of a limit at most
# Between strings, what ends the most comes first.
_ENDS = b'}]":,'
# Else, as in a string that may not end yet, for its pattern's sake: what was taken least so far,
# signs before letters, so that no part of a pattern is repeated for ever.
_PARTS = b"@.:-/+TZ0123456789ntf{[abcdeghijklmopqrsuvwxyzABCDEFGHIJKLMNOPQRSUVWXY_ "


class Walker:
    """Walks over one vocabulary.

    Args:
        tokens: The bytes of every token.
    """

    def __init__(self, tokens: list[bytes]) -> None:
        single = {token[0]: id for id, token in enumerate(tokens) if len(token) == 1}
        self._ends = [single[byte] for byte in _ENDS if byte in single]
        self._parts = [single[byte] for byte in _PARTS if byte in single]
        self._letter, self._quote = single.get(ord("a")), single.get(ord('"'))
        self._n_words = (len(tokens) + 31) // 32

    def to_the_end(self, matcher: LLMatcher, most: int) -> list[int] | None:
        """Tokens that end the output, or None where ``most`` tokens do not."""
        most = min(most, _LONGEST_WALK)
        matcher = matcher.deep_copy()
        walk: list[int] = []
        mask = np.empty(self._n_words, np.uint32)
        taken: dict[int, int] = {}  # how often each part was
        while not matcher.is_accepting():
            step = matcher.compute_ff_tokens() or self._choice(matcher, mask, taken)
            if not step or len(walk) + len(step) > most:
                return None
            if matcher.try_consume_tokens(step) != len(step):
                return None
            walk += step
        return walk

    def _choice(
        self, matcher: LLMatcher, mask: NDArray[np.uint32], taken: dict[int, int]
    ) -> list[int]:
        """One token that may follow, or none where none was thought of; mask is overwritten."""
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            return []
        if _allows(mask, self._letter):  # in a string
            if self._quote is not None and _allows(mask, self._quote):
                return [self._quote]
        else:
            for id in self._ends:
                if _allows(mask, id):
                    return [id]
        parts = [id for id in self._parts if _allows(mask, id)]
        if not parts:
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
            parts = [int(id) for id in np.flatnonzero(bits)[:64]]
        if not parts:
            return []
        part = min(parts, key=lambda id: taken.get(id, 0))
        taken[part] = taken.get(part, 0) + 1
        return [part]


def _allows(mask: NDArray[np.uint32], id: int | None) -> bool:
    return id is not None and bool(mask[id >> 5] >> np.uint32(id & 31) & 1)


class Closing:
    """Decides when an output has to come to its end.

    Args:
        walker: Over the model's vocabulary.
    """

    def __init__(self, walker: Walker) -> None:
        self._walker = walker
        self._limit = self._left = 0  # tokens in all, and from now on
        self._look_at = -1  # tokens left where the next walk is due
        self._walk: list[int] | None = None  # what must follow; None: the output is free

    @property
    def began(self) -> bool:
        """Whether the output is being closed, or was."""
        return self._walk is not None

    def next(self) -> int | None:
        """The token that must follow, or None where the grammar decides."""
        return self._walk[0] if self._walk else None

    def set_left(self, tokens: int) -> None:
        """Told before every token: how many may still come, that one included."""
        self._left = tokens
        if not self._limit:
            self._limit = tokens
            self._look_at = tokens // 2  # most outputs have ended by then

    def took(self, matcher: LLMatcher) -> bool:
        """Told after every token that the matcher took; returns False where the output ends now."""
        left = self._left - 1
        if self._walk:
            self._walk = self._walk[1:]
        elif self._walk is None and 0 < left <= self._look_at:
            self._look(left, matcher)
        return self._walk is None or len(self._walk) > 0

    def _look(self, left: int, matcher: LLMatcher) -> None:
        walk = self._walker.to_the_end(matcher, left)
        if walk is None:
            self._look_at = left - _GROWTH
            return
        slack = left - len(walk) - min(_MARGIN, self._limit // 8)
        if slack <= 0:
            self._walk = walk
        else:
            self._look_at = left - max(1, slack // _GROWTH)
