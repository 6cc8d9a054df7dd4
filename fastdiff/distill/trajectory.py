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
from ..sampling import DenoiserLike
from ..schedule import NoiseSchedule
from .guided import SCALE, contrast, with_scale
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
    an input that is zero at first. `steps` is then the largest of them. Every update trains all counts from the same noise, since
    the teacher is most of the cost and its points at the largest count serve every count that divides it; for another count it
    runs anew, with calls enough to be as near to the exact trajectory.

    With `scales` the teacher is guided, two calls for each of its evaluations, at a scale drawn evenly between these two for each
    trajectory, and the student takes the scale as an input (Meng et al. 2023): one call of it does what two do.
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
    scales: tuple[float, float] | None = None
    _teacher: dict[int, Segments] = field(default_factory=dict, repr=False)
    _student: dict[int, Segments] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.counts:
            self.counts = check_counts(self.counts)
            self.steps = self.counts[-1]

    def network(self, teacher: Denoiser, config: UNetConfig) -> UNetConfig:
        if self.scales is not None:
            config = with_scale(teacher, config, self.scales)
        return dataclasses.replace(config, step_counts=self.counts) if self.counts else config

    def adds(self) -> str:
        asked = {"the number of its calls as an input": self.counts, SCALE: self.scales}
        return " and ".join(what for what, wanted in asked.items() if wanted)

    def stages(self) -> list[Stage]:
        return [Stage(self.steps, self.updates, self.lr, self.batch)]

    def begin(self, number: int, schedule: NoiseSchedule) -> None:
        for n in self._counts:
            self._student[n] = Segments(schedule, times(schedule, n).tolist(), 1)
        for n in {self._taught_by(n) for n in self._student}:
            self._teacher[n] = Segments(schedule, times(schedule, n).tolist(), self._calls(n), self.solver)

    @property
    def _counts(self) -> tuple[int, ...]:
        return self.counts or (self.steps,)

    def units(self, number: int) -> float:
        taught = sum(n * self._calls(n) for n in {self._taught_by(n) for n in self._counts})
        return taught * (2 if self.scales else 1) + 3 * sum(self._counts)

    def _calls(self, count: int) -> int:
        """Of the teacher in one of the student's intervals."""
        return -(-self.calls * self.steps // count)

    def _taught_by(self, count: int) -> int:
        """The number of steps of the teacher's run whose points a count's steps end at."""
        return count if self.steps % count else self.steps

    def loss(self, student: Denoiser, teacher: Denoiser, target: Denoiser, batch: Batch) -> Tensor:
        assert self._student, "a method begins a stage before its first loss"
        taught = contrast(teacher, batch) if self.scales else teacher
        runs = {n: points(segments, taught, batch.noise) for n, segments in self._teacher.items()}
        total = batch.noise.new_zeros(())
        for n, segments in self._student.items():
            every = self._taught_by(n) // n
            wanted = runs[self._taught_by(n)][every - 1 :: every]
            total = total + followed(segments, student.bind(steps=n) if self.counts else student, batch.noise, wanted)
        return total / len(self._student)

    def plans(self, stage: Stage, schedule: NoiseSchedule) -> tuple[Plan, ...]:
        return tuple(self.plan(dataclasses.replace(stage, steps=n), schedule) for n in self.counts)


@torch.no_grad()
def points(segments: Segments, teacher: DenoiserLike, noise: Tensor) -> list[Tensor]:
    """The teacher's states (B, *) at the end of every interval, from unit noise."""
    z, out = noise * segments.top, []
    for i in range(len(segments)):
        z = segments.run(teacher, z, torch.full((len(z),), i))
        out.append(z)
    return out


def followed(segments: Segments, student: Denoiser, noise: Tensor, wanted: list[Tensor]) -> Tensor:
    """The mean over the student's steps of the mean absolute distance to the teacher's point, each step from where it arrived."""
    z, total = noise * segments.top, noise.new_zeros(())
    for i, point in enumerate(wanted):
        arrived = segments.run(student, z, torch.full((len(z),), i))
        total = total + (arrived - point).abs().mean()
        z = arrived.detach()
    return total / len(wanted)
