"""Attention at U-Net sites in bfloat16: ours against every backend of torch, in microseconds and TFLOP/s.

Prints the lines of `fastdiff.kernels.attention.FASTER`: the sites where ours is faster than the best backend of torch.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_record import copies, keep, launched, replayed, show, start
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.kernels import attention as m

# heads, queries, keys, head: Stable Diffusion 1.5's self and cross sites at 64x64 latents; heads of 64 as ADM and SDXL have them
SITES = [
    (8, 4096, 4096, 40), (8, 4096, 77, 40), (8, 1024, 1024, 80), (8, 1024, 77, 80), (8, 256, 256, 160), (8, 256, 77, 160),
    (8, 64, 64, 160), (8, 64, 77, 160), (10, 4096, 4096, 64), (20, 1024, 1024, 64), (20, 1024, 77, 64), (4, 1024, 1024, 64),
    (6, 256, 256, 64), (8, 64, 64, 64), (8, 16, 16, 64),
]  # fmt: skip
BATCHES = (1, 2, 8, 64)
LARGEST = 2e13  # FLOP of one call; larger sites are left out
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
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
        whole = torch.randn(batch, length, parts * heads * head, dtype=torch.bfloat16, device="cuda")
        return tuple(x.unflatten(-1, (heads, head)).transpose(1, 2) for x in whole.chunk(parts, -1))

    return rows(queries, 3) if queries == keys else (*rows(queries, 1), *rows(keys, 2))


def measure(batch: int, heads: int, queries: int, keys: int, head: int) -> dict[str, Any]:
    moved = 2 * 2 * batch * heads * head * (queries + keys)
    given = [projected(batch, heads, queries, keys, head) for _ in range(copies(moved))]
    row: dict[str, Any] = {"shape": f"{batch}x{heads}x{queries}x{keys}x{head}"}
    for name, f in contestants().items():
        try:
            calls = [lambda f=f, qkv=qkv: f(*qkv) for qkv in given]
            row[f"{name} us"] = replayed(calls)
            row[f"{name} launched us"] = launched(calls)
        except Exception as e:  # a backend may not take the shape: cuDNN not every head, flash not every dtype
            row[f"{name} us"] = float("inf")
            row["refused"] = f"{row.get('refused', '')} {name}: {str(e).splitlines()[0][:80]}".strip()
            if name == "ours":
                traceback.print_exc()
                row["problem"] = f"{type(e).__name__}: {e}"[:200]
    best = min(row[f"{name} us"] for name in BACKENDS)
    flop = 4 * batch * heads * queries * keys * head
    row |= {"ours TFLOP/s": flop / row["ours us"] / 1e6, "ours over best": best / row["ours us"]}
    if row["ours us"] < MARGIN * best:
        major, minor = torch.cuda.get_device_capability()
        row["site"] = m.site(*given[0][:2], 10 * major + minor)
    return {key: value for key, value in row.items() if value != float("inf")}


def main() -> None:
    start()
    rows = []
    with torch.no_grad():
        for batch in BATCHES:
            for heads, queries, keys, head in SITES:
                if 4 * batch * heads * queries * keys * head <= LARGEST:
                    rows.append(measure(batch, heads, queries, keys, head))
                    torch.cuda.empty_cache()
    show(rows)
    print("FASTER, to be put into kernels/attention.py:")
    for found in sorted({row["site"] for row in rows if "site" in row}):
        print(f"    {found},")
    keep("attention", rows)
    sys.exit(any("problem" in row for row in rows))


if __name__ == "__main__":
    main()
