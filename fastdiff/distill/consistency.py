"""Segment consistency: within each segment of the trajectory every point learns to jump to the segment's end, where the point one
teacher step further already jumps. One loss; its settings give the published methods."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..plans import Plan
from ..schedule import NoiseSchedule
from ..solvers import plan as make_plan
from .method import Batch, Method, Stage, fewer, noisy, times, weight
from .segments import Segments, jump_target


@dataclass
class Consistency(Method):
    """A student of `segments` DDIM jumps, trained on `inner` points in each.

    A jump is a DDIM step, so at a segment's end it is the identity (the boundary condition needs no c_skip), and its target is
    compared as a denoised prediction, like progressive distillation's.

    | method | segments | inner | self_ema | other settings |
    |---|---|---|---|---|
    | TRACT (Berthelot et al. 2023) | 1 or 2 a phase | 32 | 0.5 | weighting "truncated" |
    | consistency distillation (Song et al. 2023) | 1 | 18 to 40 | 0.95 | solver "dpmpp-2s", calls 2, weighting "x0" |
    | latent consistency (Luo et al. 2023) | 1 | 50 | 0.95 | huber 1e-3, weighting "x0" |
    | PCM (Wang et al. 2024), multistep consistency (Heek et al. 2024) | 2 to 16 | 4 to 32 | 0.95 (PCM), 0 | - |

    Args:
        steps: calls of the student. With one segment and more steps it is sampled by noising its prediction again.
        segments: 0 = `steps`.
        self_ema: decay of the average that makes the targets; 0 = the student itself.
        ema: decay of the average that is saved.
        solver, calls: of the teacher's one step between two points.
        huber: c of the pseudo-Huber distance sqrt(e^2 + c^2) - c, as LCM; 0 = squared error.
    """

    name: ClassVar[str] = "consistency"
    needs_data: ClassVar[bool] = True
    chained: ClassVar[bool] = False

    steps: int = 2
    segments: int = 0
    inner: int = 16
    updates: int = 2000
    lr: float = 2e-4
    batch: int = 64
    self_ema: float = 0.5
    ema: float = 0.995
    solver: str = "ddim"
    calls: int = 1
    weighting: str = "truncated"
    huber: float = 0.0
    _teacher: Segments | None = field(default=None, repr=False)

    def stages(self) -> list[Stage]:
        weight(self.weighting, torch.ones(1), torch.ones(1))
        if self.segments not in (0, 1, self.steps) or self.inner < 1:
            raise FastdiffError("a student of n steps has n segments, or 1, with at least 1 point in each; given "
                                f"{self.steps} steps, {self.segments} segments, {self.inner} points")  # fmt: skip
        if self.huber < 0:
            raise FastdiffError(f"huber must be at least 0; given {self.huber}")
        return [Stage(self.steps, self.updates, self.lr, self.batch)]

    def averages(self) -> dict[str, float]:
        return {"final": self.ema} | ({"target": self.self_ema} if self.self_ema else {})

    def begin(self, number: int, schedule: NoiseSchedule) -> None:
        count = self.segments or self.steps
        self._teacher = Segments(schedule, times(schedule, count * self.inner).tolist(), self.calls, self.solver)
        starts, (alpha, sigma) = self._teacher.times[:, 0], (self._teacher.alpha, self._teacher.sigma)
        last = torch.arange(count * self.inner) // self.inner * self.inner + self.inner - 1  # of each one's segment
        self._times, self._last = starts, last
        self._alpha, self._sigma = alpha[last, -1], sigma[last, -1]

    def units(self, number: int) -> float:
        return self.calls + 1 + 3

    def loss(self, student: Denoiser, teacher: Denoiser, target: Denoiser, batch: Batch) -> Tensor:
        points = self._teacher
        assert points is not None, "a method begins a stage before its first loss"
        which = torch.randint(len(points), (len(batch.noise),), generator=batch.generator)
        z, alpha, sigma = noisy(batch, points.alpha[which, 0], points.sigma[which, 0])
        with torch.no_grad():
            goal = self._goal(z, points.run(teacher, z, which), which, target)
        error = student(z, points.times[which, 0]) - goal
        distance = (error.square() + self.huber**2).sqrt() - self.huber if self.huber else error.square()
        return (weight(self.weighting, alpha, sigma) * distance).mean()

    def _goal(self, z: Tensor, further: Tensor, which: Tensor, target: Denoiser) -> Tensor:
        """The denoised prediction with which one jump from z ends where the target's jump from one teacher step further does."""
        end = further  # the last point's step ends at its segment's end: no jump is left
        if self.inner > 1:
            inside = (which != self._last[which]).to(z.device).view(-1, *(1,) * (z.ndim - 1))
            at = (which + 1).clamp(max=len(self._times) - 1)
            jumped = self._jump(further, target(further, self._times[at]), at, which)
            end = torch.where(inside, jumped, further)
        points = self._teacher
        assert points is not None
        return jump_target(z, end, (points.alpha[which, 0], points.sigma[which, 0]), (self._alpha[which], self._sigma[which]))

    def _jump(self, x: Tensor, d: Tensor, start: Tensor, which: Tensor) -> Tensor:
        """One DDIM step from the points `start` to the ends of the segments of `which`."""
        assert self._teacher is not None
        shape = (-1, *(1,) * (x.ndim - 1))
        ratio = self._sigma[which] / self._teacher.sigma[start, 0]
        gain = self._alpha[which] - ratio * self._teacher.alpha[start, 0]
        return x * ratio.to(x).view(shape) + d * gain.to(x).view(shape)

    def plan(self, stage: Stage, schedule: NoiseSchedule) -> Plan:
        if self.segments == 1 and stage.steps > 1:
            return make_plan("lcm", schedule, stage.steps, grid=times(schedule, stage.steps).tolist())
        return super().plan(stage, schedule)

    def plans(self, stage: Stage, schedule: NoiseSchedule) -> tuple[Plan, ...]:
        if self.segments != 1:
            return ()
        return tuple(self.plan(dataclasses.replace(stage, steps=n), schedule) for n in fewer(stage.steps))
