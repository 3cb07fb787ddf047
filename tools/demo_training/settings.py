"""Sizes, rates, special tokens and the ways in which questions are asked."""

from __future__ import annotations

from dataclasses import dataclass

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
