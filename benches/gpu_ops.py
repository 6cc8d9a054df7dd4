"""GroupNorm + SiLU at U-Net and autoencoder sites: ours, eager torch and compiled torch, in microseconds and GB/s."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from gpu_record import copies, keep, launched, replayed, show, start

from fastdiff.kernels import group_norm as m

# channels, height = width: Stable Diffusion 1.5's and ADM's sites, then an autoencoder's
SITES = [(320, 64), (640, 64), (640, 32), (1280, 32), (1280, 16), (1280, 8), (2560, 8), (128, 32), (256, 16), (128, 512)]
BATCHES = (1, 8, 64)
LARGEST = 2**31  # bytes of one input; larger sites are left out


def contestants() -> dict[str, Callable[..., Any]]:
    def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return m.reference(x, m.Norm(32, weight, bias, 1e-5))

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.fastdiff.group_norm(x, 32, weight, bias, 1e-5, None, None, True)[0]

    return {"ours": ours, "eager": eager, "compiled": torch.compile(eager, dynamic=False)}


def reads(x: torch.Tensor) -> int:
    """How often our kernels read x."""
    from fastdiff.kernels import group_norm_triton as kernels

    v = m.flat(x)
    return 1 if kernels.on_chip(v.shape[1] // 32, v.shape[2], v.stride(1) == 1, kernels.aligned(v)) else 2


def site(batch: int, channels: int, size: int, channels_last: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (batch, channels, size, size)
    one = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    count = copies(2 * one.numel() * one.element_size())
    xs = [torch.randn_like(one).contiguous(memory_format=layout) for _ in range(count)]
    weight, bias = torch.randn(2, channels, dtype=torch.bfloat16, device="cuda")
    moved = {"ours": 1 + reads(xs[0]), "copy": 2}
    row: dict[str, Any] = {"shape": "x".join(map(str, shape)), "layout": "nhwc" if channels_last else "nchw"}
    row["reads"] = reads(xs[0])
    runs = {name: [lambda f=f, x=x: f(x, weight, bias) for x in xs] for name, f in contestants().items()}
    runs["copy"] = [lambda x=x: x.clone() for x in xs]
    for name, calls in runs.items():
        try:
            row[f"{name} us"] = replayed(calls)
            row[f"{name} launched us"] = launched(calls)
        except Exception as e:  # the other contestants still have their say
            traceback.print_exc()
            row["problem"] = f"{name}: {type(e).__name__}: {e}"[:200]
            continue
        if name in moved:
            row[f"{name} GB/s"] = moved[name] * one.numel() * one.element_size() / row[f"{name} us"] / 1000
    return row


def main() -> None:
    start()
    rows = []
    with torch.no_grad():
        for batch in BATCHES:
            for channels, size in SITES:
                if 2 * batch * channels * size * size > LARGEST:
                    continue
                rows += [site(batch, channels, size, last) for last in (False, True)]
                torch.cuda.empty_cache()
    show(rows)
    keep("ops", rows)
    sys.exit(any("problem" in row for row in rows))


if __name__ == "__main__":
    main()
