"""Progressive distillation (Salimans and Ho 2022): each stage halves the steps, its student the next stage's teacher."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..models import UNetConfig
from ..models.unet import check_counts
from ..plans import Plan
from ..sampling import DenoiserLike
from ..schedule import NoiseSchedule
from .method import Batch, Method, Stage, halvings, noisy, times, weight
from .segments import Segments

PRACTICE = 1 / 2  # of a batch, for the step counts that a student of several knows already


@dataclass
class Progressive(Method):
    """One student step learns what the teacher does in `calls` steps of `solver` (the paper: two of DDIM).

    Args:
        start, steps: the first teacher's steps and the last student's; start = steps * 2^k.
        solver, calls: the stronger form for the first stage, where the teacher is a network of any step count: its target from
            `calls` steps of a better solver. Later teachers are students, exact at their own two steps only.
        weighting: "truncated", "snr+1" or "x0".
        counts: such as (1, 2, 4), each twice the one before: one student of all of these step counts, which it is told by an
            input that is zero at first. They are the stages, so `start` and `steps` follow from them. A stage goes on practising
            the counts before it, on `PRACTICE` of a batch, where its teacher's own prediction is the target.
    """

    name: ClassVar[str] = "progressive"
    needs_data: ClassVar[bool] = True
    chained: ClassVar[bool] = True
    first: ClassVar[int] = 2  # steps of the first teacher for each of the first student's

    start: int = 32
    steps: int = 4
    updates: int = 1000
    lr: float = 2e-4
    batch: int = 64
    solver: str = "ddim"
    calls: int = 2
    weighting: str = "truncated"
    counts: tuple[int, ...] = ()
    _segments: Segments | None = field(default=None, repr=False)
    _known: dict[int, Segments] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.counts:
            return
        self.counts = check_counts(self.counts)
        if any(b != 2 * a for a, b in zip(self.counts, self.counts[1:], strict=False)):
            raise FastdiffError(f"progressive step counts are each twice the one before, such as 1,2,4; given {self.counts}")
        self.steps, self.start = self.counts[0], self.first * self.counts[-1]

    def network(self, teacher: Denoiser, config: UNetConfig) -> UNetConfig:
        return dataclasses.replace(config, step_counts=self.counts) if self.counts else config

    def adds(self) -> str:
        return "the number of its calls as an input" if self.counts else ""

    def stages(self) -> list[Stage]:
        weight(self.weighting, torch.ones(1), torch.ones(1))
        return [Stage(n, self.updates, self.lr, self.batch) for n in halvings(self.start, self.steps)]

    def begin(self, number: int, schedule: NoiseSchedule) -> None:
        steps = [stage.steps for stage in self.stages()[: number + 1]]
        solver, calls = (self.solver, self.calls) if number == 0 else ("ddim", 2)
        self._segments = Segments(schedule, times(schedule, steps[-1]).tolist(), calls, solver)
        self._steps, self._first = steps[-1], number == 0
        self._known = {n: Segments(schedule, times(schedule, n).tolist(), 1) for n in steps[:-1]} if self.counts else {}

    def units(self, number: int) -> float:
        learned = (self.calls if number == 0 else 2) + 3.0
        return learned - PRACTICE if number and self.counts else learned

    def loss(self, student: Denoiser, teacher: Denoiser, target: Denoiser, batch: Batch) -> Tensor:
        return self._loss(student, teacher, teacher, batch)

    def _loss(self, student: Denoiser, teacher: Denoiser, taught: DenoiserLike, batch: Batch) -> Tensor:
        """`taught` is what the first stage's targets come from: the teacher, or more than it."""
        if not self.counts:
            return match(self._segments, self.weighting, student, taught, batch)
        if self._first:
            return match(self._segments, self.weighting, student.bind(steps=self._steps), taught, batch)
        n, total = len(batch.noise), batch.noise.new_zeros(())
        learned = (self._segments, self._steps, 2 * self._steps)  # in which intervals, the student's steps, the teacher's
        practised = [(segments, steps, steps) for steps, segments in self._known.items()]
        for rows, (segments, mine, theirs) in zip(shares(n, len(practised)), [learned, *practised], strict=True):
            if len(rows):
                pupil, master = student.subset(rows, n).bind(steps=mine), teacher.subset(rows, n).bind(steps=theirs)
                total = total + match(segments, self.weighting, pupil, master, batch.part(rows)) * (len(rows) / n)
        return total

    def plans(self, stage: Stage, schedule: NoiseSchedule) -> tuple[Plan, ...]:
        return tuple(self.plan(dataclasses.replace(stage, steps=n), schedule) for n in self.counts if n >= stage.steps)


def shares(n: int, known: int) -> list[Tensor]:
    """The rows of a batch of n: those that learn, then those that practise each of the step counts known already."""
    practised = int(n * PRACTICE)
    return list(torch.arange(n).split([n - practised, *((practised + i) // known for i in range(known))]))


def match(segments: Segments | None, weighting: str, student: Denoiser, teacher: DenoiserLike, batch: Batch) -> Tensor:
    """The weighted error of the student's prediction where the teacher's run through an interval says what it must be."""
    assert segments is not None, "a method begins a stage before its first loss"
    which = torch.randint(len(segments), (len(batch.noise),), generator=batch.generator)
    z, alpha, sigma = noisy(batch, segments.alpha[which, 0], segments.sigma[which, 0])
    with torch.no_grad():
        goal = segments.target(z, segments.run(teacher, z, which), which)
    error = (student(z, segments.times[which, 0]) - goal).square()
    return (weight(weighting, alpha, sigma) * error).mean()
