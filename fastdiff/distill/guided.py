"""Guided distillation (Meng et al. 2023): one call of a student that takes the guidance scale as an input does what two calls of
the teacher do; then progressive distillation of that student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..models import UNetConfig
from .method import Batch, Stage, halvings, weight
from .progressive import Progressive

SCALE = "the guidance scale as an input"


@dataclass
class Guided(Progressive):
    """The first stage matches D_null + scale (D_class - D_null) at the times of a `start`-step student, scales drawn evenly from
    `scales` (lowest, highest; the paper's w is scale - 1); the stages after it halve the steps, each student the next one's
    teacher. `solver` and `calls` run inside a step of the first stage: the default, one call, is the paper's.
    """

    name: ClassVar[str] = "guided"
    first: ClassVar[int] = 1  # its first stage halves nothing

    scales: tuple[float, float] = (1.0, 5.0)
    start: int = 16
    calls: int = 1

    def stages(self) -> list[Stage]:
        weight(self.weighting, torch.ones(1), torch.ones(1))
        halved = halvings(self.start, self.steps) if self.start != self.steps else []
        return [Stage(n, self.updates, self.lr, self.batch) for n in (self.start, *halved)]

    def network(self, teacher: Denoiser, config: UNetConfig) -> UNetConfig:
        return super().network(teacher, with_scale(teacher, config, self.scales))

    def adds(self) -> str:
        return " and ".join(filter(None, (super().adds(), SCALE)))

    def units(self, number: int) -> float:
        return super().units(number) + (self.calls if number == 0 else 0)

    def loss(self, student: Denoiser, teacher: Denoiser, target: Denoiser, batch: Batch) -> Tensor:
        assert batch.scales is not None, "the student of `network` takes a scale"
        return self._loss(student, teacher, contrast(teacher, batch) if self._first else teacher, batch)


def with_scale(teacher: Denoiser, config: UNetConfig, scales: tuple[float, float]) -> UNetConfig:
    """The teacher's network with the guidance scale as an input.

    Raises:
        FastdiffError: a teacher that knows no guidance, or has the input already.
    """
    if getattr(teacher.network, "null_label", None) is None:
        raise FastdiffError("guidance is learned from a teacher with a null class (label dropout); this one has none: use "
                            "--method progressive, or trajectory without --scales")  # fmt: skip
    if config.guidance_range is not None:
        raise FastdiffError("this teacher takes the guidance scale as an input already: use --method progressive, or trajectory "
                            "without --scales")  # fmt: skip
    return dataclasses.replace(config, guidance_range=scales)


def contrast(teacher: Denoiser, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
    """Classifier-free guidance with a scale of each sample's own."""
    assert batch.labels is not None and batch.scales is not None, "`with_scale` refuses a teacher without classes"
    null = teacher.network.null_label  # type: ignore[attr-defined]
    negative = teacher.bind(class_labels=torch.full_like(batch.labels, null))
    scales = batch.scales.view(-1, *(1,) * (batch.noise.ndim - 1))

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(negative(x, t), teacher(x, t), scales)

    return guided
