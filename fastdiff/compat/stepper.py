"""A plan run one call at a time by somebody else's loop: the same rows, the state held here between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import FastdiffError
from ..plans import IDENTITY, Plan
from ..sampling import POINT, Predicted, advance
from ..scalars import factors


class Stepper:
    """One run of a plan. The loop outside calls the network and hands in (point, prediction); `step` returns the next point.

    The state keeps float32 (or wider) whatever the dtype of the samples that go in and out. A point that the loop outside
    changed between two steps (inpainting) is taken as it comes.
    """

    def __init__(self, plan: Plan) -> None:
        if plan.first != IDENTITY:
            raise FastdiffError(
                f"plan {plan.name} adds noise before its first call, for which a pipeline has no place: make it without churn"
            )
        self.plan = plan
        self.calls = [i for i, row in enumerate(plan.rows) if row.calls]
        self.levels = [(plan.rows[i].alpha, plan.rows[i].sigma) for i in self.calls]
        if not self.calls or self.calls[0] != 0:
            raise FastdiffError(f"plan {plan.name} does not begin with a call of the network")
        self.begin()

    def begin(self) -> None:
        """Back to the start, with nothing remembered."""
        self.done = 0  # calls so far
        self.registers: dict[int, Any] = {}
        self.state: Tensor | None = None  # the point in full precision that `returned` was cast from
        self.returned: Tensor | None = None
        self.version = 0

    @property
    def finished(self) -> bool:
        return self.done == len(self.calls)

    def point(self, sample: Tensor) -> Tensor:
        """The point in full precision: our own where the sample is what we returned, untouched; else the sample."""
        if self.state is not None and sample is self.returned and 0 <= version(sample) == self.version:
            return self.state
        return sample if sample.dtype in (torch.float32, torch.float64) else sample.float()

    def step(
        self, y: Tensor, predicted: Predicted, draw: Callable[[], Tensor], dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        """One call's row, and the rows without calls that follow it; the next point, in `dtype`."""
        steps, first = self.plan.program.steps, self.calls[self.done]
        self.registers[POINT] = y
        if first == 0 or steps[first - 1].base is None:
            self.registers[0] = y  # the point itself is what this row builds on
        factor = factors(y)
        y = advance(self.registers, steps[first], predicted, draw, factor)
        self.done += 1
        after = self.calls[self.done] if self.done < len(self.calls) else len(steps)
        for i in range(first + 1, after):
            y = advance(self.registers, steps[i], (None, None), draw, factor)
        if self.finished:
            self.registers = {}
        self.state, self.returned = y, y if y.dtype == dtype else y.to(dtype)
        self.version = version(self.returned)
        return self.returned


def version(x: Tensor) -> int:
    """How often a tensor was written to; -1 for those that do not count it (inference mode)."""
    return -1 if x.is_inference() else x._version
