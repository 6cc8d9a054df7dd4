"""Schedules that are not variance preserving by a table or a beta: VE, EDM, rectified flow, TrigFlow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .base import NoiseSchedule, Time, namespace


@dataclass(frozen=True)
class VE(NoiseSchedule):
    """Variance exploding: x = x0 + sigma*eps, and the time is sigma itself (Song and Ermon 2019; Karras et al. 2022)."""

    name: ClassVar[str] = "ve"
    rule: ClassVar[str] = "0 < sigma_min < sigma_max"
    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def _valid(self) -> bool:
        return 0 < self.sigma_min < self.sigma_max

    def alpha(self, t: Time) -> Time:
        return namespace(t).ones_like(t) if isinstance(t, torch.Tensor | np.ndarray) else 1.0

    def sigma(self, t: Time) -> Time:
        return t

    def t_of_lam(self, lam: Time) -> Time:
        return namespace(lam).exp(-lam)

    def time_of_uniform(self, u: Time) -> Time:
        return self.sigma_min ** (1 - u) * self.sigma_max**u  # the VE-SDE's own time is geometric in sigma

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max


@dataclass(frozen=True)
class EDM(VE):
    """The VE levels with the range and data scale of Karras et al. 2022, table 1; `sigma_data` feeds prediction="edm"."""

    name: ClassVar[str] = "edm"
    rule: ClassVar[str] = "0 < sigma_min < sigma_max and sigma_data > 0"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def _valid(self) -> bool:
        return 0 < self.sigma_min < self.sigma_max and self.sigma_data > 0


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    """Rectified flow, x = (1-t) x0 + t eps (Liu et al. 2022; Lipman et al. 2022).

    `shift` leaves the levels as they are and moves uniform times towards the noise, t = shift u / (1 + (shift-1) u)
    (Esser et al. 2024, eq. 23): the network of a shifted model is still asked at t = sigma.
    """

    name: ClassVar[str] = "flow"
    rule: ClassVar[str] = "shift > 0"
    shift: float = 1.0

    def _valid(self) -> bool:
        return self.shift > 0

    def alpha(self, t: Time) -> Time:
        return 1.0 - t

    def sigma(self, t: Time) -> Time:
        return t

    def t_of_lam(self, lam: Time) -> Time:
        return 1 / (1 + namespace(lam).exp(lam))

    def time_of_uniform(self, u: Time) -> Time:
        return self.shift * u / (1 - u + self.shift * u)  # 1 at u = 1, to the bit

    @property
    def t_min(self) -> float:
        return 1e-3


@dataclass(frozen=True)
class TrigFlow(NoiseSchedule):
    """x = cos(t) x0 + sin(t) eps, t in [0, pi/2] (Lu and Song 2024), for data scaled to unit standard deviation."""

    name: ClassVar[str] = "trigflow"

    def alpha(self, t: Time) -> Time:
        return namespace(t).cos(t)

    def sigma(self, t: Time) -> Time:
        return namespace(t).sin(t)

    @property
    def t_min(self) -> float:
        return 1e-3

    @property
    def t_max(self) -> float:
        return math.atan(200.0)  # sigma/alpha = 200; pi/2 itself has no finite log-SNR
