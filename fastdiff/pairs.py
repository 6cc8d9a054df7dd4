"""Embedded pairs: one attempted step of an adaptive method, every sample with a step size of its own.

A pair gives two results of different order from the same evaluations; their difference is its error. Steps are measured in
log-SNR, weights are made in float64 and applied in the state's own dtype. What a pair wants to know at its next step is its
memory, tensors with a row a sample: it may depend on whether a sample took the step.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
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


Memory = tuple[Tensor, ...]


@dataclass(frozen=True)
class Attempt:
    """The higher- and the lower-order result, and the memory of samples that take the step and of those that do not."""

    high: Tensor
    low: Tensor
    taken: Memory = ()
    refused: Memory = ()


def spread(weights: Tensor, x: Tensor) -> Tensor:
    """(B,) weights as x's dtype, one a sample."""
    return weights.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


def curve(s: Tensor) -> Tensor:
    """The integral of a step's length times the exponential: e^h - 1 - h for s = h, h - 1 + e^-h for s = -h; by its series where
    that cancels."""
    return torch.where(s.abs() > 1e-2, torch.expm1(s) - s, s**2 / 2 + s**3 / 6 + s**4 / 24 + s**5 / 120)


@dataclass(frozen=True)
class Exponential:
    """Exponential integrators in the log-SNR, on D (DPM-Solver++, Lu et al. 2022b) or on eps (DPM-Solver-12 and -23, Lu et al.
    2022a, appendix C; k-diffusion's dpm_adaptive), orders `order` and `order` - 1: points at h/2, or at h/3 and 2h/3."""

    order: int
    on_eps: bool = False
    safety = 0.9
    last = 1  # calls at the end, whose prediction is the sample

    @property
    def calls(self) -> int:
        """Of the first step."""
        return self.order

    @property
    def later(self) -> int:
        """Calls of any other step."""
        return self.order

    def prediction(self, memory: Memory) -> Tensor | None:
        """The denoised prediction at the samples' own states, where it is known."""
        return None

    def attempt(self, field: Field, x: Tensor, lam: Tensor, h: Tensor, memory: Memory) -> Attempt:
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
        return y + change * spread((-scale if self.on_eps else scale) * curve(s) / over, x)


@dataclass(frozen=True)
class Classical:
    """An embedded Runge-Kutta pair on eps in sigma/alpha, where the ODE is d(x/alpha) = eps d(sigma/alpha). The last stage is the
    first of the next step: it is not evaluated again, nor is the first after a rejected step."""

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]  # row i: weights on the stages before stage i + 1; the last row is the higher-order result
    low: tuple[float, ...]
    safety = 0.9
    last = 1

    @property
    def calls(self) -> int:
        return len(self.c) + 1

    @property
    def later(self) -> int:
        return len(self.c)

    def prediction(self, memory: Memory) -> Tensor | None:
        return None

    def attempt(self, field: Field, x: Tensor, lam: Tensor, h: Tensor, memory: Memory) -> Attempt:
        u = torch.exp(-lam)
        du = u * torch.expm1(-h)
        alpha0, _ = field.levels(lam)
        slopes = [memory[0] if memory else field.eps(x, lam)]

        def point(at: Tensor, weights: tuple[float, ...]) -> Tensor:
            alpha, _ = field.levels(at)
            total = sum((k * w for k, w in zip(slopes, weights, strict=True) if w), torch.zeros_like(x))
            return x * spread(alpha / alpha0, x) + total * spread(alpha * du, x)

        high = x
        for c, weights in zip(self.c, self.a, strict=True):
            at = lam + h if c == 1.0 else -torch.log(u + c * du)
            high = point(at, weights)
            slopes.append(field.eps(high, at))
        return Attempt(high, point(lam + h, self.low), (slopes[-1],), (slopes[0],))


