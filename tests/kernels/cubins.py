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
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ARCHITECTURES = (80, 90, 100)


def paths(index, kind):
    """Where an argument stands; each element of a tuple has a place of its own."""
    return [(index, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(index,)]


def resources(case, architecture):
    """Registers a thread, bytes of shared memory a program, and bytes of stack and local memory a thread: spills."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    fixed = {name: case.constants.get(name) for name in names if name not in case.types}
    attrs = {path: [["tt.divisibility", 16]] for name in case.divisible for path in paths(names.index(name), case.types[name])}
    source = ASTSource(case.kernel, signature=signature, constexprs=fixed, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": case.num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(v) for name, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {
        "registers": found["REG"], "spill": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared,
        "threads": 32 * case.num_warps,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("op")
    parser.add_argument("--only", default="", help="kernels whose title holds this")
    parser.add_argument("--all", action="store_true", help="every configuration; default: the largest of each kernel")
    options = parser.parse_args()
    cases = importlib.import_module(f"{options.op}_cases")
    for case in (c for c in cases.cases(options.all) if options.only in c.name):
        for architecture in ARCHITECTURES:
            need = resources(case, architecture)
            print(json.dumps({"kernel": case.name, "sm": architecture, **need}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
