"""Embedded pairs: one attempted step of an adaptive method, every sample with a step size of its own.

A pair gives two results of different order from the same evaluations; their difference is its error. Steps are measured in
log-SNR, weights are made in float64 and applied in the state's own dtype.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import FastdiffError
from .schedule import NoiseSchedule


@dataclass(frozen=True)
class Field:
    """What a pair may ask: the schedule's levels, and the denoised prediction of every sample at a log-SNR of its own."""

    schedule: NoiseSchedule
    ask: Callable[[Tensor, Tensor], Tensor]

    def levels(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at log-SNRs (B,), float64."""
        t = self.schedule.t_of_lam(lam)
        return self.schedule.alpha(t), self.schedule.sigma(t)

    def eps(self, x: Tensor, lam: Tensor) -> Tensor:
        alpha, sigma = self.levels(lam)
        return (x - spread(alpha, x) * self.ask(x, lam)) / spread(sigma, x)


@dataclass(frozen=True)
class Attempt:
    """The higher- and the lower-order result, and the slopes at both ends of the step where the pair can use them again."""

    high: Tensor
    low: Tensor
    first: Tensor | None = None
    last: Tensor | None = None


def spread(weights: Tensor, x: Tensor) -> Tensor:
    """(B,) weights as x's dtype, one a sample."""
    return weights.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


@dataclass(frozen=True)
class Exponential:
    """Exponential integrators in the log-SNR, on D (DPM-Solver++, Lu et al. 2022b) or on eps (DPM-Solver-12 and -23, Lu et al.
    2022a, appendix C; k-diffusion's dpm_adaptive), orders `order` and `order` - 1: points at h/2, or at h/3 and 2h/3."""

    order: int
    on_eps: bool = False

    @property
    def calls(self) -> int:
        return self.order

    def attempt(self, field: Field, x: Tensor, lam: Tensor, h: Tensor, kept: Tensor | None) -> Attempt:
        ask = field.eps if self.on_eps else field.ask
        d0 = ask(x, lam)
        if self.order == 2:
            d1 = ask(self._to(field, x, lam, h / 2, d0), lam + h / 2)
            return Attempt(self._to(field, x, lam, h, d1), self._to(field, x, lam, h, d0))
        d1 = ask(self._to(field, x, lam, h / 3, d0), lam + h / 3)
        d2 = ask(self._to(field, x, lam, 2 * h / 3, d0, d1 - d0, h / 3), lam + 2 * h / 3)
        high = self._to(field, x, lam, h, d0, d2 - d0, 2 * h / 3)
        if self.on_eps:  # the authors' second-order step: its half of the whole gain, at r = 1/3
            return Attempt(high, self._to(field, x, lam, h, d0 + (d1 - d0) * 1.5))
        return Attempt(high, self._to(field, x, lam, h, d0, d1 - d0, h / 3))

    def _to(
        self, field: Field, x: Tensor, lam: Tensor, h: Tensor, d: Tensor, change: Tensor | None = None, over: Tensor | None = None
    ) -> Tensor:
        """x at lam + h for a constant prediction, or for one linear in log-SNR with `change` over a distance `over`."""
        (alpha0, sigma0), (alpha, sigma) = field.levels(lam), field.levels(lam + h)
        kept, scale = (alpha / alpha0, sigma) if self.on_eps else (sigma / sigma0, alpha)
        s = h if self.on_eps else -h  # eps: -sigma (e^h - 1); D: -alpha (e^-h - 1)
        y = x * spread(kept, x) + d * spread(-scale * torch.expm1(s), x)
        if change is None or over is None:
            return y
        # the integral of s times the exponential: e^h - 1 - h, and h - 1 + e^-h; by its series where that cancels
        curve = torch.where(h > 1e-2, torch.expm1(s) - s, s**2 / 2 + s**3 / 6 + s**4 / 24 + s**5 / 120)
        return y + change * spread((-scale if self.on_eps else scale) * curve / over, x)


@dataclass(frozen=True)
class Classical:
    """An embedded Runge-Kutta pair on eps in sigma/alpha, where the ODE is d(x/alpha) = eps d(sigma/alpha). The last stage is the
    first of the next step: it is not evaluated again, nor is the first after a rejected step."""

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]  # row i: weights on the stages before stage i + 1; the last row is the higher-order result
    low: tuple[float, ...]

    @property
    def calls(self) -> int:
        """Of the first step; one less later."""
        return len(self.c) + 1

    def attempt(self, field: Field, x: Tensor, lam: Tensor, h: Tensor, kept: Tensor | None) -> Attempt:
        u = torch.exp(-lam)
        du = u * torch.expm1(-h)
        alpha0, _ = field.levels(lam)
        slopes = [field.eps(x, lam) if kept is None else kept]

        def point(at: Tensor, weights: tuple[float, ...]) -> Tensor:
            alpha, _ = field.levels(at)
            total = sum((k * w for k, w in zip(slopes, weights, strict=True) if w), torch.zeros_like(x))
            return x * spread(alpha / alpha0, x) + total * spread(alpha * du, x)

        high = x
        for c, weights in zip(self.c, self.a, strict=True):
            at = lam + h if c == 1.0 else -torch.log(u + c * du)
            high = point(at, weights)
            slopes.append(field.eps(high, at))
        return Attempt(high, point(lam + h, self.low), slopes[0], slopes[-1])


Pair = Exponential | Classical

# Bogacki and Shampine 1989; Dormand and Prince 1980
BOSH3 = Classical(
    3, (1 / 2, 3 / 4, 1.0), ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)), (7 / 24, 1 / 4, 1 / 3, 1 / 8)
)  # fmt: skip
DOPRI5 = Classical(
    5,
    (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
)
PAIRS: dict[str, Pair] = {
    "dpmpp-23": Exponential(3), "dpm-12": Exponential(2, on_eps=True), "dpm-23": Exponential(3, on_eps=True),
    "bosh3": BOSH3, "dopri5": DOPRI5,
}  # fmt: skip
ALIASES = {"dpm_adaptive": "dpm-23", "dpm-adaptive": "dpm-23", "rk23": "bosh3", "rk45": "dopri5"}


def find(name: str) -> Pair:
    """The pair of a name.

    Raises:
        FastdiffError: an unknown name; the nearest is offered.
    """
    known = ALIASES.get(name, name)
    if known not in PAIRS:
        near = difflib.get_close_matches(name, [*PAIRS, *ALIASES], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PAIRS)}"
        raise FastdiffError(f"unknown adaptive solver {name!r}; {hint}")
    return PAIRS[known]
