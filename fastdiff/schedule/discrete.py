"""Discrete-time models: a table of alpha^2, interpolated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ..errors import FastdiffError
from .base import NoiseSchedule, Time, namespace


@dataclass(frozen=True)
class VPFromAlphasCumprod(NoiseSchedule):
    """A discrete-time model's table of alpha^2; t in 0..T-1, log-SNR interpolated linearly between the integer times.

    With zero terminal SNR alpha itself is interpolated over the last interval, where the log-SNR is infinite.
    """

    name: ClassVar[str] = "vp_from_alphas_cumprod"
    alphas_cumprod: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        a = np.asarray(self.alphas_cumprod, np.float64)
        if a.ndim != 1 or len(a) < 2 or not (np.all(np.diff(a) < 0) and a[-1] >= 0 and a[0] < 1):
            raise FastdiffError(
                "alphas_cumprod must be a falling list of at least 2 numbers in [0, 1) that starts below 1; "
                f"given {len(np.atleast_1d(a))} numbers from {a.flat[0] if a.size else None} to {a.flat[-1] if a.size else None}"
            )
        object.__setattr__(self, "_a", a)

    def alpha(self, t: Time) -> Time:
        return self._levels(t)[0]

    def sigma(self, t: Time) -> Time:
        return self._levels(t)[1]

    def _levels(self, t: Time) -> tuple[Time, Time]:
        xp = namespace(t)
        a: Any = self._a  # type: ignore[attr-defined]
        if xp is torch:
            a = torch.as_tensor(a, device=t.device)
        t = t.double() if xp is torch else np.asarray(t, np.float64)
        i = xp.clip(xp.floor(t), 0, len(a) - 2)
        f, i = t - i, (i.long() if xp is torch else i.astype(np.int64))
        with np.errstate(divide="ignore", invalid="ignore"):
            logit0, logit1 = xp.log(a[i] / (1 - a[i])), xp.log(a[i + 1] / (1 - a[i + 1]))
            logit = (1 - f) * logit0 + f * logit1
            signal, noise = 1 / (1 + xp.exp(-logit)), 1 / (1 + xp.exp(logit))  # each without cancellation
        last = (1 - f) ** 2 * a[i]  # zero terminal SNR, last interval
        signal, noise = xp.where(a[i + 1] > 0, signal, last), xp.where(a[i + 1] > 0, noise, 1 - last)
        for at, j in ((f == 0, i), (f == 1, i + 1)):
            signal, noise = xp.where(at, a[j], signal), xp.where(at, 1 - a[j], noise)
        return xp.sqrt(signal), xp.sqrt(noise)

    @property
    def discrete_count(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def t_max(self) -> float:
        return float(len(self.alphas_cumprod) - 1)

    def zero_terminal_snr(self) -> VPFromAlphasCumprod:
        a = np.sqrt(np.asarray(self.alphas_cumprod, np.float64))
        return VPFromAlphasCumprod(tuple(((a - a[-1]) * (a[0] / (a[0] - a[-1]))) ** 2))
