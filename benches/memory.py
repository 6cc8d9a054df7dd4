"""Peak memory of the eager loop: the most tensors of the state's size alive at once, beside what a solver's plan needs.

Counted after every operation inside torch, so the figures are exact and the same on every machine. The network's own activations
are not in it: it returns one new tensor.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdiff as fd
from fastdiff.plans import Plan
from fastdiff.sampling import Callback, run

SHAPE = (2, 3, 5, 7)
SLACK = 2  # states beyond the plan's registers: the point that was evaluated and the one being made


class Live(TorchDispatchMode):
    """Counts the tensors of SHAPE's size that are alive after each operation, views of one memory once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        size = torch.Size(SHAPE).numel()
        self.seen += [weakref.ref(v) for v in tree_leaves((args, out)) if isinstance(v, Tensor) and v.numel() == size]
        alive = {id(v): v for r in self.seen if (v := r()) is not None}
        self.seen = [weakref.ref(v) for v in alive.values()]
        self.peak = max(self.peak, len({v.untyped_storage().data_ptr() for v in alive.values()}))
        return out


class Network:
    """A prediction, and a variance output where a plan asks for it, each a new tensor."""

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return x * 0.5

    def with_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return x * 0.5, x * 0.1


@torch.no_grad()
def peak(plan: Plan, callback: Callback | None = None) -> int:
    """The most state-sized tensors alive at once while the plan runs, the start included."""
    with Live() as live:
        run(Network(), plan, torch.ones(SHAPE), lambda draw, shape, device: torch.ones(shape), callback)
    return live.peak


def plans() -> list[Plan]:
    """Every solver at 20 calls, and DDPM with learned variance."""
    schedule = fd.schedule.vp_linear()
    return [fd.plan(name, schedule, 20) for name in fd.list_solvers()] + [fd.plan("ddpm", schedule, 20, variance="learned")]


def main() -> int:
    over = 0
    print("solver                  needed  peak")
    for plan in plans():
        found = peak(plan)
        over += found > plan.registers + SLACK
        print(f"{plan.name:22s} {plan.registers:7d} {found:5d}{'  OVER' if found > plan.registers + SLACK else ''}")
    print(f"needed: the base and the history that a later row reads; allowed: {SLACK} states more; over: {over}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
