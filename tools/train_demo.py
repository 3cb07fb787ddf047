"""Train mustafar's demo model from the Python standard library of this machine, end to end.

The text is the interpreter's own library: its sources, and questions about its functions whose
answers are the summary lines of their docstrings, read with `ast`, never imported.  The result
is a Hugging Face folder: Llama architecture, bf16, under 12 MB, with its own byte-level BPE.

    python tools/train_demo.py [prepare] [train] [export] [evaluate]    # default: all four
    python tools/train_demo.py --evaluate DIR     # measure a model folder, print JSON
    python tools/train_demo.py --smoke            # everything in miniature, under a minute

Needs torch >= 2.9, numpy, tokenizers and safetensors.  Muon (Jordan et al., 2024) trains the
matrices, AdamW the rest, at a constant rate that falls to zero over the last `fall` of the token
budget.  A stopped run resumes from its checkpoint, before the fall even with another budget.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import random
import re
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

BOS, END, SYSTEM, USER, ASSISTANT, TURN = range(6)  # token ids, in the order of SPECIALS
NAMES = "<|begin_of_text|> <|end_of_text|> <|system|> <|user|> <|assistant|> <|end_of_turn|>"
SPECIALS = NAMES.split()
SPLIT = (  # Llama 3's pre-tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end_of_turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QUESTION = "What does {} do?"  # asked in half of the training turns and in evaluation
PHRASINGS = [
    "What is {} for?", "Explain {}.", "Describe {} in one line.", "Tell me about {}.",
    "what does {} do", "Summarise {}.", "What does the function {} do?",
]  # fmt: skip
SYSTEM_TURN = "<|system|>You answer questions about the Python standard library.<|end_of_turn|>"
NO_QUESTIONS = {"idlelib", "lib2to3", "turtledemo", "ntpath", "genericpath"}
CONFIG_NAMES = {  # Hugging Face's name -> field of Settings
    "vocab_size": "vocab_size", "hidden_size": "dim", "intermediate_size": "ff_dim",
    "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "head_dim": "head_dim",
    "num_key_value_heads": "n_kv_heads", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Architecture, optimisation and evaluation; pairs are (before, during) the fall."""

    vocab_size: int = 4096
    dim: int = 256
    n_layers: int = 6
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    ff_dim: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tokens: int = 8_342_000  # budget: all tokens that pass through the model in training
    fall: float = 0.2743
    warmup_steps: int = 60
    text_tokens: int = 6144  # per step
    window: tuple[int, int] = (512, 1024)
    question_rows: tuple[int, int] = (2, 12)  # per step, of question_tokens each
    question_tokens: int = 256
    question_weight: tuple[float, float] = (0.1, 0.5)  # of their loss; the text's has 1
    test_folds: int = 4  # a pass reads the library and one fold of the test files
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    weight_decay: float = 0.05
    eval_questions: int = 100
    max_files: int = 0  # 0: all
    seed: int = 2026


SMOKE = Settings(
    vocab_size=512, dim=64, n_layers=2, n_heads=2, n_kv_heads=1, ff_dim=128, tokens=40_000,
    text_tokens=1024, window=(128, 256), question_rows=(1, 2), eval_questions=8, max_files=70,
)  # fmt: skip

TextStep = tuple[bool, int, np.ndarray]  # in the fall, tokens so far, rows of window + 1 u16
Turn = tuple[list[list[int]], list[int]]  # token ids: a question's phrasings, its answer
Weights = dict[str, Tensor]  # by Hugging Face's names, less the closing ".weight"


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


def initial_weights(s: Settings) -> Weights:
    """Normal matrices, narrower where they add to the residual stream, and norms of one."""
    q, kv, ff = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim, s.ff_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, s.dim), "self_attn.k_proj": (kv, s.dim),
        "self_attn.v_proj": (kv, s.dim), "self_attn.o_proj": (s.dim, q),
        "mlp.gate_proj": (ff, s.dim), "mlp.up_proj": (ff, s.dim), "mlp.down_proj": (s.dim, ff),
        "input_layernorm": (s.dim,), "post_attention_layernorm": (s.dim,),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{k}": v for i in range(s.n_layers) for k, v in layer.items()}
    shapes |= {"model.embed_tokens": (s.vocab_size, s.dim), "model.norm": (s.dim,)}
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    for name, weight in weights.items():
        if weight.dim() == 2:
            residual = name.endswith(("o_proj", "down_proj"))
            weight.normal_(std=0.02 / math.sqrt(2 * s.n_layers) if residual else 0.02)
        weight.requires_grad_()
    return weights