@dataclass(frozen=True)
class Multistep:
    """UniPC-p (Zhao et al. 2023) with steps of any length: an exponential Adams-Bashforth step through the last p denoised
    predictions, one evaluation there, and the Adams-Moulton step through that one too; their difference is Milne's estimate.

    One call a step, where the one-step pairs take as many as their order. The corrected state goes on (order p + 1, at first
    through as many predictions as there are); the evaluation at the uncorrected point serves as the prediction of it, as in
    UniPC itself. Memory: the predictions (B, p, *) newest first, their log-SNRs (B, p), and how many there are (B,).

    `safety` 0.8: a refused step costs as much as a taken one, and through uneven steps the estimate jumps. On the mixture of
    `benches/adaptive.py` it took 22 calls at a median error of 1e-3, with 0.9 it took 27 (1 and 5 of them refused).
    """

    predictions: int
    safety = 0.8
    calls = 2
    later = 1
    last = 0  # the last step's evaluation is at the end

    @property
    def order(self) -> int:
        return self.predictions + 1

    def prediction(self, memory: Memory) -> Tensor | None:
        return memory[0][:, 0] if memory else None

    def attempt(self, field: Field, x: Tensor, lam: Tensor, h: Tensor, memory: Memory) -> Attempt:
        d, at, count = memory or self._begin(field.ask(x, lam), lam)
        (_, sigma0), (alpha, sigma) = field.levels(lam), field.levels(lam + h)
        carried = x * spread(sigma / sigma0, x)

        def point(past: Tensor, nodes: Tensor, known: Tensor) -> Tensor:
            weights = alpha[:, None] * adams(nodes - lam[:, None], h, known)
            return carried + (past * weights.to(x.dtype).view(*weights.shape, *(1,) * (x.ndim - 1))).sum(dim=1)

        low = point(d, at, count)
        end = (lam + h)[:, None]
        d1, at1 = torch.cat([field.ask(low, lam + h)[:, None], d], dim=1), torch.cat([end, at], dim=1)
        high = point(d1, at1, count + 1)
        p = self.predictions
        return Attempt(high, low, (d1[:, :p], at1[:, :p], (count + 1).clamp(max=p)), (d, at, count))

    def _begin(self, d: Tensor, lam: Tensor) -> Memory:
        empty = torch.zeros_like(d)[:, None].expand(-1, self.predictions - 1, *d.shape[1:])
        # the log-SNRs of predictions that are not there yet are told apart, so that no weight of theirs divides by zero
        at = lam[:, None] - torch.arange(self.predictions, dtype=lam.dtype, device=lam.device)
        return torch.cat([d[:, None], empty], dim=1), at, torch.ones_like(lam, dtype=torch.int64)


GAUSS = np.polynomial.legendre.leggauss(24)  # exact to 1e-15 for steps up to 11 in log-SNR, a whole run


def adams(nodes: Tensor, h: Tensor, count: Tensor) -> Tensor:
    """(B, k) integrals from 0 to h of e^(s - h) l_j(s) ds, l_j the Lagrange basis on each one's first `count` (B,) nodes, counted
    in log-SNR from the step's start; 0 for the others. Times alpha at the end, the weights on denoised predictions
    (`coeffs.exponential_integrals` for one step size of every sample's own)."""
    u, w = (torch.from_numpy(v).to(h.device) for v in GAUSS)
    s = h[:, None] * (1 + u) / 2  # (B, q)
    measure = h[:, None] / 2 * w * torch.exp(s - h[:, None])
    k = nodes.shape[1]
    there = torch.arange(k, device=h.device) < count[:, None]
    gaps = nodes[:, :, None] - nodes[:, None, :]  # (B, j, i)
    ignored = ~there[:, None, :] | torch.eye(k, dtype=torch.bool, device=h.device)
    factors = (s[:, None, None, :] - nodes[:, None, :, None]) / gaps.masked_fill(ignored, 1.0)[..., None]
    basis = factors.masked_fill(ignored[..., None], 1.0).prod(dim=2)  # (B, j, q)
    return (basis * measure[:, None]).sum(dim=2) * there


Pair = Exponential | Classical | Multistep

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
    "bosh3": BOSH3, "dopri5": DOPRI5, "unipc-2": Multistep(2), "unipc-3": Multistep(3),
}  # fmt: skip
DEFAULT = "unipc-3"  # 0.5 to 0.7 of dpmpp-23's calls at equal error (benches/results/adaptive.json)
ALIASES = {"dpm_adaptive": "dpm-23", "dpm-adaptive": "dpm-23", "rk23": "bosh3", "rk45": "dopri5", "unipc": "unipc-2"}


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
