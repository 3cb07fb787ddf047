"""Output that follows a grammar, a regular expression or a JSON schema.

llguidance (the extra ``mustafar[grammar]``) says which tokens may come next; the sampler masks the
others. What it makes of a tokenizer, and of the grammars used last, is kept with the model. Before
a limit on tokens cuts an output, it is closed (closing.py).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from . import _core
from .closing import Closing, Walker

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

NAMES = ("grammar", "regex", "json_schema")

_KEPT_GRAMMARS = 16  # of a model
# Between the parts of JSON: nothing, a space, or a new line with its indentation. More of it is as
# valid, but small models would go on with it for ever.
_WHITESPACE = r" |\n {0,32}"

_lock = threading.Lock()  # of what is kept; held for a look alone
_compiling = threading.Lock()  # may be held for seconds
_compilers: WeakKeyDictionary[_core.Model, _Compiler] = WeakKeyDictionary()


def _renew_locks() -> None:
    """In a forked child, where another thread of the parent may have held them."""
    global _compiling, _lock
    _compiling = threading.Lock()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


def constraint_factory(model: _core.Model, name: str, text: str) -> Callable[[], Constraint]:
    """What makes a constraint for every output.

    A grammar that was used lately is at hand at once, even while others are compiled.

    Args:
        model: The model whose tokens are to be chosen.
        name: The parameter, of NAMES.
        text: Its value; a schema as JSON text.

    Raises:
        ImportError: llguidance is missing.
        TokenizerError: The model has no tokenizer.
        ValueError: The text is not understood; the parameter is named.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{name} needs llguidance: pip install 'mustafar[grammar]'", name="llguidance"
        ) from error
    first = _kept(model, name, text)
    if first is None:
        with _compiling:
            first = _kept(model, name, text)
            if first is None:
                first = _compile(model, name, text)
    matcher, walker = first
    return lambda: Constraint(name, matcher.deep_copy(), walker)


def _kept(model: _core.Model, name: str, text: str) -> tuple[LLMatcher, Walker] | None:
    with _lock:
        compiler = _compilers.get(model)
        matcher = None if compiler is None else compiler.kept(name, text)
        return None if compiler is None or matcher is None else (matcher, compiler.walker)


def _compile(model: _core.Model, name: str, text: str) -> tuple[LLMatcher, Walker]:
    with _lock:
        compiler = _compilers.get(model)
    if compiler is None:
        compiler = _Compiler(model)
        with _lock:
            _compilers[model] = compiler
    matcher = compiler.make(name, text)
    with _lock:
        compiler.keep(name, text, matcher)
    return matcher, compiler.walker


class Constraint:
    """What may follow in one output, as the native code asks for it."""

    def __init__(self, name: str, matcher: LLMatcher, walker: Walker) -> None:
        self._name, self._matcher = name, matcher
        self._closing = Closing(walker)

    @property
    def ended_early(self) -> bool:
        """Whether the output was closed before a limit would have cut it."""
        return self._closing.began

    def allow(self, address: int, n_bytes: int, tokens_left: int) -> bool:
        """Writes the bits of tokens that may come next; returns whether the output may end."""
        self._closing.set_left(tokens_left)
        if (must := self._closing.next()) is not None:
            bits = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint32))
            bits[must // 32] = 1 << must % 32
            return False
        self._matcher.unsafe_compute_mask_ptr(address, n_bytes)
        self._check()
        return self._matcher.is_accepting()

    def accept(self, token_id: int) -> bool:
        """Takes the token that came; returns whether more may follow."""
        self._matcher.consume_token(token_id)
        self._check()
        return not self._matcher.is_stopped() and self._closing.took(self._matcher)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _core.Error(f"{self._name}: {self._matcher.get_error()}")


class _Vocabulary:
    """A model's tokens as llguidance takes them, and one more to stand for the end.

    Which tokens end an output is the sampler's to say: that one is beyond the model's vocabulary.
    """

    bos_token_id = None

    def __init__(self, model: _core.Model) -> None:
        tokenizer = model.tokenizer()
        n_tokens = int(model.config()["vocab_size"])
        self.tokens = []
        self.special_token_ids = [n_tokens]
        for id in range(n_tokens):
            try:
                self.tokens.append(tokenizer.token_bytes(id))
            except _core.TokenizerError:  # padding
                self.tokens.append(b"")
                continue
            if tokenizer.is_special(id):
                self.special_token_ids.append(id)
        special = set(self.special_token_ids)
        self._ids = {
            token: id for id, token in enumerate(self.tokens) if token and id not in special
        }
        self._longest = max(map(len, self._ids), default=1)
        self.tokens.append(b"<end of output>")
        self.eos_token_id = n_tokens

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens that spell a text, the longest first: what follows may stand in its midst."""
        data = text.encode() if isinstance(text, str) else text
        ids = []
        while data:
            size = min(len(data), self._longest)
            while size > 1 and data[:size] not in self._ids:
                size -= 1
            if data[:size] in self._ids:  # a vocabulary need not have every byte
                ids.append(self._ids[data[:size]])
            data = data[size:]
        return ids


class _Compiler:
    """Makes matchers over one tokenizer."""

    def __init__(self, model: _core.Model) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = _Vocabulary(model)
        self._tokenizer: LLTokenizer = LLTokenizer(TokenizerWrapper(vocabulary))
        self.walker = Walker(vocabulary.tokens)
        self._matchers: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def kept(self, name: str, text: str) -> LLMatcher | None:
        """A matcher that has seen nothing, to be copied, of a grammar that was used lately."""
        matcher = self._matchers.get((name, text))
        if matcher is not None:
            self._matchers.move_to_end((name, text))
        return matcher

    def keep(self, name: str, text: str, matcher: LLMatcher) -> None:
        """Keeps a matcher, in place of the one that was not used for longest."""
        self._matchers[name, text] = matcher
        if len(self._matchers) > _KEPT_GRAMMARS:
            self._matchers.popitem(last=False)

    def make(self, name: str, text: str) -> LLMatcher:
        """Compiles; raises ValueError for what is not understood."""
        from llguidance import LLMatcher, LLParserLimits

        if name == "json_schema":
            grammar = LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": _WHITESPACE}
            )
        elif name == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        else:
            grammar = LLMatcher.grammar_from_lark(text)
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"{name}: {matcher.get_error()}")
        return matcher
