"""Models by the id of their repository on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import _core
from ._core import ModelError

_REPOSITORY = r"[A-Za-z0-9_-][\w.-]*/[A-Za-z0-9_-][\w.-]*"
# What a model is loaded from: weights in other formats are left where they are.
_FILES = ["*.json", "*.safetensors", "*.jinja"]


def find_model(path: str | os.PathLike[str]) -> Path:
    """The folder to load a model from.

    Args:
        path: A folder, or a repository id (``"organisation/name"``).

    Returns:
        The folder itself; the repository's newest snapshot in the local cache; or, where there is
        none and huggingface_hub can be imported, the snapshot that it downloads now.

    Raises:
        ModelError: A repository that is not in the cache and can't be downloaded.
    """
    try:
        return Path(_core.find_model_folder(Path(path)))
    except ModelError as missing:
        if not re.fullmatch(_REPOSITORY, os.fspath(path)) or Path(path).exists():
            raise
        try:
            from huggingface_hub import snapshot_download
        except ImportError:
            raise missing from None
        try:
            return Path(snapshot_download(os.fspath(path), allow_patterns=_FILES))
        except (OSError, ValueError) as error:  # what the hub's own errors derive from
            raise type(missing)(f"{missing}; downloading it failed: {error}") from error
