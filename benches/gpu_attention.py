"""Attention at U-Net sites in bfloat16: ours against every backend of torch, in microseconds and TFLOP/s.

Prints the lines of `fastdiff.kernels.attention.FASTER`: the sites where ours is faster than the best backend of torch.
"""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_record import Row, show
from gpu_stage import Case, Stage, problem
from gpu_timing import DEVICE, copies, launched, replayed
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.kernels import attention as m

# heads, queries, keys, head: Stable Diffusion 1.5's self and cross sites at 64x64 latents; heads of 64 as ADM and SDXL have them
SITES = [
    (8, 4096, 4096, 40), (8, 4096, 77, 40), (8, 1024, 1024, 80), (8, 1024, 77, 80), (8, 256, 256, 160), (8, 256, 77, 160),
    (8, 64, 64, 160), (8, 64, 77, 160), (10, 4096, 4096, 64), (20, 1024, 1024, 64), (20, 1024, 77, 64), (4, 1024, 1024, 64),
    (6, 256, 256, 64), (8, 64, 64, 64), (8, 16, 16, 64),
]  # fmt: skip
BATCHES = (8, 1, 2, 64)
LARGEST = 2e13  # FLOP of one call; larger sites are left out
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
LONG = ("refused", "site", "seconds")  # columns of the record that the table leaves out
MARGIN = 0.97  # of the best backend's time: what counts as faster


def contestants() -> dict[str, Callable[..., Any]]:
    def by(backend: SDPBackend) -> Callable[..., torch.Tensor]:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.fastdiff.attention(q, k, v, None, None)[0]

    return {"ours": ours, **{name: by(backend) for name, backend in BACKENDS.items()}}


def projected(batch: int, heads: int, queries: int, keys: int, head: int) -> tuple[torch.Tensor, ...]:
    """q, k and v as projections leave them: 3 parts of one where a layer looks at itself, else queries, and 2 of the context."""
    def rows(length: int, parts: int) -> tuple[torch.Tensor, ...]:
        whole = torch.randn(batch, length, parts * heads * head, dtype=torch.bfloat16, device=DEVICE)
        return tuple(x.unflatten(-1, (heads, head)).transpose(1, 2) for x in whole.chunk(parts, -1))

    return rows(queries, 3) if queries == keys else (*rows(queries, 1), *rows(keys, 2))


@torch.no_grad()
def measure(batch: int, heads: int, queries: int, keys: int, head: int) -> Row:
    moved = 2 * 2 * batch * heads * head * (queries + keys)
    given = [projected(batch, heads, queries, keys, head) for _ in range(copies(moved))]
    row: Row = {}
    for name, f in contestants().items():
        try:
            calls = [lambda f=f, qkv=qkv: f(*qkv) for qkv in given]
            row[f"{name} us"] = replayed(calls)
            row[f"{name} launched us"] = launched(calls)
        except Exception as e:  # a backend may not take the shape: cuDNN not every head, flash not every dtype
            row["refused"] = [*row.get("refused", []), f"{name}: {problem(e)}"]
            if name == "ours":
                traceback.print_exc()
                row["problem"] = problem(e)
    ours, best = row.get("ours us"), min((row[f"{name} us"] for name in BACKENDS if f"{name} us" in row), default=None)
    if ours is None or best is None:
        return row
    row |= {"ours TFLOP/s": 4 * batch * heads * queries * keys * head / ours / 1e6, "ours over best": best / ours}
    if ours < MARGIN * best:
        row["site"] = m.site(*given[0][:2], architecture())
    return row


def architecture() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def cases() -> Iterator[Case]:
    for batch, (heads, queries, keys, head) in itertools.product(BATCHES, SITES):
        if 4 * batch * heads * queries * keys * head <= LARGEST:
            size = (batch, heads, queries, keys, head)
            yield Case({"shape": "x".join(map(str, size))}, partial(measure, *size))


def table(rows: Sequence[Row]) -> None:
    show([{name: value for name, value in row.items() if name not in LONG} for row in rows])
    print("FASTER, to be put into kernels/attention.py:")
    for found in sorted({tuple(row["site"]) for row in rows if "site" in row}):
        print(f"    {found},")


stage = Stage("attention", lambda: list(cases()), seconds=100, show=table)

if __name__ == "__main__":
    sys.exit(stage.main())
