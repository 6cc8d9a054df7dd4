"""One call of a U-Net in bfloat16: eager, channels-last, torch.compile(max-autotune), our kernels, and those in a CUDA graph.

In a call of "ours" GroupNorm is our kernel's, and attention where a measurement says so (`fastdiff info`). Times are medians in
milliseconds; `difference` is that of our network's output from eager torch's, over its largest value.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from gpu_networks import NETWORKS, plain, prepared
from gpu_record import Row, show
from gpu_stage import Case, Stage
from gpu_timing import DEVICE, launched, replayed, warm
from torch import Tensor, nn

import fastdiff as fd

BATCHES = (1, 8, 64)
COMPILED = (1, 8)  # batches that are compiled: minutes each, so all of them come last
GRAPHS = ("channels-last", "ours")

Call = Callable[[Tensor, Tensor], Tensor]


def laid(network: nn.Module, memory: torch.memory_format) -> Call:
    network.to(memory_format=memory)
    return lambda x, t: network(x.to(memory_format=memory), t)


@contextlib.contextmanager
def eager(network: nn.Module) -> Iterator[Call]:
    with plain():
        yield laid(network, torch.contiguous_format)


@contextlib.contextmanager
def channels_last(network: nn.Module) -> Iterator[Call]:
    with plain():
        yield laid(network, torch.channels_last)


@contextlib.contextmanager
def ours(network: nn.Module) -> Iterator[Call]:
    report = fd.patch(network)
    yield laid(network, torch.channels_last)
    report.undo()


@contextlib.contextmanager
def compiled(network: nn.Module) -> Iterator[Call]:
    torch._dynamo.reset()
    with plain():
        yield torch.compile(laid(network, torch.channels_last), mode="max-autotune")


VARIANTS: dict[str, Callable[[nn.Module], contextlib.AbstractContextManager[Call]]] = {
    "eager": eager, "channels-last": channels_last, "ours": ours, "max-autotune": compiled,
}  # fmt: skip


@torch.no_grad()
def measure(name: str, batch: int, variant: str) -> Row:
    network, shape = prepared(name), NETWORKS[name][1]
    generator = torch.Generator(DEVICE).manual_seed(batch)
    x = torch.randn(batch, *shape, generator=generator, device=DEVICE).bfloat16()
    t = torch.full((batch,), 0.5, device=DEVICE)
    row: Row = {}
    with VARIANTS[variant](network) as call:
        y = call(x, t).float()
        row["ms"] = launched([lambda: call(x, t)]) / 1000
        if variant in GRAPHS:
            row["graph ms"] = replayed([lambda: call(x, t)]) / 1000
    if variant == "ours":
        with eager(network) as call:
            right = call(x, t).float()
        row["difference"] = ((y - right).abs().max() / right.abs().max()).item()
    return row


def cases() -> Iterator[Case]:
    def case(name: str, batch: int, variant: str) -> Case:
        return Case({"network": name, "batch": batch, "variant": variant}, partial(measure, name, batch, variant))

    for name in NETWORKS:
        for batch in BATCHES:
            yield from (case(name, batch, variant) for variant in VARIANTS if variant != "max-autotune")
    if not warm():  # what it chooses by its own timings it should choose alone on the GPU
        yield from (case(name, batch, "max-autotune") for name in NETWORKS for batch in COMPILED)


def table(rows: Sequence[Row]) -> None:
    """A line a network and batch, and how many times ours in a graph is as fast as the others."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault((row["network"], row["batch"]), {"network": row["network"], "batch": row["batch"]})
        line |= {f"{row['variant']} {key}": row[key] for key in ("ms", "graph ms") if key in row}
        line |= {key: row[key] for key in ("difference", "problem") if key in row}
    for line in lines.values():
        if best := line.get("ours graph ms"):
            others = ("eager", "max-autotune")
            line |= {f"{other} over ours + graph": line[f"{other} ms"] / best for other in others if f"{other} ms" in line}
    show(list(lines.values()))


stage = Stage("unet", lambda: list(cases()), seconds=180, longest=200, show=table)

if __name__ == "__main__":
    sys.exit(stage.main())