def forward(s: Settings, weights: Weights, ids: Tensor) -> Tensor:
    """Logits (batch, length, vocab) of token ids (batch, length)."""
    batch, length = ids.shape
    rates = s.rope_theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
    angles = torch.arange(length).float()[:, None] * torch.cat((rates, rates))
    cos, sin = angles.cos(), angles.sin()  # (length, head_dim)

    def heads(x: Tensor, name: str) -> Tensor:  # -> (batch, heads, length, head_dim)
        return F.linear(x, weights[name]).view(batch, length, -1, s.head_dim).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (s.dim,), weights[name], s.norm_eps)

    x = F.embedding(ids, weights["model.embed_tokens"])
    group = s.n_heads // s.n_kv_heads
    for i in range(s.n_layers):
        layer = f"model.layers.{i}."
        y = norm(x, layer + "input_layernorm")
        q = rotate(heads(y, layer + "self_attn.q_proj"))
        k = rotate(heads(y, layer + "self_attn.k_proj")).repeat_interleave(group, 1)
        v = heads(y, layer + "self_attn.v_proj").repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + F.linear(y.reshape(batch, length, -1), weights[layer + "self_attn.o_proj"])
        y = norm(x, layer + "post_attention_layernorm")
        gate = F.silu(F.linear(y, weights[layer + "mlp.gate_proj"]))
        y = gate * F.linear(y, weights[layer + "mlp.up_proj"])
        x = x + F.linear(y, weights[layer + "mlp.down_proj"])
    return F.linear(norm(x, "model.norm"), weights["model.embed_tokens"])


