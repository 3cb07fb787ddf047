"""Importing is light: no torch, nothing heavy beside numpy."""

from __future__ import annotations

import subprocess
import sys


def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True
    )


def test_torch_is_never_imported() -> None:
    code = (
        "import sys, mustafar\n"
        "s = mustafar.KVConfig()\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'tokenizers', 'jinja2', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    assert run(code).stdout.strip() == "[]"


def test_only_the_standard_library_and_numpy_are_needed() -> None:
    code = (
        "import sys, numpy\n"
        "before = set(sys.modules)\n"
        "import mustafar\n"
        "tops = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(tops - set(sys.stdlib_module_names) - {'mustafar', 'numpy'}))\n"
    )
    assert run(code).stdout.strip() == "[]"
