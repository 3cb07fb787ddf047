"""What a server allows, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits and names of a server.

    Attributes:
        model_names: What the model is called in requests, the first one in answers too; empty: the
            name of its folder.
        api_keys: Keys of which a client must send one; empty: none is needed.
        allowed_hosts: Names that a request's Host header may have; empty: any. Where the server
            listens on loopback without keys, this keeps web pages from reaching it by a name of
            theirs that they let point there.
        chat_template: A template, or its name or file, in place of the model's.
        system_prefix: What a conversation says before the user's first message, tools included, is
            a prefix of its own: computed once for all that begin with the same.
        context: Tokens of prompt and reply at most; 0: the model's context.
        reply_tokens: Tokens of a chat's reply at most where a request does not say; -1: until the
            context is full.
        max_body_bytes: Of a request's body.
        max_prompt_tokens: Of one prompt; 0: the context.
        max_choices: Choices of a request, all its prompts together.
        max_grammar_bytes: Of a schema, a regular expression or a grammar that replies follow.
        max_streams: Streamed replies at once.
        timeout: Seconds that a request may take, waiting included; 0: no limit.
        retry_after: Seconds after which clients that found the queue full are told to come back.
    """

    model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    chat_template: str | None = None
    system_prefix: bool = False
    context: int = 0
    reply_tokens: int = -1
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int = 0
    max_choices: int = 16
    max_grammar_bytes: int = 128 << 10
    max_streams: int = 256
    timeout: float = 0
    retry_after: int = 1

    def __post_init__(self) -> None:
        for name in ("context", "max_prompt_tokens", "timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in (
            "max_body_bytes",
            "max_choices",
            "max_grammar_bytes",
            "max_streams",
            "retry_after",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.reply_tokens < -1:
            raise ValueError(f"reply_tokens must be -1 or more, not {self.reply_tokens}")
        if "" in self.api_keys:
            raise ValueError("api_keys holds an empty key")
