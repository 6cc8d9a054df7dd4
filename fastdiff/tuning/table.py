"""A plan as trainable numbers: nodes in time and, for every point, the shares of all predictions before it.

Any deterministic plan with one evaluation a level can be written against its start alone: the point before evaluation i is

    y_i = (sigma_i/sigma_0) x + g_i * sum_j share_ij D_j,    g_i = alpha_i - alpha_0 sigma_i/sigma_0,    sum_j share_ij = 1.

(A non-stationary solver in the sense of Shaul et al. 2024.) The first factor keeps the plan's spread and the sum of the shares
its mean, exactly and for any parameters, so a learned table passes the same self-check as every other. Starting from a solver's
own shares, step 0 of the training is that solver.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..plans import IDENTITY, Plan, Row, Weights
from ..schedule import NoiseSchedule

FREEDOMS = ("nodes", "shares", "full")
FLOOR = 1e-5


def expand(plan: Plan) -> np.ndarray:
    """Rows of weights on all predictions, oldest first: [i, j] is D_j's in the point after row i; (n, n), lower triangular."""
    n = len(plan.rows)
    base = np.zeros(n + 1)  # weight on x, then on D_0 ... D_{n-1}
    base[0] = 1.0
    history: list[np.ndarray] = []
    out: list[np.ndarray] = []
    y = base
    for i, row in enumerate(plan.rows):
        prediction = np.zeros(n + 1)
        prediction[1 + i] = 1.0
        history = [p * y + q * prediction for p, q in row.store][::-1] + history
        y, base = (w.x * base + sum(h * v for h, v in zip(w.h, history, strict=False)) for w in (row.next, row.base))
        out.append(y[1:])
    return np.array(out)


class LearnedTable(nn.Module):
    """The trainable form of a plan on a schedule.

    Args:
        plan: a deterministic plan whose levels fall from row to row (multistep or predictor-corrector).
        freedom: "nodes" trains the times with the shares of the plan kept, "shares" the shares with the times kept, "full" both.

    Raises:
        FastdiffError: a stochastic plan, one that evaluates twice at a level, or one that waives its mean or spread.
    """

    def __init__(self, plan: Plan, schedule: NoiseSchedule, freedom: str = "full") -> None:
        super().__init__()
        if freedom not in FREEDOMS:
            raise FastdiffError(f"freedom must be one of {', '.join(FREEDOMS)}; given {freedom!r}")
        times = [row.t for row in plan.rows]
        falling = all(b < a for a, b in pairwise(times))
        if plan.stochastic or plan.draws or not falling or not all(row.calls and len(row.store) == 1 for row in plan.rows):
            raise FastdiffError(f"plan {plan.name} cannot be tuned: it draws noise, or evaluates twice at or above a level; "
                                "start from a multistep method")  # fmt: skip
        if plan.mean != "exact" or plan.spread != "exact" or plan.end[1] != 0.0:
            raise FastdiffError(f"plan {plan.name} cannot be tuned: it must keep mean and spread and end at clean data")
        self.schedule, self.source = schedule, plan
        first, last = times[0], schedule.t_min
        # increments of time as fractions of the whole way, through a softmax; the last leads to t_min, and where the plan's
        # last node lies there already it is moved off by a hundred-thousandth, or no gradient could move it
        steps = np.diff(-np.array([*times, last]))
        self.first, self.span = first, first - last
        increments = torch.tensor(np.log(np.maximum(steps, FLOOR * self.span)))
        self.increments = nn.Parameter(increments, requires_grad=freedom != "shares")
        n = len(times)
        shares = expand(plan) / self._gains(np.array([row.alpha for row in plan.rows] + [plan.end[0]]),
                                            np.array([row.sigma for row in plan.rows] + [plan.end[1]]))[1:, None]  # fmt: skip
        # the newest share is one minus the others
        self.shares = nn.Parameter(torch.tensor(np.tril(shares, -1)[:, : n - 1].copy()), requires_grad=freedom != "nodes")

    @staticmethod
    def _gains(alpha: Any, sigma: Any) -> Any:
        return alpha - alpha[0] * sigma / sigma[0]

    def times(self) -> Tensor:
        """The evaluation times (n,), noisiest first, float64."""
        way = torch.softmax(self.increments, dim=0).cumsum(0)[:-1] * self.span
        return torch.cat([way.new_tensor([self.first]), self.first - way])

    def levels(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma (n + 1,) of the nodes and the clean end."""
        t = self.times()
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return torch.cat([alpha, alpha.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)])

    def weights(self) -> Tensor:
        """(n, n): the weights on the predictions, oldest first, of the point after each row."""
        older, n = self.shares.tril(-1), len(self.shares)
        full = torch.cat([older, older.new_zeros(n, 1)], dim=1) + torch.diag(1 - older.sum(dim=1))
        return full * self._gains(*self.levels())[1:, None]

    def forward(self, denoiser: Denoiser, x: Tensor, checkpointing: bool = False) -> Tensor:
        """Runs the table, differentiably: x (B, *) is the state at the start level; returns the samples."""
        times, weights, (_, sigma) = self.times(), self.weights(), self.levels()
        predictions: list[Tensor] = []
        y = x
        for i in range(len(times)):
            t = times[i].expand(len(x))
            d = checkpoint(denoiser, y, t, use_reentrant=False) if checkpointing else denoiser(y, t)
            predictions.append(d)
            y = x * (sigma[i + 1] / sigma[0]).to(x.dtype)
            for j, d in enumerate(predictions):
                y = y + d * weights[i, j].to(x.dtype)
        return y

    def plan(self, name: str, provenance: dict[str, Any]) -> Plan:
        """The table as it stands, an ordinary Plan on its own start state."""
        with torch.no_grad():
            times, weights = self.times().tolist(), self.weights().numpy()
            alpha, sigma = (v.numpy() for v in self.levels())
        nexts = [Weights(float(sigma[i + 1] / sigma[0]), tuple(weights[i, i::-1].tolist())) for i in range(len(times))]
        rows = tuple(Row(t, float(alpha[i]), float(sigma[i]), nexts[i], IDENTITY) for i, t in enumerate(times))
        start, end = (float(alpha[0]), float(sigma[0])), (float(alpha[-1]), float(sigma[-1]))
        return Plan(name, rows, start, end, order=1, provenance=provenance)
