#!/usr/bin/env python3
"""Count the instructions of the decode kernels' tile loops in SASS, against the design budget.

One pass of the loop serves 16 rows of K and 16 of V per warp, so instructions per row are a pass's
over 32. Nested loops (the copies of the next tile to shared memory) are listed apart, one iteration
each. Also checks that no kernel spills or touches local memory.

    nvcc ... -Xptxas -v -c cuda/decode_attention_int8.cu -o int8.o 2> int8.ptxas
    tools/sass_count.py int8.o [bf16.o ...] [--ptxas int8.ptxas ...] [--markdown docs/...]
    tools/sass_count.py --ptxas build.log    # no objects: the report of ptxas alone

Objects need cuobjdump (toolkit, or PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm) on PATH.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROWS_PER_PASS = 32  # 16 of K, 16 of V

# Warp instructions on the ALU pipe per row that an H200 can issue at full bandwidth (4.3 TB/s, 132
# multiprocessors at 1.755 GHz, half the issue slots), by mean bytes of a row; at 75 % of the
# bandwidth a third more.
BUDGET_H200 = {96: 10.3, 58: 6.2, 50: 5.4}

# Pipe of an opcode's first part on sm_80 to sm_90; what is in none goes to "other".
PIPES = {
    "tensor": {"HMMA", "IMMA", "MOVM"},
    "fma": {"FFMA", "FMUL", "FADD", "IMAD", "HADD2", "HFMA2", "HMUL2", "FFMA2", "FADD2", "FMUL2"},
    "lsu": {"LDS", "LDSM", "STS", "LDG", "STG", "LDGSTS", "LDGDEPBAR", "SHFL", "LD", "ST", "ATOMS"},
    "xu": {"MUFU", "POPC", "I2F", "I2FP", "F2I", "F2F", "FLO", "BREV"},
    "control": {
        "BRA",
        "EXIT",
        "NOP",
        "BSSY",
        "BSYNC",
        "WARPSYNC",
        "BAR",
        "DEPBAR",
        "CALL",
        "RET",
        "ERRBAR",
        "YIELD",
        "BREAK",
    },
    "alu": {
        "PRMT",
        "LOP3",
        "SHF",
        "IADD3",
        "ISETP",
        "FSETP",
        "SEL",
        "FSEL",
        "FMNMX",
        "LEA",
        "IABS",
        "IMNMX",
        "VIADD",
        "VIMNMX",
        "MOV",
        "PLOP3",
        "F2FP",
        "SGXT",
        "BMSK",
        "LEA.HI",
        "IADD",
        "P2R",
        "R2P",
        "VABSDIFF",
        "FCHK",
        "CS2R",
        "LOP",
        "FADD.FTZ",
    },
}
LOCAL_MEMORY = {"LDL", "STL"}


def pipe_of(opcode: str) -> str:
    """Pipe that issues an opcode such as "IMAD.WIDE.U32"."""
    base = opcode.split(".")[0]
    for pipe, opcodes in PIPES.items():
        if base in opcodes:
            return pipe
    return "uniform" if base.startswith(("U", "R2UR", "S2UR")) else "other"


@dataclass
class Function:
    """One kernel's instructions in order: (address, opcode, branch target or None)."""

    name: str
    arch: str
    instructions: list[tuple[int, str, int | None]] = field(default_factory=list)

    def loops(self) -> list[tuple[int, int]]:
        """Address ranges [first, last] of backward branches."""
        return [
            (target, at)
            for at, opcode, target in self.instructions
            if opcode.startswith("BRA") and target is not None and target < at
        ]

    def count(self, first: int, last: int, skip: list[tuple[int, int]]) -> Counter[str]:
        """Instructions per pipe in a range, without the ranges in skip."""
        counts: Counter[str] = Counter()
        for at, opcode, _ in self.instructions:
            if first <= at <= last and not any(a <= at <= b for a, b in skip):
                counts[pipe_of(opcode)] += 1
        return counts