def train(s: Settings, work: Path, compiled: bool, save_seconds: float = 240.0) -> None:
    """Train from the checkpoint in work, or from nothing, up to the budget."""
    torch.manual_seed(s.seed)
    corpus = load_corpus(s.max_files)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    texts = [*corpus.library.values(), *corpus.tests.values()]
    files = [np.array([*e.ids, END], np.uint16) for e in tokenizer.encode_batch(texts)]
    system = tokenizer.encode(SYSTEM_TURN).ids[1:]
    turns: list[Turn] = []
    for name, line in corpus.summaries.items():
        asked = [tokenizer.encode(text.format(name)).ids[1:] for text in (QUESTION, *PHRASINGS)]
        turns.append((asked, [*tokenizer.encode(line).ids[1:], TURN]))
    weights = initial_weights(s)
    matrices = [w for k, w in weights.items() if w.dim() == 2 and k != "model.embed_tokens"]
    others = [w for k, w in weights.items() if w.dim() == 1 or k == "model.embed_tokens"]
    muon = torch.optim.Muon(matrices, lr=s.muon_rate, weight_decay=s.weight_decay)
    adam = torch.optim.AdamW(others, lr=s.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    done, checkpoint = 0, work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, weight in weights.items():
            weight.data.copy_(saved["weights"][name])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        done = saved["steps"]

    @torch.compile(dynamic=False, disable=not compiled)
    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(s, weights, ids).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    saved_at = time.monotonic()
    losses: list[tuple[float, float]] = []  # of text and questions, since the last line
    for step, (falling, tokens, rows) in enumerate(text_steps(s, files, len(corpus.library)), 1):
        if step <= done:
            continue
        rate = min(1.0, step / s.warmup_steps, (1 - tokens / s.tokens) / s.fall)
        text_loss = 0.0
        parts = torch.from_numpy(rows.astype(np.int64)).chunk(2)
        for part in parts:
            loss = loss_of(part[:, :-1].contiguous(), part[:, 1:].contiguous()) / len(parts)
            loss.backward()
            text_loss += loss.item()
        ids, targets = ask(s, turns, system, s.question_rows[falling], step)
        loss = loss_of(ids, targets)
        (loss * s.question_weight[falling]).backward()
        losses.append((text_loss, loss.item()))
        for optimizer, full in ((muon, s.muon_rate), (adam, s.adam_rate)):
            optimizer.param_groups[0]["lr"] = rate * full
            optimizer.step()
            optimizer.zero_grad()
        tokens += rows.size - len(rows) + ids.numel()
        if step % 20 == 0:
            means = "text {:.4f} questions {:.4f}".format(*np.mean(losses, axis=0))
            clock = time.strftime("%H:%M:%S")
            print(f"{clock} step {step} tokens {tokens} rate {rate:.3f} {means}", flush=True)
            losses.clear()
        if time.monotonic() - saved_at > save_seconds or tokens >= s.tokens:
            state = {"steps": step, "muon": muon.state_dict(), "adam": adam.state_dict()}
            state["weights"] = {k: w.detach() for k, w in weights.items()}
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
            saved_at = time.monotonic()


def export(s: Settings, work: Path, folder: Path) -> None:
    """Write the checkpoint as a Hugging Face folder in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = torch.load(work / "checkpoint.pt", weights_only=True)["weights"]
    tensors = {f"{k}.weight": w.bfloat16().contiguous() for k, w in saved.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_bytes((work / "tokenizer.json").read_bytes())
    ends = {"bos_token_id": BOS, "eos_token_id": [END, TURN]}
    config = {name: getattr(s, key) for name, key in CONFIG_NAMES.items()} | ends | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "use_cache": True,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "max_position_embeddings": s.window[1],
    }  # fmt: skip
    added = {str(i): {"content": text, "special": True} for i, text in enumerate(SPECIALS)}
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": s.window[1],
        "bos_token": SPECIALS[BOS], "eos_token": SPECIALS[END], "pad_token": SPECIALS[END],
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": added,
    }  # fmt: skip
    files = {"config": config, "generation_config": ends, "tokenizer_config": tokens}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


@torch.no_grad()
def heldout_bits(s: Settings, weights: Weights, ids: list[int]) -> float:
    """Summed bits of ids[1:] in full windows half a window apart, each token scored once."""
    total, scored, window = 0.0, 1, s.window[1]
    while scored < len(ids):
        end = min(scored + (window // 2 if scored > 1 else window), len(ids))
        part = torch.tensor(ids[max(0, end - window - 1) : end])
        logits = forward(s, weights, part[None, :-1])[0, scored - end :]
        total += F.cross_entropy(logits, part[scored - end :], reduction="sum").item()
        scored = end
    return total / math.log(2)


@torch.no_grad()
def answer(s: Settings, weights: Weights, tokenizer: Tokenizer, questions: list[str]) -> list[str]:
    """Greedy answers of at most 80 tokens to single-turn questions, all in one batch."""
    chats = [tokenizer.encode(f"<|user|>{q}<|end_of_turn|><|assistant|>").ids for q in questions]
    starts = [len(chat) for chat in chats]
    for _ in range(80):
        running = [chat for chat in chats if chat[-1] not in (TURN, END)]
        if not running:
            break
        width = max(map(len, running))
        ids = torch.tensor([chat + [END] * (width - len(chat)) for chat in running])
        last = torch.tensor([len(chat) - 1 for chat in running])
        best = forward(s, weights, ids)[torch.arange(len(running)), last].argmax(-1)
        for chat, token in zip(running, best.tolist(), strict=True):
            chat.append(token)
    return [tokenizer.decode(c[n:]) for c, n in zip(chats, starts, strict=True)]


def evaluate(s: Settings, folder: Path) -> dict[str, object]:
    """Bits per byte of the held-out files and exact answers to documented functions."""
    config = json.loads((folder / "config.json").read_text())
    s = replace(s, **{key: config[name] for name, key in CONFIG_NAMES.items()})
    tensors = load_file(folder / "model.safetensors")
    weights = {name.removesuffix(".weight"): w.float() for name, w in tensors.items()}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    corpus = load_corpus(s.max_files)
    ids = {k: tokenizer.encode(text).ids for k, text in corpus.heldout.items()}
    bits = {k: heldout_bits(s, weights, ids[k]) for k in sorted(ids)}
    sizes = {k: len(text.encode()) for k, text in corpus.heldout.items()}
    drawn = random.Random(s.seed).sample(sorted(corpus.summaries), s.eval_questions)
    answers = answer(s, weights, tokenizer, [QUESTION.format(name) for name in drawn])
    pairs = zip(drawn, answers, strict=True)
    wrong = {name: text for name, text in pairs if " ".join(text.split()) != corpus.summaries[name]}
    return {
        "bits_per_byte": sum(bits.values()) / sum(sizes.values()),
        "tokens": sum(map(len, ids.values())) - len(ids),
        "bytes": sum(sizes.values()),
        "window": s.window[1],
        "stride": s.window[1] // 2,
        "qa_correct": len(drawn) - len(wrong),
        "qa_total": len(drawn),
        "qa_wrong": wrong,
        "qa_set": len(corpus.summaries),
        "file_bits_per_byte": {k: round(bits[k] / sizes[k], 4) for k in bits},
    }


def main() -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(description="Train and measure mustafar's demo model")
    parser.add_argument("stages", nargs="*", metavar="prepare|train|export|evaluate")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="only measure this folder")
    parser.add_argument("--work", type=Path, default=Path("build/demo-train"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="model folder")
    parser.add_argument("--tokens", type=int, help="training budget")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, in under a minute")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    s = SMOKE if args.smoke else Settings()
    s = replace(s, tokens=args.tokens or s.tokens)
    stages = {
        "prepare": lambda: prepare(s, args.work),
        "train": lambda: train(s, args.work, not (args.no_compile or args.smoke)),
        "export": lambda: export(s, args.work, args.out),
        "evaluate": lambda: print(json.dumps(evaluate(s, args.evaluate or args.out), indent=1)),
    }
    chosen = ["evaluate"] if args.evaluate else args.stages or list(stages)
    if unknown := set(chosen) - set(stages):
        parser.error(f"unknown stages {sorted(unknown)}, expected {list(stages)}")
    for stage in chosen:
        stages[stage]()


if __name__ == "__main__":
    main()
