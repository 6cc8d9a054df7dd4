"""One call of a U-Net in bfloat16: eager, channels-last, torch.compile(max-autotune), our kernels, and those in a CUDA graph.

In a call of "ours" GroupNorm is our kernel's, and attention where a measurement says so (`fastdiff info`). Times are medians in
milliseconds; the largest difference is that of our network's output from eager torch's, over its largest value.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from gpu_networks import networks, plain
from gpu_record import keep, launched, replayed, show, start
from torch import Tensor, nn

import fastdiff as fd

BATCHES = (1, 8, 64)
COMPILED = (1, 8)  # batches that are compiled: minutes each
COMPILE_UNTIL = 200  # seconds into the stage: what is not compiled by then is not


Call = Callable[[Tensor, Tensor], Tensor]


def variants(network: nn.Module, began: float, batch: int) -> dict[str, Callable[[], tuple[Any, Call]]]:
    """Name -> what makes (the context to run it in, the call); in this order, since layouts stay what the last one made them."""
    def layout(memory: torch.memory_format) -> None:
        network.to(memory_format=memory)

    def eager() -> tuple[Any, Call]:
        layout(torch.contiguous_format)
        return plain(), network

    def channels_last() -> tuple[Any, Call]:
        layout(torch.channels_last)
        return plain(), lambda x, t: network(x.to(memory_format=torch.channels_last), t)

    def compiled() -> tuple[Any, Call]:
        if batch not in COMPILED or time.monotonic() - began > COMPILE_UNTIL:
            raise TimeoutError("not compiled: out of time")
        torch._dynamo.reset()
        layout(torch.channels_last)
        return plain(), torch.compile(network, mode="max-autotune")

    def ours() -> tuple[Any, Call]:
        layout(torch.channels_last)
        fd.patch(network)  # what it patches stays so: it comes last
        return contextlib.nullcontext(), lambda x, t: network(x.to(memory_format=torch.channels_last), t)

    return {"eager": eager, "channels-last": channels_last, "max-autotune": compiled, "ours": ours}


def measure(name: str, network: nn.Module, shape: tuple[int, ...], batch: int, began: float) -> dict[str, Any]:
    x = torch.randn(batch, *shape, device="cuda", dtype=torch.bfloat16)
    t = torch.full((batch,), 0.5, device="cuda")
    row: dict[str, Any] = {"network": name, "batch": batch}
    outputs = {}
    for variant, make in variants(network, began, batch).items():
        try:
            context, call = make()
            with context:
                outputs[variant] = call(x, t).clone()
                row[f"{variant} ms"] = launched([lambda call=call: call(x, t)]) / 1000
                if variant in ("channels-last", "ours"):
                    row[f"{variant} graph ms"] = replayed([lambda call=call: call(x, t)]) / 1000
        except TimeoutError as e:
            row["left out"] = str(e)
        except Exception as e:  # the other variants still have their say
            traceback.print_exc()
            row["problem"] = f"{variant}: {type(e).__name__}: {e}"[:200]
    if {"eager", "ours"} <= set(outputs):
        right = outputs["eager"].float()
        row["difference"] = ((outputs["ours"].float() - right).abs().max() / right.abs().max()).item()
    best = row.get("ours graph ms")
    if best:
        row |= {f"{v} over ours+graph": row[f"{v} ms"] / best for v in ("eager", "max-autotune") if f"{v} ms" in row}
    return row


def main() -> None:
    start()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("out of time"))  # what gpu.sh sends: what was measured is kept
    rows: list[dict[str, Any]] = []
    try:
        everything(rows, began)
    finally:
        show(rows)
        keep("unet", rows)
    sys.exit(any("problem" in row for row in rows))


def everything(rows: list[dict[str, Any]], began: float) -> None:
    for name, make in networks().items():
        for batch in BATCHES:
            torch.manual_seed(0)
            network, shape = make()
            network = network.to("cuda", torch.bfloat16).eval().requires_grad_(False)
            for p in network.parameters():
                if not p.any():  # layers that start at zero would hide what lies before them
                    torch.nn.init.normal_(p, std=0.02)
            with torch.no_grad():
                rows.append(measure(name, network, shape, batch, began))
            del network
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
