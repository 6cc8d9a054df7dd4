"""Every kernel at small, odd shapes under compute-sanitizer: memory outside buffers, races in shared memory.

    benches/gpu.sh --only sanitize         # SKIPPED where compute-sanitizer (CUDA toolkit) is not on the path
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from typing import Any

import torch
from gpu_record import SKIPPED, keep, show, start

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # compute-sanitizer's exit code where it found something
INNER = "--inner"
REGISTERED = [importlib.import_module(f"fastdiff.kernels.{op}") for op in ("group_norm", "attention", "combine")]


def group_norm() -> None:
    for shape, groups in (((2, 6, 7, 5), 2), ((1, 64, 33, 31), 32), ((1, 6, 150, 151), 2)):
        x = torch.randn(shape, device="cuda").bfloat16().requires_grad_()
        for v in (x, x[:, :, ::2], x.to(memory_format=torch.channels_last)):
            weight = torch.randn(shape[1], device="cuda").bfloat16()
            y = torch.ops.fastdiff.add_group_norm(v, v, groups, weight, weight, 1e-5, None, None, True)
            (y[0].sum() + y[1].sum()).backward()


def attention() -> None:
    for queries, keys, head in ((37, 77, 40), (19, 300, 80), (130, 130, 160), (5, 3, 8), (2049, 65, 64), (33, 90, 256)):
        q, k, v = (torch.randn(1, n, 2, head, device="cuda").half().transpose(1, 2) for n in (queries, keys, keys))
        out, sums = torch.ops.fastdiff.attention(q, k, v, None, None)
        torch.ops.fastdiff.attention(q, k, v, q, None)
        if head <= 128:
            torch.ops.fastdiff.attention_backward(q, q, k, v, out, sums, None)
        lengths = [n + -n % 8 for n in (queries, keys, keys)]  # others would be copied
        q, k, v = (torch.randn(1, 2, head, n, device="cuda").half().transpose(-1, -2) for n in lengths)
        torch.ops.fastdiff.attention(q, k, v, None, 0.5)


def combine() -> None:
    for shape, inputs, outputs in (((3, 1, 7, 9), 16, 8), ((2, 4, 16, 16), 3, 2), ((1, 5), 1, 1)):
        columns = [torch.randn(shape, device="cuda") for _ in range(inputs)]
        seeds = torch.arange(shape[0], device="cuda")
        torch.ops.fastdiff.combine(columns, torch.randn(outputs, inputs + 1, device="cuda"), seeds, 3)


def watched(tool: str) -> dict[str, Any]:
    """A run of this file's kernels under one tool; every allocation is its own, so that the next one lies beside no other."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, __file__, INNER]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    out = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    said = [line for line in out.stdout.splitlines() if line.startswith("=========")]
    row = {"tool": tool, "ok": out.returncode == 0, "said": said[-1][10:].strip() if said else out.stderr[-200:]}
    if not row["ok"]:
        print(out.stdout[-4000:], out.stderr[-2000:], sep="\n")
    return row


def main() -> int:
    if INNER in sys.argv:
        for kernels in (group_norm, attention, combine):
            kernels()
            torch.cuda.synchronize()
        return 0
    start()
    if shutil.which("compute-sanitizer") is None:
        print(f"sanitize needs compute-sanitizer on the path (CUDA toolkit; looked in {os.environ.get('PATH', '')})")
        return SKIPPED
    for kernels in (group_norm, attention, combine):  # compiled and cached before the tool slows everything down
        kernels()
    rows = []
    for tool in TOOLS:
        try:
            rows.append(watched(tool))
        except subprocess.TimeoutExpired:
            rows.append({"tool": tool, "ok": False, "said": "not finished in 200 s"})
    show(rows)
    keep("sanitize", rows)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
