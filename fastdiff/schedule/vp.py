"""Variance preserving schedules in continuous time: alpha^2 + sigma^2 = 1, and sub-VP, which shares their alpha."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .base import NoiseSchedule, Time, namespace


def _vp_alpha(log_alpha: Time) -> Time:
    return namespace(log_alpha).exp(log_alpha)


def _vp_sigma(log_alpha: Time) -> Time:
    xp = namespace(log_alpha)
    return xp.sqrt(-xp.expm1(2 * log_alpha))  # sqrt(1 - alpha^2) without the cancellation at small t


@dataclass(frozen=True)
class _VP(NoiseSchedule):
    """Variance preserving, alpha^2 + sigma^2 = 1, given by log alpha(t)."""

    def log_alpha(self, t: Time) -> Time:
        raise TypeError(f"{type(self).__name__} defines no log_alpha")

    def alpha(self, t: Time) -> Time:
        return _vp_alpha(self.log_alpha(t))

    def sigma(self, t: Time) -> Time:
        return _vp_sigma(self.log_alpha(t))

    @property
    def t_min(self) -> float:
        return 1e-3  # Song et al. 2021, appendix C: the VP score is not trained below


@dataclass(frozen=True)
class VPLinear(_VP):
    """beta(t) = beta_min + t (beta_max - beta_min) (Ho et al. 2020 in the continuous time of Song et al. 2021, eq. 33)."""

    name: ClassVar[str] = "vp_linear"
    rule: ClassVar[str] = "0 <= beta_min <= beta_max and beta_max > 0"
    beta_min: float = 0.1
    beta_max: float = 20.0

    def _valid(self) -> bool:
        return 0 <= self.beta_min <= self.beta_max and self.beta_max > 0

    def log_alpha(self, t: Time) -> Time:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def t_of_lam(self, lam: Time) -> Time:
        xp = namespace(lam)
        fall = 0.5 * xp.log1p(xp.exp(-2 * lam))  # -log alpha, a quadratic in t
        return 2 * fall / (0.5 * self.beta_min + xp.sqrt(0.25 * self.beta_min**2 + (self.beta_max - self.beta_min) * fall))


@dataclass(frozen=True)
class VPScaledLinear(_VP):
    """sqrt(beta) linear in t, as in latent diffusion (Rombach et al. 2022); the betas of 1,000 steps times 1,000."""

    name: ClassVar[str] = "vp_scaled_linear"
    rule: ClassVar[str] = "0 <= beta_min <= beta_max and beta_max > 0"
    beta_min: float = 0.85
    beta_max: float = 12.0

    def _valid(self) -> bool:
        return 0 <= self.beta_min <= self.beta_max and self.beta_max > 0

    def log_alpha(self, t: Time) -> Time:
        b0, slope = math.sqrt(self.beta_min), math.sqrt(self.beta_max) - math.sqrt(self.beta_min)
        return -0.5 * (b0 * b0 * t + b0 * slope * t**2 + slope * slope * t**3 / 3)


@dataclass(frozen=True)
class VPCosine(NoiseSchedule):
    """alpha = cos(pi/2 (t+s)/(1+s)) / cos(pi/2 s/(1+s)) (Nichol and Dhariwal 2021, eq. 17), log-SNR cut to a finite range.

    The cut moves only the ends t_min and t_max: with logsnr_min = -10, sigma/alpha is 148 at t_max, enough for images in
    [-1, 1], where alpha -> 0 itself would multiply an eps-network's error without bound.
    """

    name: ClassVar[str] = "vp_cosine"
    rule: ClassVar[str] = "s >= 0 and -60 <= logsnr_min < logsnr_max <= 20"
    s: float = 0.008
    logsnr_min: float = -10.0
    logsnr_max: float = 12.0

    def _valid(self) -> bool:  # beyond the range float64 cannot tell the times from 0 and 1
        return self.s >= 0 and -60 <= self.logsnr_min < self.logsnr_max <= 20

    def alpha(self, t: Time) -> Time:
        return namespace(t).cos(self._angle(t)) / math.cos(self._angle(0.0))

    def sigma(self, t: Time) -> Time:
        # 1 - cos^2 a / cos^2 a0 = sin(a - a0) sin(a + a0) / cos^2 a0: no cancellation at t = 0
        xp, a, a0 = namespace(t), self._angle(t), self._angle(0.0)
        return xp.sqrt(xp.sin(a - a0) * xp.sin(a + a0)) / math.cos(a0)

    def _angle(self, t: Time) -> Time:
        return (t + self.s) * (math.pi / 2 / (1 + self.s))

    def t_of_lam(self, lam: Time) -> Time:
        xp = namespace(lam)
        lam = lam.double() if xp is torch else np.asarray(lam, np.float64)
        alpha = 1 / xp.sqrt(1 + xp.exp(-2 * lam))
        t = xp.arccos(alpha * math.cos(self._angle(0.0))) * ((1 + self.s) * 2 / math.pi) - self.s
        return float(t) if xp is np and t.ndim == 0 else t

    @property
    def t_min(self) -> float:
        return float(self.t_of_lam(self.logsnr_max / 2))

    @property
    def t_max(self) -> float:
        return float(self.t_of_lam(self.logsnr_min / 2))


@dataclass(frozen=True)
class VPSigmoid(_VP):
    """alpha^2 falls along a sigmoid between `start` and `end` (Jabri et al. 2022, algorithm 3)."""

    name: ClassVar[str] = "vp_sigmoid"
    rule: ClassVar[str] = "start < end and tau > 0"
    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def _valid(self) -> bool:
        return self.start < self.end and self.tau > 0

    def log_alpha(self, t: Time) -> Time:
        xp = namespace(t)
        v0, v1 = 1 / (1 + math.exp(-self.start / self.tau)), 1 / (1 + math.exp(-self.end / self.tau))
        v = 1 / (1 + xp.exp(-(t * (self.end - self.start) + self.start) / self.tau))
        return 0.5 * xp.log((v1 - v) / (v1 - v0))

    @property
    def t_max(self) -> float:
        return 0.999  # alpha is 0 at t = 1; sigma/alpha is 66 here, with the default parameters


@dataclass(frozen=True)
class SubVP(NoiseSchedule):
    """alpha of vp_linear, sigma = 1 - alpha^2 (Song et al. 2021, eq. 29)."""

    name: ClassVar[str] = "sub_vp"
    rule: ClassVar[str] = VPLinear.rule
    beta_min: float = 0.1
    beta_max: float = 20.0

    _valid = VPLinear._valid

    def alpha(self, t: Time) -> Time:
        return _vp_alpha(VPLinear(self.beta_min, self.beta_max).log_alpha(t))

    def sigma(self, t: Time) -> Time:
        return -namespace(t).expm1(2 * VPLinear(self.beta_min, self.beta_max).log_alpha(t))

    @property
    def t_min(self) -> float:
        return 1e-3
