"""A student of another network or prediction than its teacher's: before a method's stages it learns what the teacher predicts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..models import UNetConfig
from ..plans import Plan
from ..prediction import check_prediction
from ..schedule import NoiseSchedule
from ..training.losses import sample_times
from .method import Batch, Method, Stage, noisy, weight

SAMPLED = 32  # DDIM steps of the model that this stage leaves: it is no few-step student yet


class Matching(Stage):
    """The stage before a method's own."""


@dataclass
class Match(Method):
    """The teacher's denoised prediction, matched on noised images at every time; then the stages of another method.

    With `changes` the student starts from drawn weights; with another prediction alone from the teacher's weights, which is how
    an eps teacher gets a v student (Salimans and Ho 2022, section 4). The loss is the squared error of x0 times SNR + 1, that is
    of v. The target is kept within the data's range, where an exact prediction always lies: an eps teacher's error grows as
    sigma/alpha. For the same reason a student of another prediction is the teacher from then on, as in the paper; beside a
    student of the same prediction the teacher itself stays.

    A student of "both" (Salimans and Ho 2022, section 4) has an output layer of twice the channels, each head a multiple of its
    teacher's layer (`students.HEADS`). Constant multiples make no exact copy: the paper's combination starts as alpha^2 x^ of an
    eps teacher's x^, as sigma^2 x^ + alpha z of an x0 teacher's, as v^ times 0.78 (cos + sin) of the level's angle of a v
    teacher's (22% short at both ends, 10% long in the middle), and as alpha z where the teacher predicts anything else.

    Args:
        then: the method.
        changes: other settings of the U-Net, such as {"model_channels": 32}; its inputs and outputs stay the teacher's.
        predicts: what the student predicts, "v", "x0" or "both"; None = what the teacher does.
        updates, lr: of this stage; its batch is the method's.
    """

    then: Method
    changes: dict[str, Any] = field(default_factory=dict)
    predicts: str | None = None
    updates: int = 2000
    lr: float = 5e-4

    def __post_init__(self) -> None:
        self.name, self.chained, self.needs_data = self.then.name, self.then.chained, True  # type: ignore[misc]
        self.why_data = " of a student that does not start as its teacher"  # type: ignore[misc]

    def settings(self) -> dict[str, Any]:
        mine = {"network": self.changes, "prediction": self.predicts, "match_updates": self.updates,
                "match_lr": self.lr}  # fmt: skip
        return {**self.then.settings(), **mine}

    def averages(self) -> dict[str, float]:
        return self.then.averages()

    def network(self, teacher: Denoiser, config: UNetConfig) -> UNetConfig:
        fixed = {"in_channels", "out_channels", "num_classes", "null_class", "learned_variance", "guidance_range", "step_counts"}
        known = {f.name for f in dataclasses.fields(UNetConfig)} - fixed
        if unknown := sorted(set(self.changes) - known):
            raise FastdiffError(f"a student's network cannot have another {', '.join(unknown)} than its teacher's; it may have "
                                f"another {', '.join(sorted(known))}")  # fmt: skip
        try:
            made = dataclasses.replace(self.then.network(teacher, config), **self.changes)
        except TypeError as e:
            raise FastdiffError(f"a setting of the student's network has the wrong type: {e}") from e
        assert teacher.shape is not None
        both = self.prediction(teacher) == "both"
        if both != (teacher.prediction == "both"):
            # what a network of both says twice leaves no room for a variance beside it
            made = dataclasses.replace(made, out_channels=teacher.shape[0] * (1 + both), learned_variance=False)
        levels = len(made.channel_mult)
        if any(side % 2 ** (levels - 1) for side in teacher.shape[1:]):
            raise FastdiffError(f"{levels} levels halve a sample's sides, {teacher.shape[1:]}, {levels - 1} times: give fewer "
                                "channel_mult")  # fmt: skip
        return made

    def adds(self) -> str:
        mine = "other settings" if self.changes else "a second output" if self.predicts == "both" else ""
        return mine or self.then.adds()

    def prediction(self, teacher: Denoiser) -> str:
        return self.predicts or self.then.prediction(teacher)

    def stages(self) -> list[Stage]:
        if self.predicts is not None:
            check_prediction(self.predicts)
        following = self.then.stages()
        # a student of several step counts is told no other number of calls
        sampled = following[0].steps if getattr(self.then, "counts", ()) else SAMPLED
        return [Matching(sampled, self.updates, self.lr, following[0].batch), *following]

    def hands_on(self, number: int) -> bool:
        return self.then.hands_on(number - 1) if number else self.predicts is not None

    def begin(self, number: int, schedule: NoiseSchedule) -> None:
        self._matching = number == 0
        if number:
            self.then.begin(number - 1, schedule)

    def units(self, number: int) -> float:
        return self.then.units(number - 1) if number else 1 + 3

    def loss(self, student: Denoiser, teacher: Denoiser, target: Denoiser, batch: Batch) -> Tensor:
        if not self._matching:
            return self.then.loss(student, teacher, target, batch)
        t = sample_times(student.schedule, len(batch.noise), "uniform", batch.generator)
        z, alpha, sigma = noisy(batch, student.schedule.alpha(t), student.schedule.sigma(t))
        with torch.no_grad():
            goal = teacher(z, t).clamp(*teacher.data_range)
        return (weight("snr+1", alpha, sigma) * (student(z, t) - goal).square()).mean()

    def plan(self, stage: Stage, schedule: NoiseSchedule) -> Plan:
        return super().plan(stage, schedule) if isinstance(stage, Matching) else self.then.plan(stage, schedule)

    def plans(self, stage: Stage, schedule: NoiseSchedule) -> tuple[Plan, ...]:
        told = getattr(self.then, "counts", ())  # one that is told its number of calls knows no other from the start
        return () if isinstance(stage, Matching) and not told else self.then.plans(stage, schedule)
