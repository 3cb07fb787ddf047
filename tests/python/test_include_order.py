"""The floors of the C++ sources: no file includes a header of a floor above its own."""

from __future__ import annotations

import re
from pathlib import Path

from support.paths import ROOT

# From the ground up. Folders on one floor do not see each other.
FLOORS = [
    ["public"],  # headers of plain data in cpp/include, which any floor may see
    ["core"],
    ["format"],
    ["io", "text"],
    ["backend"],
    ["kv", "cuda"],
    ["model"],
    ["runtime"],
    ["cli", "bindings"],
]
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}

# Public headers that are the face of a folder, not plain data.
FACES = {
    "tokenizer.h": "text",
    "chat_template.h": "text",
    "model.h": "runtime",
    "profile.h": "runtime",
    "session.h": "runtime",
    "calibration.h": "runtime",
    "quantize.h": "runtime",
    "engine.h": "runtime",
    "chat.h": "runtime",
    "tool_calls.h": "runtime",
}

# What no other folder sees, but for the one place that knows which backends there are.
UNSEEN = {"cuda"}
EXCEPTIONS = {("cpp/backend/factory.cc", "cuda/cuda_backend.h")}

SOURCES = {".cc", ".h", ".cu", ".cuh"}
INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')


def folder_of(path: str) -> str | None:
    """The folder of FLOOR that a source of the repository belongs to; None: outside of all."""
    parts = path.split("/")
    if parts[:3] == ["cpp", "include", "mustafar"]:
        return FACES.get(parts[3], "public")
    if parts[0] == "cpp":
        return parts[1]
    if parts[0] == "cuda":
        return "cuda"
    return "bindings" if parts[:2] == ["python", "bindings"] else None


def target_of(path: str, included: str) -> str | None:
    """The folder of FLOOR that an include of this file leads to; None: a header beside it."""
    first, _, rest = included.partition("/")
    if not rest:
        return None
    return FACES.get(rest, "public") if first == "mustafar" else first


def violations(root: Path) -> list[str]:
    """Every include that goes up, or across a floor: "file:line: ..."."""
    found = []
    for top in ("cpp", "cuda", "python/bindings"):
        for file in sorted(p for p in (root / top).rglob("*") if p.suffix in SOURCES):
            path = file.relative_to(root).as_posix()
            own = folder_of(path)
            for number, line in enumerate(file.read_text().splitlines(), 1):
                match = INCLUDE.match(line)
                if match is None or (path, match[1]) in EXCEPTIONS:
                    continue
                target = target_of(path, match[1])
                if target in (None, own):
                    continue
                if own not in FLOOR or target not in FLOOR:
                    where = f"{own if own not in FLOOR else target} stands on no floor"
                elif FLOOR[target] >= FLOOR[own] or target in UNSEEN:
                    where = f"{own} may not see {target}"
                else:
                    continue
                found.append(f'{path}:{number}: includes "{match[1]}": {where}')
    return found


def test_no_header_stands_above_its_user() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_an_include_that_goes_up_is_found(tmp_path: Path) -> None:
    for path, text in {
        "cpp/core/a.h": '// why\n#include "format/block_format.h"\n',
        "cpp/kv/b.cc": '#include "mustafar/session.h"\n#include "mustafar/error.h"\n',
        "cpp/io/c.cc": '#include "text/unicode.h"\n#include "core/buffer.h"\n',
        "cpp/include/mustafar/kv_config.h": '#include "mustafar/model.h"\n',
        "cpp/model/m.cc": '#include "cuda/linear.h"\n',
        "cpp/new/d.cc": '#include "core/buffer.h"\n',
        "cuda/e.cu": '#include "kv/block_pool.h"\n#include "simt.h"\n',
        "python/bindings/f.cc": '#include "runtime/kv_statistics.h"\n',
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert violations(tmp_path) == [
        'cpp/core/a.h:2: includes "format/block_format.h": core may not see format',
        'cpp/include/mustafar/kv_config.h:1: includes "mustafar/model.h": '
        "public may not see runtime",
        'cpp/io/c.cc:1: includes "text/unicode.h": io may not see text',
        'cpp/kv/b.cc:1: includes "mustafar/session.h": kv may not see runtime',
        'cpp/model/m.cc:1: includes "cuda/linear.h": model may not see cuda',
        'cpp/new/d.cc:1: includes "core/buffer.h": new stands on no floor',
        'cuda/e.cu:1: includes "kv/block_pool.h": cuda may not see kv',
    ]
