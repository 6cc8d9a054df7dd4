"""Trajectory matching (SFD, Zhou et al. 2024): the student's every step is fitted to the teacher's point, from where the student
itself arrived. Data-free: it starts from noise, and a few thousand updates are enough."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..models import UNetConfig
from ..models.unet import check_counts
from ..plans import Plan
from ..schedule import NoiseSchedule
from .method import Batch, Method, Stage, times
from .segments import Segments


@dataclass
class Trajectory(Method):
    """A student of `steps` DDIM steps against a teacher that takes `calls` steps of `solver` in each.

    The paper's teacher is DPM-Solver++(3M). A solver begins anew in each interval here, where UniPC does better: with 4 x 3 calls
    on the shipped model an RMSE of 0.057 from the converged ODE against 0.094 of DPM-Solver++(2M).
    The paper makes one optimiser step for every student step; here the losses of all steps are summed into one, each step's start
    being the student's own point without its graph, which is the same gradient at the same weights.

    With `counts`, such as (1, 2, 4), one student serves all of these numbers of steps (the paper's SFD-v): it is told which, by
    an input that is zero at first, and the updates take the counts in turn. `steps` is then the largest of them. Where a step is
    longer the teacher takes more calls in it, `calls` times largest / count, so that all counts follow it equally closely.
    """

    name: ClassVar[str] = "trajectory"
    needs_data: ClassVar[bool] = False
    chained: ClassVar[bool] = False

    steps: int = 4
    updates: int = 1000
    lr: float = 1e-4
    batch: int = 32
    solver: str = "unipc-2"
    calls: int = 4
    counts: tuple[int, ...] = ()
    _segments: dict[int, tuple[Segments, Segments]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.counts:
            self.counts = check_counts(self.counts)
            self.steps = self.counts[-1]

    def network(self, teacher: Denoiser, config: UNetConfig) -> UNetConfig:
        return dataclasses.replace(config, step_counts=self.counts) if self.counts else config

    def adds(self) -> str:
        return "the number of its calls as an input" if self.counts else ""

    def stages(self) -> list[Stage]:
        return [Stage(self.steps, self.updates, self.lr, self.batch)]

    def begin(self, number: int, schedule: NoiseSchedule) -> None:
        for n in self.counts or (self.steps,):
            nodes, calls = times(schedule, n).tolist(), -(-self.calls * self.steps // n)
            self._segments[n] = Segments(schedule, nodes, calls, self.solver), Segments(schedule, nodes, 1)

    def loss(self, student: Denoiser, teacher: Denoiser, target: Denoiser, batch: Batch) -> Tensor:
        assert self._segments, "a method begins a stage before its first loss"
        fine, coarse = self._segments[batch.steps or self.steps]
        z = batch.noise * float(coarse.sigma[0, 0])
        mine, total = z, z.new_zeros(())
        for i in range(len(coarse)):
            which = torch.full((len(z),), i)
            with torch.no_grad():
                z = fine.run(teacher, z, which)
            arrived = coarse.run(student, mine, which)
            total = total + (arrived - z).abs().mean()
            mine = arrived.detach()
        return total / len(coarse)

    def plans(self, stage: Stage, schedule: NoiseSchedule) -> tuple[Plan, ...]:
        return tuple(self.plan(dataclasses.replace(stage, steps=n), schedule) for n in self.counts)
