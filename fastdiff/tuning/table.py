"""A plan as trainable numbers: times and, for every point, the weights of all predictions before it.

Any deterministic plan can be written against its start alone: the point after evaluation i is

    y_{i+1} = (sigma_{i+1}/sigma_0) x + g_{i+1} * sum_j share_ij D_j,    g_i = alpha_i - alpha_0 sigma_i/sigma_0,

with shares that sum to 1 (a non-stationary solver, Shaul et al. 2024, with consistency held by construction). The first factor
keeps the plan's spread and the sum of the shares its mean, exactly and for any parameters, so a learned table passes the same
self-check as every other. `LearnedTable` trains the shares and the times; `nodes.SolverNodes` the times of a solver whose
formulas give the weights. Step 0 of either is the solver.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..plans import IDENTITY, Plan, Row, Weights, expand
from ..schedule import NoiseSchedule

FLOOR = 1e-5  # the least part of the whole way that a step may take at the start: no gradient moves one of length 0


class Numbers(NamedTuple):
    """What a run needs, float64: times (n,) that the network is told, weights (n, n) on the predictions (row i: the point after
    row i, oldest first), and the levels alpha, sigma (n + 1,) of the rows and the end."""

    times: Tensor
    weights: Tensor
    alpha: Tensor
    sigma: Tensor


def check_tunable(plan: Plan) -> None:
    """Raises FastdiffError where a plan cannot be written as shares: it draws noise, climbs, or leaves mean or spread."""
    climbs = any(b.sigma * a.alpha > a.sigma * b.alpha * (1 + 1e-12) for a, b in pairwise(plan.rows))
    if plan.stochastic or plan.draws or climbs or not all(row.calls for row in plan.rows):
        raise FastdiffError(f"plan {plan.name} cannot be tuned: it draws noise or climbs; start from a deterministic solver")
    if plan.mean != "exact" or plan.spread != "exact" or plan.end[1] != 0.0:
        raise FastdiffError(f"plan {plan.name} cannot be tuned: it must keep mean and spread and end at clean data")


class Table(nn.Module, ABC):
    """A trainable table; a subclass says what its `numbers` are and how it becomes a Plan. `label` names where it starts."""

    def __init__(self, schedule: NoiseSchedule, label: str, freedom: str) -> None:
        super().__init__()
        self.schedule, self.label, self.freedom = schedule, label, freedom

    @abstractmethod
    def numbers(self) -> Numbers:
        """What a run needs, differentiable in the parameters."""

    @abstractmethod
    def plan(self, name: str, provenance: dict[str, Any]) -> Plan:
        """The table as it stands, an ordinary Plan."""

    def forward(self, denoiser: Denoiser, x: Tensor, checkpointing: bool = False) -> Tensor:
        """Runs the table, differentiably: x (B, *) is the state at the start level; returns the samples."""
        times, weights, _, sigma = self.numbers()
        predictions: list[Tensor] = []
        y = x
        for i in range(len(times)):
            # the first time is fixed: cut off, the first call needs no backward pass where the start stays where it is
            t = (times[i] if i else times[i].detach()).expand(len(x))
            d = checkpoint(denoiser, y, t, use_reentrant=False) if checkpointing else denoiser(y, t)
            predictions.append(d)
            y = x * (sigma[i + 1] / sigma[0]).to(x.dtype)
            for j, d in enumerate(predictions):
                y = y + d * weights[i, j].to(x.dtype)
        return y


class Times(nn.Module):
    """Falling times from a fixed first one, as increments through a softmax; what is left of the way leads to t_min."""

    def __init__(self, times: np.ndarray, last: float, trained: bool) -> None:
        super().__init__()
        self.first, self.span = float(times[0]), float(times[0]) - last
        steps = np.maximum(np.diff(-np.array([*times, last])), FLOOR * self.span)
        self.increments = nn.Parameter(torch.tensor(np.log(steps)), requires_grad=trained)

    def forward(self) -> Tensor:
        """(n,), float64."""
        way = torch.softmax(self.increments, dim=0).cumsum(0)[:-1] * self.span
        return torch.cat([way.new_tensor([self.first]), self.first - way])


class LearnedTable(Table):
    """The shares and times of a plan as parameters.

    Args:
        plan: a deterministic plan whose levels never rise.
        freedom: "coefficients" trains the times and the shares of as many of the newest predictions as the plan itself reads
            (two at least), "full" the times, all shares, and apart from where a point is the time that the network is told there
            (the decoupled times of LD3, Tong et al. 2024, section 4.2).

    Raises:
        FastdiffError: a stochastic plan, or one that waives its mean or spread.
    """

    mask: Tensor
    initial: Tensor
    level: Tensor

    def __init__(self, plan: Plan, schedule: NoiseSchedule, freedom: str = "full", label: str = "") -> None:
        super().__init__(schedule, label or plan.name, freedom)
        check_tunable(plan)
        n = len(plan.rows)
        at, told = _times(plan, schedule)
        falling, level = np.unique(-at, return_inverse=True)  # rows at one level share its time: Heun evaluates twice there
        self.times = Times(-falling, schedule.t_min, trained=True)
        self.register_buffer("level", torch.tensor(level))
        shares = expand(plan) / _gains(np.array([row.alpha for row in plan.rows] + [plan.end[0]]),
                                       np.array([row.sigma for row in plan.rows] + [plan.end[1]]))[1:, None]  # fmt: skip
        window = n if freedom == "full" else max(2, *(len(w.h) for row in plan.rows for w in (row.next, row.base)))
        # the newest share is one minus the others
        mask = np.tril(np.ones((n, n)), -1) * np.triu(np.ones((n, n)), 1 - window)
        self.register_buffer("initial", torch.tensor(np.tril(shares, -1)[:, : n - 1].copy()))
        self.register_buffer("mask", torch.tensor(mask[:, : n - 1].copy()))
        self.corrections = nn.Parameter(torch.zeros(n, n - 1, dtype=torch.float64))
        # what the network is told, beside where the point is, in parts of the step that led there
        self.told = nn.Parameter(torch.tensor(told), requires_grad=freedom == "full")

    def numbers(self) -> Numbers:
        t = self.times()[self.level]
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        alpha, sigma = torch.cat([alpha, alpha.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)])
        older = self.initial + self.corrections * self.mask
        full = torch.cat([older, older.new_zeros(len(t), 1)], dim=1) + torch.diag(1 - older.sum(dim=1))
        step = torch.cat([t.new_zeros(1), t[:-1] - t[1:]])  # none leads to the first point: the network is told its own time
        told = (t + self.told * step).clamp(self.schedule.t_min, t[0].item())
        return Numbers(told, full * _gains(alpha, sigma)[1:, None], alpha, sigma)

    def plan(self, name: str, provenance: dict[str, Any]) -> Plan:
        with torch.no_grad():
            times, weights, alpha, sigma = (v.numpy() for v in self.numbers())
        nexts = [Weights(float(sigma[i + 1] / sigma[0]), tuple(weights[i, i::-1].tolist())) for i in range(len(times))]
        rows = tuple(Row(float(t), float(alpha[i]), float(sigma[i]), nexts[i], IDENTITY) for i, t in enumerate(times))
        start, end = (float(alpha[0]), float(sigma[0])), (float(alpha[-1]), float(sigma[-1]))
        return Plan(name, rows, start, end, order=1, provenance=provenance)


def _times(plan: Plan, schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
    """The times of the rows' levels, and what the network is told beside them in parts of the step: 0 but in a learned plan."""
    at = []
    for row in plan.rows:
        alpha, sigma = float(schedule.alpha(row.t)), float(schedule.sigma(row.t))
        own = abs(alpha - row.alpha) <= 1e-9 and abs(sigma - row.sigma) <= 1e-9 * max(1.0, sigma)
        at.append(row.t if own else float(schedule.t_of_lam(np.log(row.alpha / row.sigma))))
    times = np.array(at)
    step = np.concatenate([[0.0], times[:-1] - times[1:]])
    away = np.array([row.t for row in plan.rows]) - times
    return times, np.divide(away, step, out=np.zeros_like(away), where=step != 0.0)


def _gains(alpha: Any, sigma: Any) -> Any:
    return alpha - alpha[0] * sigma / sigma[0]
