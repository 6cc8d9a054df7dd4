"""Schedules made from others: shifted in log-SNR, or rescaled to zero terminal SNR."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import FastdiffError
from .base import NoiseSchedule, Time, from_config, namespace


@dataclass(frozen=True)
class Shifted(NoiseSchedule):
    """Another schedule with sigma/alpha times `shift`, on the same circle or line (VP stays VP, flow stays flow)."""

    name: ClassVar[str] = "shifted"
    base: Any = None
    shift: float = 1.0

    __hash__ = NoiseSchedule.__hash__  # `base` is a dict

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise FastdiffError(f"shift must be positive and finite; given {self.shift}")
        object.__setattr__(self, "_base", from_config(self.base))

    def _levels(self, t: Time) -> tuple[Time, Time]:
        base: NoiseSchedule = self._base  # type: ignore[attr-defined]
        alpha, sigma = base.alpha(t), base.sigma(t)
        if base.name == "flow":
            scale = 1 / (alpha + self.shift * sigma)
        elif base.name in ("ve", "edm"):
            scale = 1.0
        else:
            xp = namespace(t)
            scale = xp.sqrt((alpha**2 + sigma**2) / (alpha**2 + (self.shift * sigma) ** 2))
        return alpha * scale, self.shift * sigma * scale

    def alpha(self, t: Time) -> Time:
        return self._levels(t)[0]

    def sigma(self, t: Time) -> Time:
        return self._levels(t)[1]

    def time_of_uniform(self, u: Time) -> Time:
        return self._base.time_of_uniform(u)  # type: ignore[attr-defined]

    @property
    def sigma_data(self) -> float:
        return getattr(self._base, "sigma_data", 0.5)  # type: ignore[attr-defined]

    @property
    def t_min(self) -> float:
        return self._base.t_min  # type: ignore[attr-defined]

    @property
    def t_max(self) -> float:
        return self._base.t_max  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ZeroTerminalSNR(NoiseSchedule):
    """A variance-preserving schedule whose alpha is shifted and scaled to 0 at t_max and keeps its value at t_min."""

    name: ClassVar[str] = "zero_terminal_snr"
    base: Any = None

    __hash__ = NoiseSchedule.__hash__  # `base` is a dict

    def __post_init__(self) -> None:
        base = from_config(self.base)
        t = np.linspace(base.t_min, base.t_max, 5)
        if not np.allclose(base.alpha(t) ** 2 + base.sigma(t) ** 2, 1, rtol=0, atol=1e-9):
            raise FastdiffError(f"zero_terminal_snr needs a variance-preserving schedule; given {base.name}")
        object.__setattr__(self, "_base", base)

    def alpha(self, t: Time) -> Time:
        base: NoiseSchedule = self._base  # type: ignore[attr-defined]
        first, last = float(base.alpha(base.t_min)), float(base.alpha(base.t_max))
        alpha = (base.alpha(t) - last) * (first / (first - last))
        return namespace(t).maximum(alpha, 0 * alpha)  # torch's exp may differ from numpy's in the last bit

    def sigma(self, t: Time) -> Time:
        alpha = self.alpha(t)
        return namespace(t).sqrt((1 - alpha) * (1 + alpha))

    def t_of_lam(self, lam: Time) -> Time:
        base: NoiseSchedule = self._base  # type: ignore[attr-defined]
        xp = namespace(lam)
        first, last = float(base.alpha(base.t_min)), float(base.alpha(base.t_max))
        alpha = last + (1 - last / first) / xp.sqrt(1 + xp.exp(-2 * lam))  # the base's alpha at the time sought
        return base.t_of_lam(xp.log(alpha) - 0.5 * xp.log((1 - alpha) * (1 + alpha)))

    @property
    def t_min(self) -> float:
        return self._base.t_min  # type: ignore[attr-defined]

    @property
    def t_max(self) -> float:
        return self._base.t_max  # type: ignore[attr-defined]
