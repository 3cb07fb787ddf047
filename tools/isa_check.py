"""Checks that one binary may hold code for several instruction sets.

    python tools/isa_check.py BUILD_FOLDER

Reads compile_commands.json and the object files of an x86-64 build. Two things must hold for the
library to start on any x86-64 machine: only files whose name ends in an instruction set (as
cpp/CMakeLists.txt gives out flags) are compiled for more than the baseline; and no function that
such a file shares with another, an inline function or a template's instance, exists in a version of
its own, since the linker keeps one of the two for everybody.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

SUFFIX = re.compile(r"_(avx2|avx512|avx512bf16|amx)\.cc$")
FLAG = re.compile(r"^-m(arch=|tune=native|cpu=|avx|amx|fma|f16c|bmi|popcnt|sse[34]|ssse3)")


def shared_functions(objects: list[Path]) -> dict[str, set[Path]]:
    """Weak functions, by name, with the object files that define them."""
    owners: dict[str, set[Path]] = defaultdict(set)
    for path in objects:
        run = subprocess.run(
            ["nm", "--defined-only", "--format=posix", path],
            capture_output=True,
            text=True,
            check=True,
        )
        for line in run.stdout.splitlines():
            name, kind = line.split()[:2]
            if kind in "Ww":
                owners[name].add(path)
    return owners


def main() -> None:
    build = Path(sys.argv[1])
    commands = json.loads((build / "compile_commands.json").read_text())
    wrong: list[str] = []
    kernels: list[Path] = []
    others: list[Path] = []
    for entry in commands:
        words = entry["command"].split()
        source = Path(entry["file"])
        output = Path(entry["directory"]) / words[words.index("-o") + 1]
        flags = [word for word in words if FLAG.match(word)]
        if SUFFIX.search(source.name):
            kernels.append(output)
        else:
            others.append(output)
            if flags:
                wrong.append(f"{source} is compiled with {' '.join(flags)}")
    present = [path for path in others if path.exists()]
    elsewhere = shared_functions(present)
    for name, owners in sorted(shared_functions(kernels).items()):
        if name in elsewhere:
            files = ", ".join(sorted(path.name for path in owners))
            wrong.append(f"{name} of {files} is in {min(elsewhere[name]).name} too")
    for line in wrong:
        print(line, file=sys.stderr)
    print(
        f"{len(kernels)} files for an instruction set, {len(present)} for the baseline, "
        f"{len(wrong)} faults"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
