"""What the demo model learns from: the standard library, questions about it, and their ids."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from .settings import ASSISTANT, BOS, QUESTION, SPECIALS, SPLIT, TURN, USER, Settings

NO_QUESTIONS = {"idlelib", "lib2to3", "turtledemo", "ntpath", "genericpath"}

TextStep = tuple[bool, int, np.ndarray]  # in the fall, tokens so far, rows of window + 1 u16
Turn = tuple[list[list[int]], list[int]]  # token ids: a question's phrasings, its answer


@dataclass
class Corpus:
    """Standard-library text by path, and summary lines by dotted function name."""

    library: dict[str, str]
    tests: dict[str, str]
    heldout: dict[str, str]
    summaries: dict[str, str]


def load_corpus(max_files: int) -> Corpus:
    """Read the standard library's .py files, split them, and collect the questions.

    Left out: encodings, site-packages, files not in UTF-8 or with more than a fifth of digits.
    Held out: library files of at least 1 kB with sha256(path) mod 100 < 5, except pydoc_data
    (prose, one file) and near-duplicates, of whose lines of 24 characters or more over a third
    also stand in training files; those are trained on.  Tests are not held out, but those named
    after a held-out module are dropped.  Questions come from training files only.
    """
    library: dict[str, str] = {}
    tests, drawn, heldout = library.copy(), library.copy(), library.copy()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"))[: max_files or None]:
        name = path.relative_to(root).as_posix()
        if re.match(r"(site-packages|dist-packages|encodings|_sysconfigdata)", name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip() or sum(c.isdigit() for c in text) >= 0.2 * len(text):
            continue
        low = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < 5
        if {"test", "tests", "idle_test"} & set(name.split("/")):
            tests[name] = text
        elif low and len(text.encode()) >= 1000 and not name.startswith("pydoc_data/"):
            drawn[name] = text
        else:
            library[name] = text

    def long_lines(text: str) -> set[str]:
        return {line.strip() for line in text.splitlines() if len(line.strip()) >= 24}

    seen = {line for text in (library | tests).values() for line in long_lines(text)}
    for name, text in drawn.items():
        lines = long_lines(text)
        (library if len(lines & seen) > len(lines) / 3 else heldout)[name] = text
    stems = {f"test_{Path(name).stem.lstrip('_')}" for name in heldout}
    tests = {k: t for k, t in tests.items() if not stems & set(re.split(r"[/.]", k))}
    return Corpus(library, tests, heldout, collect_summaries(library))


def summary_line(function: str, docstring: str) -> str:
    """First sentence of the first paragraph that is not a signature, whitespace normalised."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        text = " ".join(paragraph.split())
        if text and not text.startswith(function + "("):
            return re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0]
    return ""


def collect_summaries(sources: dict[str, str]) -> dict[str, str]:
    """Dotted name -> summary line of the public, documented, module-level functions.

    Public: no part of the dotted name starts with an underscore, and the module's literal __all__
    names the function where there is one.  A function that its package re-exports goes by the
    package's name.  Summaries have 12 to 160 characters.
    """
    trees: dict[str, ast.Module] = {}
    listed: dict[str, list[str]] = {}  # module -> __all__
    exported: dict[tuple[str, str], set[str]] = {}  # (package, submodule) -> names
    for path, text in sources.items():
        module = re.sub(r"(/__init__)?\.py$", "", path).replace("/", ".")
        if re.search(r"(^|\.)_", module) or module.split(".")[0] in NO_QUESTIONS:
            continue
        module = "os.path" if module == "posixpath" else module  # as documented
        trees[module] = ast.parse(text)
        for node in trees[module].body:
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                exported[module, node.module] = {alias.name for alias in node.names}
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names = re.fullmatch(r"[\[(]((?:'\w+'(?:, )?)*),?[\])]", ast.unparse(node.value))
                listed |= {module: re.findall(r"\w+", names[1])} if names else {}
    summaries: dict[str, str] = {}
    for module, tree in trees.items():
        package, _, leaf = module.rpartition(".")
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            name, summary = node.name, summary_line(node.name, ast.get_docstring(node) or "")
            public = not name.startswith("_") and name in listed.get(module, [name])
            if public and 12 <= len(summary) <= 160:
                shown = exported.get((package, leaf), set()) & {"*", name}
                summaries[f"{package if shown else module}.{name}"] = summary
    return summaries


def prepare(s: Settings, work: Path) -> None:
    """Train the byte-level BPE, which prepends begin-of-text; write work/tokenizer.json."""
    corpus = load_corpus(s.max_files)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=s.vocab_size, special_tokens=SPECIALS, initial_alphabet=to_bytes.alphabet()
    )
    chats = [f"{QUESTION.format(name)} {line}" for name, line in corpus.summaries.items()]
    tokenizer.train_from_iterator([*corpus.library.values(), *chats], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIALS[BOS]} $A",
        pair=f"{SPECIALS[BOS]} $A {SPECIALS[BOS]}:1 $B:1",
        special_tokens=[(SPECIALS[BOS], BOS)],
    )
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(work / "tokenizer.json"))


def text_steps(s: Settings, files: list[np.ndarray], n_library: int) -> Iterator[TextStep]:
    """Shuffled windows over shuffled files; each pass adds another fold of tests to the library."""
    rows, used, passes, tokens = np.zeros((0, 0), np.uint16), 0, 0, 0
    while tokens < s.tokens:
        falling = tokens > s.tokens * (1 - s.fall)
        window = s.window[falling]
        n_rows = s.text_tokens // window
        if used + n_rows > len(rows) or rows.shape[1] != window + 1:
            used, passes = 0, passes + 1
            rng = np.random.default_rng([s.seed, passes])
            tests = range(n_library + passes % s.test_folds, len(files), s.test_folds)
            order = rng.permutation([*range(n_library), *tests])
            stream = np.concatenate([files[i] for i in order])[rng.integers(window) :]
            rows = np.lib.stride_tricks.sliding_window_view(stream, window + 1)[::window]
            rows = rows[rng.permutation(len(rows))]
        yield falling, tokens, rows[used : used + n_rows]
        used += n_rows
        tokens += s.text_tokens + s.question_rows[falling] * s.question_tokens


def ask(s: Settings, turns: list[Turn], system: list[int], n_rows: int, step: int) -> Tensor:
    """This step's conversations: ids and targets (-100: none), (2, n_rows, question_tokens)."""
    rng = np.random.default_rng([s.seed, step, 1])
    order = iter(rng.permutation(len(turns)))
    rows = np.zeros((2, n_rows, s.question_tokens + 1), np.int64)
    for row in range(n_rows):
        ids: list[int] = []
        targets: list[int] = []
        while len(ids) < rows.shape[2]:
            if not ids or rng.random() < 0.75:  # another conversation, else another turn
                ids += [BOS, *(system if rng.random() < 0.1 else [])]
            asked, answer = turns[next(order, 0)]
            question = asked[0 if rng.random() < 0.5 else rng.integers(1, len(asked))]
            ids += [USER, *question, TURN, ASSISTANT]
            targets += [-100] * (len(ids) - len(targets)) + answer
            ids += answer
        rows[:, row] = ids[: rows.shape[2]], targets[: rows.shape[2]]
    return torch.from_numpy(np.stack([rows[0, :, :-1], rows[1, :, 1:]]))
