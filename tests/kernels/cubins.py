"""Compiles kernels for GPUs that are not here and says what each needs; run by test_group_norm_triton and the like.

    python tests/kernels/cubins.py group_norm [--all]    # one JSON line a kernel, configuration and architecture
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiff.kernels.tile_triton import FUSED


@dataclass(frozen=True)
class Case:
    """A kernel and what its launcher asks the compiler for. An argument's type may be a tuple of types; a constant's key is an
    argument's name, or its name and the place in such a tuple."""

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[Any, Any]
    num_warps: int
    divisible: set[str]  # by 16, of which Triton makes a variant of its own
    num_stages: int = 3  # Triton's default
    elements: int = 0  # of a thread, at a U-Net's site: the instructions of the kernel or of its loop are held to their number
    most: float = 0.0  # instructions an element
    maxnreg: int | None = None  # registers of a thread, at most
    read: bool = False  # whether the code is read, which takes longer than to compile it


TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHITECTURES = (80, 90, 100)


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?!NOP)(?:@!?U?P\w+ +)?[A-Z]")  # at its address; NOPs fill up the last lines

NARROW = re.compile(r"(?:LDG|STG)\.E\.[US](?:8|16)")


def run(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def loop(code):
    """Instructions of the longest loop: from a label to the last branch back to it."""
    begins, longest, count = {}, 0, 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            begins[label[1]] = count
        count += bool(INSTRUCTION.search(line))
        if (back := re.search(r"BRA .*`\((\.L_x_\d+)\)", line)) and back[1] in begins:
            longest = max(longest, count - begins[back[1]])
    return longest


def paths(index, kind):
    """Where an argument stands; each element of a tuple has a place of its own."""
    return [(index, i) for i, k in enumerate(kind) if k != "constexpr"] if isinstance(kind, tuple) else [(index,)]


def resources(case, architecture):
    """What a kernel needs, compiled for an architecture."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    fixed = {name: case.constants.get(name) for name in names if name not in case.types}
    fixed |= {(names.index(k[0]), k[1]): v for k, v in case.constants.items() if isinstance(k, tuple)}
    attrs = {path: [["tt.divisibility", 16]] for name in case.divisible for path in paths(names.index(name), case.types[name])}
    source = ASTSource(case.kernel, signature=signature, constexprs=fixed, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg, **FUSED}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return {**measured(compiled, case.read), "elements": case.elements, "most": case.most}


def measured(compiled, read):
    """Registers a thread, bytes of shared memory a program, bytes of stack and local memory a thread (spills); and where the code
    is read, instructions, all and those of the loop, and how many of them move two bytes or one."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = run("cuobjdump", "--dump-resource-usage", file.name)
        code = run("nvdisasm", "-c", file.name) if read else None
    found = {name: int(v) for name, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    need = {
        "registers": found["REG"], "spill": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
    }  # fmt: skip
    if code is not None:
        need |= {"instructions": len(INSTRUCTION.findall(code)), "loop": loop(code), "narrow": len(NARROW.findall(code))}
    return need


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("op")
    parser.add_argument("--only", default="", help="kernels whose title holds this")
    parser.add_argument("--all", action="store_true", help="every configuration; all GPUs for the sites too")
    options = parser.parse_args()
    sys.modules["cubins"] = sys.modules["__main__"]  # where the cases find Case
    cases = importlib.import_module(f"{options.op}_cases")
    for case in (c for c in cases.cases(options.all) if options.only in c.name):
        for architecture in (90,) if case.elements and not options.all else ARCHITECTURES:
            need = resources(case, architecture)
            print(json.dumps({"kernel": case.name, "sm": architecture, **need}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
