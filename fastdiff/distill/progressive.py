"""Progressive distillation (Salimans and Ho 2022): each stage halves the steps, its student the next stage's teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..schedule import NoiseSchedule
from .method import Batch, Method, Stage, halvings, times, weight
from .segments import Segments


@dataclass
class Progressive(Method):
    """One student step learns what the teacher does in `calls` steps of `solver` (the paper: two of DDIM).

    Args:
        start, steps: the first teacher's steps and the last student's; start = steps * 2^k.
        solver, calls: the stronger form for the first stage, where the teacher is a network of any step count: its target from
            `calls` steps of a better solver. Later teachers are students, exact at their own two steps only.
        weighting: "truncated", "snr+1" or "x0".
    """

    name: ClassVar[str] = "progressive"
    needs_data: ClassVar[bool] = True
    chained: ClassVar[bool] = True

    start: int = 32
    steps: int = 4
    updates: int = 1000
    lr: float = 2e-4
    batch: int = 64
    solver: str = "ddim"
    calls: int = 2
    weighting: str = "truncated"
    _segments: Segments | None = field(default=None, repr=False)

    def stages(self) -> list[Stage]:
        weight(self.weighting, torch.ones(1), torch.ones(1))
        return [Stage(n, self.updates, self.lr, self.batch) for n in halvings(self.start, self.steps)]

    def begin(self, stage: Stage, schedule: NoiseSchedule) -> None:
        first = stage.steps == self.stages()[0].steps
        solver, calls = (self.solver, self.calls) if first else ("ddim", 2)
        self._segments = Segments(schedule, times(schedule, stage.steps).tolist(), calls, solver)

    def loss(self, student: Denoiser, teacher: Denoiser, batch: Batch) -> Tensor:
        if batch.x0 is None or self._segments is None:
            raise FastdiffError("progressive distillation needs images: give --data")
        segments, n = self._segments, len(batch.noise)
        which = torch.randint(len(segments), (n,), generator=batch.generator)
        shape = (-1, *(1,) * (batch.x0.ndim - 1))
        alpha, sigma = (v[which, 0].float().view(shape) for v in (segments.alpha, segments.sigma))
        z = alpha * batch.x0 + sigma * batch.noise
        with torch.no_grad():
            target = segments.target(z, segments.run(teacher, z, which), which)
        error = (student(z, segments.times[which, 0]) - target).square()
        return (weight(self.weighting, alpha, sigma) * error).mean()
