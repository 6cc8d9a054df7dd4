"""Progressive distillation (Salimans and Ho 2022): each stage halves the steps, its student the next stage's teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..sampling import DenoiserLike
from ..schedule import NoiseSchedule
from .method import Batch, Method, Stage, halvings, noisy, times, weight
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

    def begin(self, number: int, schedule: NoiseSchedule) -> None:
        solver, calls = (self.solver, self.calls) if number == 0 else ("ddim", 2)
        self._segments = Segments(schedule, times(schedule, self.stages()[number].steps).tolist(), calls, solver)

    def units(self, number: int) -> int:
        return (self.calls if number == 0 else 2) + 3

    def loss(self, student: Denoiser, teacher: Denoiser, target: Denoiser, batch: Batch) -> Tensor:
        return match(self._segments, self.weighting, student, teacher, batch)


def match(segments: Segments | None, weighting: str, student: Denoiser, teacher: DenoiserLike, batch: Batch) -> Tensor:
    """The weighted error of the student's prediction where the teacher's run through an interval says what it must be."""
    assert segments is not None, "a method begins a stage before its first loss"
    which = torch.randint(len(segments), (len(batch.noise),), generator=batch.generator)
    z, alpha, sigma = noisy(batch, segments.alpha[which, 0], segments.sigma[which, 0])
    with torch.no_grad():
        goal = segments.target(z, segments.run(teacher, z, which), which)
    error = (student(z, segments.times[which, 0]) - goal).square()
    return (weight(weighting, alpha, sigma) * error).mean()
