"""A model loaded from a Hugging Face folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from . import _core, checks
from .completion import Message, Tools, chat_completion
from .hub import find_model
from .stream import Closing
from .types import Device, DType, GenerateResult, KVConfig, SamplingParams, Weights

if TYPE_CHECKING:
    from .session import Session

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class ModelMemory:
    """Bytes that a model and all its sessions hold.

    Attributes:
        weights_bytes: Tensors: mapped, uploaded or quantised.
        workspace_bytes: Activations and scratch.
        kv_bytes: All caches, as allocated.
        kv_peak_bytes: The most that caches ever took, one layer of a prompt's dense keys and
            values included.
        kv_budget: Limit of ``kv_bytes``; 0 is none.
    """

    weights_bytes: int
    workspace_bytes: int
    kv_bytes: int
    kv_peak_bytes: int
    kv_budget: int


class Model(Closing):
    """Weights, tokenizer and device; shared by any number of sessions and threads.

    Args:
        path: A folder with config.json and safetensors, or the id of a repository of the Hugging
            Face hub (``"organisation/name"``): from the local cache, and where it is not there
            downloaded with a progress bar if huggingface_hub is installed (``mustafar[hub]``).
            None takes the small demo model that ships with the package.
        device: ``"cpu"``; ``"cuda:1"``, a GPU by its number, from 0 among those that
            CUDA_VISIBLE_DEVICES leaves; ``"cuda"``, the first; or ``"auto"``: the first where
            there is one that this build has code for, else the CPU.
        dtype: Arithmetic and type of the dense tail: ``"auto"`` (as stored), ``"f32"``, ``"f16"``
            or ``"bf16"``.
        weights: What matrices are in memory: ``"auto"`` (as stored), ``"int8"`` or ``"int4"``:
            rounded on loading, with a scale and a minimum for every 32 inputs of a row, the
            embedding and the head to 8 bits. Another group as in ``"int4:64"``, ``"int8:128"`` or
            ``"int8:row"``: fewer bytes, more error (docs/results/quality.md). On the CPU and on
            GPUs. On the CPU decode rounds activations in groups of 32, too, unless ``dtype`` is
            ``"f32"``: to int8 beside int4 weights, else to 15 bits.
            A folder that is quantised already (compressed-tensors, AutoAWQ, GPTQ, fp8) is read as
            it is with ``"auto"``; with another type what it has of integers is a ValueError.
        threads: 0 takes MUSTAFAR_THREADS, or as many as the cores and the control group's CPU
            quota allow.
        kv_budget: Bytes that the caches of all sessions together may take; None: no limit.
        progress: Called with (bytes done, bytes in all) while weights are read, or
            uploaded to the GPU.

    Raises:
        ModelError: A file or field that can't be used, named; a FileNotFoundError too where there
            is no such folder or file.
        DeviceError: A GPU that can't be had; the message says what is missing, or how many
            there are.
        OutOfMemory: Weights that do not fit the GPU as they would be there; found before
            anything is uploaded.
        TokenizerError: A tokenizer.json that can't be used.
        ValueError: An argument out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        device: Device = "auto",
        dtype: DType = "auto",
        threads: int = 0,
        *,
        weights: Weights = "auto",
        kv_budget: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        folder = _demo_model() if path is None else find_model(path)
        self._core = _core.Model(folder, device, dtype, weights, threads, kv_budget or 0, progress)

    @property
    def config(self) -> dict[str, Any]:
        """Architecture: sizes, rope, special ids."""
        return self._core.config()

    @property
    def default_sampling(self) -> SamplingParams:
        """What is used where a caller says nothing: of generation_config.json, or our own."""
        return SamplingParams(**self._core.default_sampling())

    @property
    def tokenizer(self) -> _core.Tokenizer:
        """The folder's tokenizer; raises TokenizerError where it has none."""
        return self._core.tokenizer()

    @property
    def folder(self) -> Path:
        """Where the model was loaded from."""
        return Path(self._core.folder())

    @property
    def device(self) -> str:
        """``"cpu"``, ``"cuda"`` (the first GPU) or ``"cuda:1"``."""
        return self._core.device()

    @property
    def dtype(self) -> str:
        """Arithmetic and tail type: ``"f32"``, ``"f16"`` or ``"bf16"``."""
        return self._core.dtype()

    @property
    def weights(self) -> str:
        """What matrices are in memory: ``"auto"`` (as stored), or with the group ``"int4:32"``."""
        return self._core.weights()

    @property
    def fingerprint(self) -> str:
        """16 hex digits of config, tensor table and sampled bytes."""
        return self._core.fingerprint()

    def memory(self) -> ModelMemory:
        """Bytes held now."""
        return ModelMemory(**self._core.memory())

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        kv: KVConfig | None = None,
        max_batch: int = 64,
        parse_special: bool = False,
        **sampling: Any,
    ) -> list[GenerateResult]:
        """Continues many prompts together (continuous batching).

        Args:
            prompts: Texts, or sequences of ids to which nothing is added.
            params: Sampling parameters, for all prompts or a list with one for each; keyword
                arguments of :class:`SamplingParams` on top.
            kv: How caches are kept.
            max_batch: Sequences that decode together at most.
            parse_special: Special tokens that a text spells become those tokens; by default they
                are text like any other.

        Returns:
            One result per prompt, in order, independent of what else was in the batch.

        Raises:
            ValueError: An empty prompt or a bad id, with the prompt's index; lists of different
                lengths.
            ContextOverflow: A prompt longer than the context.
            OutOfMemory: A prompt whose cache can't fit ``kv_budget``.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is one text: pass a list of prompts")
        prompts = list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        elif len(params) != len(prompts):
            raise ValueError(f"params has {len(params)} elements for {len(prompts)} prompts")
        native = self._core.generate(
            prompts,
            [SamplingParams.merge(each, sampling)._native(self._core) for each in params],
            (kv or KVConfig())._native(),
            max_batch,
            parse_special,
        )
        return [GenerateResult._of(result) for result in native]

    @property
    def chat_template(self) -> _core.ChatTemplate:
        """The folder's chat template; raises TemplateError where it has none."""
        return _core.ChatTemplate.from_folder(self.folder)

    @overload
    def chat_completion(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] | None = None,
        tools: Tools | None = None,
        chat_template: _core.ChatTemplate | str | os.PathLike[str] | None = None,
        kv: KVConfig | None = None,
        session: Session | None = None,
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> dict[str, Any]: ...

    @overload
    def chat_completion(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        tools: Tools | None = None,
        chat_template: _core.ChatTemplate | str | os.PathLike[str] | None = None,
        kv: KVConfig | None = None,
        session: Session | None = None,
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> Iterator[dict[str, Any]]: ...

    @overload
    def chat_completion(
        self,
        messages: Sequence[Message],
        *,
        stream: bool | None,
        tools: Tools | None = None,
        chat_template: _core.ChatTemplate | str | os.PathLike[str] | None = None,
        kv: KVConfig | None = None,
        session: Session | None = None,
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]: ...

    def chat_completion(
        self,
        messages: Sequence[Message],
        *,
        stream: bool | None = None,
        tools: Tools | None = None,
        chat_template: _core.ChatTemplate | str | os.PathLike[str] | None = None,
        kv: KVConfig | None = None,
        session: Session | None = None,
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """The assistant's reply to a conversation, in the shape of OpenAI's API.

        ``model.chat_completion(**body)`` takes a request's body as clients send it: None means a
        field's default, fields that only describe the client (``user``, ``metadata``) have no
        effect, and what is not served is refused by name.

        Args:
            messages: Dicts with role and content, a text or a list of text parts.
            stream: Give an iterator of chunks instead; closing it ends the work.
                ``stream_options={"include_usage": True}`` adds a last one with the usage.
            tools: Tool definitions, passed to the chat template unless ``tool_choice="none"``.
                Calls of them in the reply, as Llama 3, Hermes, Qwen and Mistral models and those
                that write Python spell them, become ``tool_calls``; what only looks like one
                stays text.
            chat_template: Instead of the folder's, as :class:`Chat` takes it.
            kv: How the cache is kept.
            session: A session whose cache is used as far as it agrees; a new one otherwise.
            params: Sampling parameters; keyword arguments of :class:`SamplingParams` on top, and
                OpenAI's ``max_tokens`` or ``max_completion_tokens`` for ``max_new_tokens``, ``n``
                for several choices (with a seed, choice i has seed + i and is what it would be
                alone), ``logprobs=True`` with ``top_logprobs``. With
                ``continue_final_message=True`` the reply goes on inside the last message, which
                the assistant began; the choices hold what is new.
                ``response_format`` of type ``json_object`` or ``json_schema`` makes the reply JSON
                (the extra ``mustafar[grammar]``); such a reply is never read as a tool call.

        Returns:
            A ``chat.completion`` dict, or an iterator of ``chat.completion.chunk`` dicts.

        Raises:
            TypeError: A field that is not known, or a value of the wrong kind; named.
            ValueError: A value that is not served, such as a schema with keywords that llguidance
                does not know; named.
            TemplateError: A conversation that the template refuses.
        """
        if session is None:
            native = _core.Session(self._core, (kv or KVConfig())._native(), None)
        elif kv is None:
            native = session._core
        else:
            raise ValueError("kv belongs to the session that is given")
        return chat_completion(
            self._core,
            native,
            messages,
            stream=checks.flag("stream", stream or False),
            tools=tools,
            chat_template=chat_template,
            params=params,
            sampling=sampling,
        )

    def close(self) -> None:
        """Lets the weights go once the last session is closed; later use raises StateError."""
        self._core.close()

    def __repr__(self) -> str:
        try:
            return f"<mustafar.Model {self.folder} on {self._core.device_description()}>"
        except _core.StateError:
            return "<mustafar.Model, closed>"


def _demo_model() -> Path:
    override = os.environ.get("MUSTAFAR_DEMO_MODEL")
    folder = Path(override) if override else Path(__file__).parent / "models" / "demo"
    if not folder.is_dir():
        raise _core.ModelError(f"the demo model is not at {folder}: pass a model folder")
    return folder
