"""Easy consistency tuning (Geng et al. 2024): from the teacher's weights and data, with no call of the teacher at all."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..plans import Plan
from ..schedule import NoiseSchedule
from ..solvers import plan as make_plan
from .method import Batch, Method, Stage, fewer, noisy


@dataclass
class ECT(Method):
    """The student's prediction at u = sigma/alpha is drawn to its own at r < u, on the same image and the same noise; u is
    lognormal and r = u (1 - q^-k (1 + 8 sigmoid(-u))), at least 0, in stage k = 1, 2, ...: r = 0 (the image itself) often at
    first, then ever nearer to u. Loss: pseudo-Huber over a sample's pixels, divided by u - r.

    Args:
        steps: calls of the student: the prediction noised again to `middle` (and between, evenly in log u), as the paper's two.
        phases: stages, each with `updates` of its own.
        q: how fast r nears u; one phase with q = 256 is the paper's short run, q = 2 its long one.
        mean, std: of log u (the paper: -1.1, 2.0).
        middle: u of the second call (the paper: 0.821).
    """

    name: ClassVar[str] = "ect"
    needs_data: ClassVar[bool] = True
    asks_teacher: ClassVar[bool] = False
    chained: ClassVar[bool] = False

    steps: int = 2
    phases: int = 4
    updates: int = 400
    lr: float = 2e-4
    batch: int = 128
    q: float = 2.0
    mean: float = -1.1
    std: float = 2.0
    ema: float = 0.995
    huber: float = 0.00054
    middle: float = 0.821

    def stages(self) -> list[Stage]:
        if self.phases < 1 or self.q <= 1 or self.std <= 0 or self.huber <= 0 or self.middle <= 0:
            raise FastdiffError("ect needs phases >= 1, q > 1, and std, huber, middle > 0; given "
                                f"{self.phases}, {self.q:g}, {self.std:g}, {self.huber:g}, {self.middle:g}")  # fmt: skip
        return [Stage(self.steps, self.updates, self.lr, self.batch)] * self.phases

    def averages(self) -> dict[str, float]:
        return {"final": self.ema}

    def begin(self, number: int, schedule: NoiseSchedule) -> None:
        self._nearness = self.q ** -(number + 1)

    def units(self, number: int) -> float:
        return 1 + 3

    def loss(self, student: Denoiser, teacher: Denoiser, target: Denoiser, batch: Batch) -> Tensor:
        schedule, x0 = student.schedule, batch.images
        n, shape = len(x0), (-1, *(1,) * (x0.ndim - 1))
        log_u = self.mean + self.std * torch.randn(n, generator=batch.generator, dtype=torch.float64)
        t = schedule.t_of_lam(-log_u).clamp(schedule.t_min, schedule.t_max)
        u = torch.exp(-schedule.lam(t))
        r = (u * (1 - self._nearness * (1 + 8 * torch.sigmoid(-u)))).clamp_min(0.0)
        least = math.exp(-float(schedule.lam(schedule.t_min)))
        clean = (r <= least).to(x0.device).view(shape)

        def at(times: Tensor) -> Tensor:
            return noisy(batch, schedule.alpha(times), schedule.sigma(times))[0]

        nearer = schedule.t_of_lam(-r.clamp_min(least).log()).clamp(schedule.t_min, schedule.t_max)
        with torch.no_grad():
            goal = torch.where(clean, x0, target(at(nearer), nearer))
        error = (student(at(t), t) - goal).square().flatten(1).mean(dim=1)
        # iCT's c = 0.00054 sqrt(d) is compared with a sum over d pixels, this one with their mean
        distance = (error + self.huber**2).sqrt() - self.huber
        return (distance / (u - torch.where(r <= least, 0.0, r)).to(x0)).mean()

    def plans(self, stage: Stage, schedule: NoiseSchedule) -> tuple[Plan, ...]:
        return tuple(self.plan(dataclasses.replace(stage, steps=n), schedule) for n in fewer(stage.steps))

    def plan(self, stage: Stage, schedule: NoiseSchedule) -> Plan:
        """From full noise, then evenly in log u from `middle` downwards: halves of it, as far as there are steps."""
        below = [float(schedule.t_of_lam(-math.log(self.middle * 0.5**k))) for k in range(stage.steps - 1)]
        if below and not schedule.t_min < min(below) <= max(below) < schedule.t_max:
            raise FastdiffError(f"middle {self.middle:g} and {stage.steps} steps leave this schedule's times; give fewer steps")
        return make_plan("lcm", schedule, stage.steps, grid=[schedule.t_max, *below])
