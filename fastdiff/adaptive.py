"""Adaptive step size, each sample on its own, by embedded pairs (`pairs.py`) under Söderlind's PI controller.

Finished samples leave the batch, so the cost is each sample's own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import FastdiffError, NonFiniteError
from .grid import LAM_START, Node
from .pairs import DEFAULT, Field, Memory, Pair, find
from .plans import IDENTITY, Plan, Row
from .sampling import begin, naming_conditions


class _Pair(NamedTuple):
    x: Tensor
    nfe: Tensor


class Adaptive(_Pair):
    """What `sample_adaptive` returns: the pair of samples x (B, *shape) and evaluations of each, nfe (B,); and beside the
    pair, as attributes (B,), the attempted steps that each `accepted` and `rejected`, and the `unfinished`: which ran out of
    evaluations."""

    accepted: Tensor
    rejected: Tensor
    unfinished: Tensor

    @classmethod
    def of(cls, x: Tensor, nfe: Tensor, accepted: Tensor, rejected: Tensor, unfinished: Tensor) -> Adaptive:
        result = cls(x, nfe)
        result.accepted, result.rejected, result.unfinished = accepted, rejected, unfinished
        return result


@dataclass(frozen=True)
class Control:
    """Tolerances and limits; the defaults suit images in [-1, 1]."""

    rtol: float = 1e-2
    atol: float = 1e-2
    max_nfe: int = 300
    first_step: float = 0.3  # in log-SNR

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0):
            raise FastdiffError(f"rtol and atol must be positive; given {self.rtol}, {self.atol}")

    def check(self, pair: Pair) -> None:
        """
        Raises:
            FastdiffError: fewer evaluations allowed than one step by this pair takes.
        """
        least = 1 + pair.calls + pair.last  # the step away from alpha = 0, one step, and the last prediction
        if self.max_nfe < least:
            raise FastdiffError(f"max_nfe must be at least {least}; given {self.max_nfe}")


@torch.no_grad()
def sample_adaptive(
    denoiser: Denoiser,
    noise: Tensor | None = None,
    *,
    seeds: Sequence[int] | None = None,
    start: Tensor | None = None,
    solver: str = DEFAULT,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    max_nfe: int = 300,
    dtype: torch.dtype = torch.float32,
    together: bool = False,
) -> Adaptive:
    """The probability-flow ODE from the noisiest level to clean data, with per-sample error control; or, with `together`, one
    step size for the whole batch, decided by its worst sample, as exported engines do it (by dpmpp-23).

    A sample whose root-mean-square error estimate, relative to atol + rtol |x|, is at most 1 takes the step. The last
    evaluation is at the least noisy level, whose prediction is the sample.

    `solver` is the embedded pair: "unipc-3" and "unipc-2" (UniPC with steps of any length, one call a step), "dpmpp-23"
    (DPM-Solver++(3S) with its second-order result), "dpm-12" and "dpm-23" (DPM-Solver, k-diffusion's dpm_adaptive), "bosh3"
    (Bogacki-Shampine 3(2)) or "dopri5" (Dormand-Prince 5(4)), both in sigma/alpha.

    Raises:
        FastdiffError: an unknown solver, tolerances not positive, nothing to start from, conditioning bound for another batch
            size.
    Warns:
        UserWarning: samples that reached max_nfe; they are flagged and returned as denoised from where they stood.
    """
    control, pair = Control(rtol, atol, max_nfe), find(solver)
    control.check(pair)
    schedule = denoiser.schedule
    first = Node(schedule.t_max, float(schedule.alpha(schedule.t_max)), float(schedule.sigma(schedule.t_max)))
    row = Row(first.t, first.alpha, first.sigma, IDENTITY, IDENTITY, store=())
    idle = Plan("adaptive", (row,), (first.alpha, first.sigma), (first.alpha, first.sigma))
    state, _ = begin(denoiser, idle, noise, seeds, start, dtype, None)
    with naming_conditions(denoiser, len(state)):
        run = _Run(denoiser, state, control, pair, first, together)
        while run.active.numel():
            run.step()
    if bool(run.unfinished.any()):
        count = f"{int(run.unfinished.sum())} of {len(run.unfinished)}"
        warnings.warn(f"{count} samples reached max_nfe = {max_nfe} before the end; they are flagged", UserWarning, stacklevel=2)
    return Adaptive.of(run.out, run.nfe, run.accepted, run.rejected, run.unfinished)


class _Run:
    """The samples still on their way: their states, log-SNRs and step sizes, and their places in the batch."""

    def __init__(
        self, denoiser: Denoiser, state: Tensor, control: Control, pair: Pair, first: Node, together: bool = False
    ) -> None:  # fmt: skip
        self.full, self.control, self.pair, self.together = denoiser, control, pair, together
        self.out = torch.zeros_like(state)
        count = state.shape[0]
        self.nfe, self.accepted, self.rejected = (torch.zeros(count, dtype=torch.int64, device=state.device) for _ in range(3))
        self.unfinished = torch.zeros(count, dtype=torch.bool, device=state.device)
        self.active = torch.arange(count, device=state.device)
        self.x = state
        self.lam_end = float(denoiser.schedule.lam(denoiser.schedule.t_min))
        lam = first.lam
        if math.isinf(lam):  # alpha = 0: one exact first-order step to where the log-SNR is finite
            lam = LAM_START
            t = float(denoiser.schedule.t_of_lam(lam))
            alpha, sigma = float(denoiser.schedule.alpha(t)), float(denoiser.schedule.sigma(t))
            self.x = state * (sigma / first.sigma) + denoiser(state, first.t) * (alpha - first.alpha * sigma / first.sigma)
            self.nfe += 1
        self.field = Field(denoiser.schedule, self.denoise)
        self.memory: Memory = ()  # the pair's, of the active samples
        self.lam = torch.full((count,), lam, dtype=torch.float64, device=state.device)
        self.h = torch.full((count,), control.first_step, dtype=torch.float64, device=state.device)
        self.previous_error = torch.ones(count, dtype=torch.float64, device=state.device)

    def denoise(self, x: Tensor, lam: Tensor) -> Tensor:
        d = subset(self.full, self.active, len(self.out))(x, self.full.schedule.t_of_lam(lam))
        self.nfe[self.active] += 1
        if not bool(d.isfinite().all()):
            where = f"{float(lam.min()):.3f} to {float(lam.max()):.3f}"
            raise NonFiniteError(f"the network returned NaN or infinity at log-SNR {where}")
        return d

    def step(self) -> None:
        """One attempted step of every active sample; then those at the end, and those out of calls, leave."""
        c = self.control
        end = torch.clamp(self.lam + self.h, max=self.lam_end)
        h = end - self.lam
        tried = self.pair.attempt(self.field, self.x, self.lam, h, self.memory)
        scale = c.atol + c.rtol * torch.maximum(self.x.abs(), tried.high.abs())
        error = ((tried.high - tried.low) / scale).double().flatten(1).square().mean(dim=1).sqrt().clamp(min=1e-10)
        if self.together:
            error = error.max().expand_as(error)
        accepted = error <= 1.0
        self.accepted[self.active] += accepted
        self.rejected[self.active] += ~accepted
        self.x, self.lam = chosen(accepted, tried.high, self.x), torch.where(accepted, end, self.lam)
        self.memory = tuple(chosen(accepted, *pair) for pair in zip(tried.taken, tried.refused, strict=True))
        # PI control (Söderlind 2003): exponents 0.7/order and 0.4/order, the second on the last accepted error
        order = self.pair.order
        factor = self.pair.safety * error ** (-0.7 / order) * torch.where(accepted, self.previous_error ** (0.4 / order), 1.0)
        self.h = h * factor.clamp(0.2, 5.0)
        self.previous_error = torch.where(accepted, error, self.previous_error)
        self._leave()

    def _leave(self) -> None:
        c = self.control
        arrived = self.lam >= self.lam_end - 1e-9
        known = self.pair.prediction(self.memory)
        most = self.pair.later + (known is None)  # the next step's, and the last prediction
        tired = ~arrived & (self.nfe[self.active] + most > c.max_nfe)
        going = arrived | tired
        if not bool(going.any()):
            return
        self.unfinished[self.active[tired]] = True
        everyone, lam = self.active, self.lam
        self.active = everyone[going]
        self.out[self.active] = self.denoise(self.x[going], lam[going]) if known is None else known[going]
        stay = ~going
        self.active = everyone[stay]
        self.x, self.lam, self.h = self.x[stay], lam[stay], self.h[stay]
        self.previous_error = self.previous_error[stay]
        self.memory = tuple(part[stay] for part in self.memory)


def chosen(which: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows of a where `which` (B,), else of b."""
    return torch.where(which.view(-1, *(1,) * (a.ndim - 1)), a, b)


def subset(denoiser: Denoiser, index: Tensor, batch: int) -> Denoiser:
    """The denoiser of some samples of a batch: bound tensors of the batch's length are cut to them."""
    if len(index) == batch:
        return denoiser
    return denoiser.subset(index, batch)
