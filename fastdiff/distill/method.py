"""What a distillation method says: its stages, its loss, and how its student is sampled. One file a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..models import UNetConfig
from ..plans import Plan
from ..schedule import NoiseSchedule
from ..solvers import plan as make_plan
from .segments import nodes


@dataclass(frozen=True)
class Stage:
    """A part of a run: a student of `steps` network calls, `updates` optimiser steps at a rate that falls from `lr` to 0."""

    steps: int
    updates: int
    lr: float
    batch: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.updates < 1 or self.batch < 1 or not self.lr > 0:
            raise FastdiffError(f"a stage needs steps, updates, batch >= 1 and lr > 0; given {self}")


class Batch(NamedTuple):
    """One update's material: clean images (B, *) or None, unit noise (B, *), class labels (B,) or None, generator, and guidance
    scales (B,) where the student takes one."""

    x0: Tensor | None
    noise: Tensor
    labels: Tensor | None
    generator: torch.Generator
    scales: Tensor | None = None

    def part(self, rows: Tensor) -> Batch:
        """Some of its rows; the generator is the batch's."""
        x0, labels, scales = (None if v is None else v[rows] for v in (self.x0, self.labels, self.scales))
        return Batch(x0, self.noise[rows], labels, self.generator, scales)

    @property
    def images(self) -> Tensor:
        """The clean images of a method that needs them."""
        assert self.x0 is not None, "a method that reads images says needs_data"
        return self.x0


class Method(ABC):
    """A recipe. It holds settings only; networks are given, and whatever a stage needs beside them is made by `begin`."""

    name: ClassVar[str]
    needs_data: ClassVar[bool]
    why_data: ClassVar[str] = ""  # beside the method's name, where it is not the method itself that needs them
    asks_teacher: ClassVar[bool] = True  # whether its loss calls the teacher, which may then be guided
    chained: ClassVar[bool]  # whether a stage's student is the next one's teacher

    def settings(self) -> dict[str, Any]:
        """What was asked for, by name: what a record says, and what a run that is resumed must share."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}  # type: ignore[arg-type]

    def averages(self) -> dict[str, float]:
        """Decays of the averages of the student's weights that are kept beside it: "target", the network that makes targets
        (without one the student itself does), and "final", the one that is saved (without one the student itself is)."""
        return {}

    def network(self, teacher: Denoiser, config: UNetConfig) -> UNetConfig:
        """The student's network, where it is not the teacher's own: inputs that the teacher's has not, or another shape."""
        return config

    def adds(self) -> str:
        """What `network` gives the student beyond its teacher's network, in words; where it is "", any network can learn."""
        return ""

    def prediction(self, teacher: Denoiser) -> str:
        """What the student's network predicts."""
        return teacher.prediction

    def hands_on(self, number: int) -> bool:
        """Whether the student of stage `number`, from 0, is the next one's teacher."""
        return self.chained

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The stages in order."""

    @abstractmethod
    def begin(self, number: int, schedule: NoiseSchedule) -> None:
        """Prepares a stage, by its number from 0."""

    @abstractmethod
    def units(self, number: int) -> float:
        """What an image costs in a stage, by its number from 0: forward passes of a network, a backward pass counting two."""

    @abstractmethod
    def loss(self, student: Denoiser, teacher: Denoiser, target: Denoiser, batch: Batch) -> Tensor:
        """The loss of one update; a scalar with a graph to the student's weights alone. All conditions are bound already;
        `target` is the average of that name, or the student itself, to be called without gradients."""

    def plan(self, stage: Stage, schedule: NoiseSchedule) -> Plan:
        """How the stage's student is sampled: DDIM on its own times."""
        return make_plan("ddim", schedule, stage.steps, grid=times(schedule, stage.steps).tolist())

    def plans(self, stage: Stage, schedule: NoiseSchedule) -> tuple[Plan, ...]:
        """One for each number of calls where the student has several, the largest last; else none beside `plan`."""
        return ()


def times(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """The student's times, noisiest first: spaced as `nodes` says, from t_max, the last of them one step above t_min."""
    return nodes(schedule, schedule.t_max, schedule.t_min, steps + 1)[:-1]


def fewer(steps: int) -> list[int]:
    """1, 2, 4, ... below `steps`, and `steps`: what a student whose every call predicts clean data can be sampled with."""
    return [*(2**k for k in range((steps - 1).bit_length())), steps]


def noisy(batch: Batch, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z, alpha, sigma): a batch's images and noise at each one's level (B,); the levels broadcast."""
    shape = (-1, *(1,) * (batch.noise.ndim - 1))
    alpha, sigma = (v.to(batch.noise).view(shape) for v in (alpha, sigma))
    return alpha * batch.images + sigma * batch.noise, alpha, sigma


def halvings(start: int, end: int) -> list[int]:
    """start/2, start/4, ..., end.

    Raises:
        FastdiffError: start is not end * 2^k with k >= 1.
    """
    steps = [start]
    while steps[-1] > end and steps[-1] % 2 == 0:
        steps.append(steps[-1] // 2)
    if start < 2 * end or steps[-1] != end or end < 1:
        raise FastdiffError(f"the teacher's steps must be the student's times a power of two; given {start} and {end}, "
                            f"nearest: {end * 2 ** max(1, round(np.log2(max(start, 2) / max(end, 1))))}")  # fmt: skip
    return steps[1:]


def weight(kind: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The weight of |x~ - x^|^2: "truncated" max(SNR, 1), "snr+1" (Salimans and Ho 2022, section 4), "x0" 1."""
    snr = (alpha / sigma.clamp_min(1e-12)).square()
    if kind == "truncated":
        return snr.clamp_min(1.0)
    if kind == "snr+1":
        return snr + 1
    if kind == "x0":
        return torch.ones_like(snr)
    raise FastdiffError(f"unknown weighting {kind!r}; allowed: truncated, snr+1, x0")
