"""Every kernel at small, odd shapes under compute-sanitizer: memory outside buffers, races in shared memory.

    benches/gpu.sh --only sanitize         # SKIPPED where compute-sanitizer (CUDA toolkit) is not on the path
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from functools import partial

import torch
from gpu_record import Row
from gpu_stage import SKIPPED, Case, Stage, start
from gpu_timing import DEVICE

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # compute-sanitizer's exit code where it found something
KERNELS = "--kernels"  # what the tool runs: this file again
REGISTERED = [importlib.import_module(f"fastdiff.kernels.{op}") for op in ("group_norm", "attention", "combine")]


def group_norm() -> None:
    for shape, groups in (((2, 6, 7, 5), 2), ((1, 64, 33, 31), 32), ((1, 6, 150, 151), 2)):
        x = torch.randn(shape).bfloat16().requires_grad_()
        for v in (x, x[:, :, ::2], x.to(memory_format=torch.channels_last)):
            weight = torch.randn(shape[1]).bfloat16()
            torch.ops.fastdiff.group_norm(v, groups, weight, weight, 1e-5, None, None, True, torch.randn(shape[:2]).bfloat16())
            y = torch.ops.fastdiff.add_group_norm(v, v, groups, weight, weight, 1e-5, None, None, True)
            (y[0].sum() + y[1].sum()).backward()


def attention() -> None:
    for queries, keys, head in ((37, 77, 40), (19, 300, 80), (130, 130, 160), (5, 3, 8), (2049, 65, 64), (33, 90, 256)):
        q, k, v = (torch.randn(1, n, 2, head).half().transpose(1, 2) for n in (queries, keys, keys))
        out, sums = torch.ops.fastdiff.attention(q, k, v, None, None)
        torch.ops.fastdiff.attention(q, k, v, q, None)
        if head <= 128:
            torch.ops.fastdiff.attention_backward(q, q, k, v, out, sums, None)
        lengths = [n + -n % 8 for n in (queries, keys, keys)]  # others would be copied
        q, k, v = (torch.randn(1, 2, head, n).half().transpose(-1, -2) for n in lengths)
        torch.ops.fastdiff.attention(q, k, v, None, 0.5)


def combine() -> None:
    for shape, inputs, outputs in (((3, 1, 7, 9), 16, 8), ((2, 4, 16, 16), 3, 2), ((1, 5), 1, 1)):
        columns = [torch.randn(shape) for _ in range(inputs)]
        seeds = torch.arange(shape[0])
        torch.ops.fastdiff.combine(columns, torch.randn(outputs, inputs + 1), seeds, 3)


def kernels() -> None:
    with DEVICE:
        for run in (group_norm, attention, combine):
            run()
    torch.cuda.synchronize()


def watched(tool: str) -> Row:
    """A run of this file's kernels under one tool; every allocation is its own, so that the next one lies beside no other."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, __file__, KERNELS]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = [line for line in out.stdout.splitlines() if line.startswith("=========")]
    row = {"said": said[-1][10:].strip() if said else out.stderr[-200:]}
    if out.returncode:
        print(out.stdout[-4000:], out.stderr[-2000:], sep="\n")
        row["problem"] = f"ended with {out.returncode}"
    return row


def cases() -> list[Case]:
    kernels()  # compiled and cached before a tool slows everything down
    return [Case({"tool": tool}, partial(watched, tool)) for tool in TOOLS]


stage = Stage("sanitize", cases, seconds=120, longest=120, warmed=False)


def main() -> int:
    if KERNELS in sys.argv:
        kernels()
        return 0
    start()
    if shutil.which("compute-sanitizer") is None:
        print(f"sanitize needs compute-sanitizer on the path (CUDA toolkit; looked in {os.environ.get('PATH', '')})")
        return SKIPPED
    return stage.main()


if __name__ == "__main__":
    sys.exit(main())
