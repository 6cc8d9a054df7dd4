"""GroupNorm + SiLU at U-Net and autoencoder sites: ours, eager torch and compiled torch, in microseconds and GB/s."""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_record import Row
from gpu_stage import Case, Stage, problem
from gpu_timing import DEVICE, copies, launched, replayed

from fastdiff.kernels import group_norm as m

# channels, height = width: Stable Diffusion 1.5's and ADM's sites, then an autoencoder's
SITES = [(320, 64), (640, 64), (640, 32), (1280, 32), (1280, 16), (1280, 8), (2560, 8), (128, 32), (256, 16), (128, 512)]
BATCHES = (8, 1, 64)
GROUPS = 32
LARGEST = 2**31  # bytes of one input; larger sites are left out


def contestants() -> dict[str, Callable[..., Any]]:
    def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return m.reference(x, m.Norm(GROUPS, weight, bias, 1e-5))

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.fastdiff.group_norm(x, GROUPS, weight, bias, 1e-5, None, None, True)[0]

    return {"ours": ours, "eager": eager, "compiled": torch.compile(eager, dynamic=False)}


def reads(x: torch.Tensor) -> int:
    """How often our kernels read x."""
    from fastdiff.kernels import group_norm_triton as kernels

    v = m.flat(x)
    return 1 if kernels.on_chip(v.shape[1] // GROUPS, v.shape[2], v.stride(1) == 1, kernels.aligned(v)) else 2


@torch.no_grad()
def site(shape: tuple[int, ...], layout: torch.memory_format) -> Row:
    torch._dynamo.reset()
    one = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    count = copies(2 * one.numel() * one.element_size())
    xs = [torch.randn_like(one).contiguous(memory_format=layout) for _ in range(count)]
    weight, bias = torch.randn(2, shape[1], dtype=torch.bfloat16, device=DEVICE)
    row: Row = {"reads": reads(xs[0])}
    moved = {"ours": 1 + row["reads"], "copy": 2}
    runs = {name: [lambda f=f, x=x: f(x, weight, bias) for x in xs] for name, f in contestants().items()}
    runs["copy"] = [lambda x=x: x.clone() for x in xs]
    for name, calls in runs.items():
        try:
            row[f"{name} us"] = replayed(calls)
            row[f"{name} launched us"] = launched(calls)
        except Exception as e:  # the other contestants still have their say
            traceback.print_exc()
            row["problem"] = f"{name}: {problem(e)}"
            continue
        if name in moved:
            row[f"{name} GB/s"] = moved[name] * one.numel() * one.element_size() / row[f"{name} us"] / 1000
    return row


def cases() -> Iterator[Case]:
    """Channels-last, in which a U-Net runs fastest, before the other layout."""
    for batch, last, (channels, size) in itertools.product(BATCHES, (True, False), SITES):
        shape = (batch, channels, size, size)
        if 2 * batch * channels * size * size <= LARGEST:
            about = {"shape": "x".join(map(str, shape)), "layout": "nhwc" if last else "nchw"}
            yield Case(about, partial(site, shape, torch.channels_last if last else torch.contiguous_format))


stage = Stage("ops", lambda: list(cases()), seconds=130)

if __name__ == "__main__":
    sys.exit(stage.main())