def parse(sass: str) -> list[Function]:
    """Kernels of a cuobjdump -sass listing."""
    functions: list[Function] = []
    arch = "?"
    for line in sass.splitlines():
        if match := re.search(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            functions.append(Function(match[1], arch))
        elif match := re.search(
            r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line
        ):
            opcode, rest = match[2], match[3]
            target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
            functions[-1].instructions.append(
                (int(match[1], 16), opcode, int(target[1], 16) if target else None)
            )
    return functions


TAILS = {1: "f16", 2: "bf16"}  # DType


def kernel_label(mangled: str) -> str | None:
    """Readable name of a decode kernel's instance; None for other kernels."""
    coded = re.search(
        r"decode_attention_kernelINS0_10CodedShapeILNS_5DTypeE(\d)ELi(\d+)ELi(\d+)ELi(\d+)", mangled
    )
    if coded is not None:
        tail, dim, words, sets = (int(x) for x in coded.groups())
        return f"coded {32 * words / dim:g} bits ({TAILS[tail]} tail) x {dim}, {4 * sets} heads"
    match = re.search(
        r"decode_attention_kernelINS0_11DecodeShapeILNS_5DTypeE(\d)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)"
        r"ELi(\d+)",
        mangled,
    )
    if match is None:
        return None
    tail, bits, dim, keep_k, keep_v, sets = (int(x) for x in match.groups())
    tail_name = TAILS[tail]
    values = tail_name if bits == 16 else f"int{bits}"
    keep = f"K {keep_k}/32 V {keep_v}/16" if keep_k else "any keep"
    if keep_k == 32:
        keep = "dense"
    return f"{values} ({tail_name} tail) x {dim}, {keep}, {4 * sets} heads"


def tile_loop(function: Function) -> tuple[int, int] | None:
    """The loop over compressed tiles: innermost of those with tensor instructions and copies, and
    of several the one with most tensor instructions (the other serves the uncompressed tail)."""
    candidates: list[tuple[int, int, int]] = []
    for first, last in function.loops():
        inside = [op for at, op, _ in function.instructions if first <= at <= last]
        tensor = sum(pipe_of(op) == "tensor" for op in inside)
        if tensor and any(op.startswith("LDGSTS") for op in inside):
            candidates.append((tensor, first, last))
    innermost = [
        (tensor, first, last)
        for tensor, first, last in candidates
        if not any((first, last) != (a, b) and first <= a and b <= last for _, a, b in candidates)
    ]
    if not innermost:
        return None
    _, first, last = max(innermost, key=lambda loop: (loop[0], loop[1] - loop[2]))
    return first, last


def report(functions: list[Function]) -> list[str]:
    """Markdown table of the tile loops."""
    lines = [
        "| kernel | arch | issued / row | ALU / row | FMA | LSU | XU | tensor | other | copy "
        "loops, instructions an iteration |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for function in functions:
        label = kernel_label(function.name)
        loop = tile_loop(function)
        if label is None or loop is None:
            continue
        nested = [(a, b) for a, b in function.loops() if loop[0] < a and b < loop[1]]
        counts = function.count(*loop, skip=nested)
        row = {pipe: n / ROWS_PER_PASS for pipe, n in counts.items()}
        rest = sum(row.get(p, 0.0) for p in ("control", "uniform", "other"))
        copies = ", ".join(str(sum(function.count(a, b, []).values())) for a, b in nested) or "-"
        lines.append(
            f"| {label} | {function.arch} | {sum(row.values()):.1f} | {row.get('alu', 0):.1f} | "
            f"{row.get('fma', 0):.1f} | {row.get('lsu', 0):.1f} | {row.get('xu', 0):.1f} | "
            f"{row.get('tensor', 0):.1f} | {rest:.1f} | {copies} |"
        )
    return lines


def local_memory(functions: list[Function]) -> list[str]:
    """Kernels that read or write local memory."""
    return [
        f.name
        for f in functions
        if any(op.split(".")[0] in LOCAL_MEMORY for _, op, _ in f.instructions)
    ]


def spills(ptxas: str) -> list[str]:
    """Kernels that ptxas -v reports a stack frame or spills for."""
    found, name, arch = [], "?", "?"
    for line in ptxas.splitlines():
        if match := re.search(r"Compiling entry function '\S+' for '(\w+)'", line):
            arch = match[1]
        elif match := re.search(r"Function properties for (\S+)", line):
            name = f"{match[1]} ({arch})"
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            if any(int(x) for x in match.groups()):
                found.append(f"{name}: {line.strip()}")
    return found


def compiled(logs: list[str]) -> Counter[str]:
    """Kernels per architecture in logs of ptxas -v."""
    return Counter(
        arch
        for log in logs
        for arch in re.findall(r"Compiling entry function '\S+' for '(\w+)'", log)
    )


def verdict(faults: list[str], what: str) -> str:
    return "FAULTS: " + "; ".join(faults) if faults else f"none {what}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objects", nargs="*", type=Path)
    parser.add_argument("--ptxas", nargs="*", type=Path, default=[], help="logs of ptxas -v")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--cuobjdump", default="cuobjdump")
    options = parser.parse_args()
    functions: list[Function] = []
    for path in options.objects:
        listing = subprocess.run(
            [options.cuobjdump, "-sass", str(path)], check=True, capture_output=True, text=True
        ).stdout
        functions += parse(listing)
    faults = [f"local memory: {name}" for name in local_memory(functions)]
    logs = [path.read_text() for path in options.ptxas]
    for log in logs:
        faults += [f"spill: {fault}" for fault in spills(log)]
    if logs and not options.objects:
        counts = compiled(logs)
        kernels = ", ".join(f"{n} for {arch}" for arch, n in sorted(counts.items()))
        print(f"kernels compiled: {kernels or 'NONE'}; " + verdict(faults, "spills"))
        return 1 if faults or not counts else 0
    budget = ", ".join(f"{b} B rows: {n} ({n / 0.75:.1f} at 75 %)" for b, n in BUDGET_H200.items())
    lines = [
        *report(functions),
        "",
        f"ALU budget per row on an H200 at full bandwidth by mean row bytes: {budget}.",
        "",
        f"{len(functions)} kernels in {len(options.objects)} objects; "
        + verdict(faults, "uses local memory" + (" or spills" if logs else "")),
    ]
    text = "\n".join(lines) + "\n"
    if options.markdown:
        options.markdown.write_text(text)
    print(text)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
