"""Llama inference with a KV cache pruned to a bitmap-sparse form at run time.

No PyTorch: a native runtime behind numpy arrays. The usual way in::

    import mustafar

    model = mustafar.Model("path/to/a/hugging-face/folder")
    session = mustafar.Session(model, kv=mustafar.KVConfig(sparsity=0.5))
    print(session.generate("Once upon a time", max_new_tokens=64).text)
"""

from ._core import (
    Cancelled,
    ChatTemplate,
    ContextOverflow,
    DeviceError,
    Error,
    ModelError,
    OutOfMemory,
    Profile,
    QueueFull,
    StateError,
    TemplateError,
    Tokenizer,
    TokenizerError,
)
from ._core import (
    version as __version__,
)
from .blocks import CompressedBlocks, compress, decompress
from .calibration import auto_profile, calibrate
from .chat import Chat
from .engine import Engine, EngineStats, Request
from .model import Model, ModelMemory
from .quantization import QuantizeResult, quantize
from .session import Session
from .stream import ChatStream, Stream
from .types import (
    GenerateResult,
    GenerateStats,
    KVConfig,
    MemoryUsage,
    SamplingParams,
    TokenLogprob,
    kv_presets,
)

__all__ = [
    "Cancelled",
    "Chat",
    "ChatStream",
    "ChatTemplate",
    "CompressedBlocks",
    "ContextOverflow",
    "DeviceError",
    "Engine",
    "EngineStats",
    "Error",
    "GenerateResult",
    "GenerateStats",
    "KVConfig",
    "MemoryUsage",
    "Model",
    "ModelError",
    "ModelMemory",
    "OutOfMemory",
    "Profile",
    "QuantizeResult",
    "QueueFull",
    "Request",
    "SamplingParams",
    "Session",
    "StateError",
    "Stream",
    "TemplateError",
    "TokenLogprob",
    "Tokenizer",
    "TokenizerError",
    "__version__",
    "auto_profile",
    "calibrate",
    "compress",
    "decompress",
    "kv_presets",
    "quantize",
]
