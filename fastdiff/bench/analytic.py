"""Every solver on every grid at every budget, on data whose denoiser is known in closed form: no network, float64, minutes.

The data is a mixture of Gaussians in a few dimensions, narrow as images are against the noise they start from. The error of an
ODE solver is its RMSE from the exact trajectory's end, over the same starts; of an SDE solver, which ends elsewhere by design,
the distance of the sets, as the mean 1-Wasserstein distance of projections.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..grid import GRIDS
from ..noise import from_seeds, normal
from ..sampling import sample
from ..schedule import NoiseSchedule, vp_cosine
from ..solvers import list_solvers, plan
from .cells import LEFT_OUT

BUDGETS = (3, 4, 5, 6, 8, 10, 15, 20, 30)
SETUP: dict[str, Any] = {
    "schedule": "vp_cosine", "components": 16, "dimensions": 8, "spread": 0.6, "widths": [0.05, 0.2], "n": 1024,
}  # fmt: skip
DISTILLED = ("lcm", "tcd", "consistency")  # processes of models trained for them: there is none here
REFERENCE = ("unipc-3", "uniform_lambda", 1280)  # solver, grid, calls; half of them say how far it is off


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians of equal weight: means (K, d), widths (K,)."""

    means: Tensor
    widths: Tensor

    @classmethod
    def made(cls) -> Mixture:
        """The data of the record, from Philox draws of seed 0: means of standard deviation `spread`, widths log-uniform."""
        k, d = SETUP["components"], SETUP["dimensions"]
        low, high = map(math.log, SETUP["widths"])
        means = normal([0], 1, k * d).view(k, d).double() * SETUP["spread"]
        uniform = torch.special.ndtr(normal([0], 2, k)[0].double())
        return cls(means, torch.exp(low + (high - low) * uniform))

    def denoiser(self, schedule: NoiseSchedule) -> Callable[[Tensor, float | Tensor], Tensor]:
        """E[x0 | x] at a time of the schedule, or at one a sample (n,), for x (n, d)."""

        def call(x: Tensor, t: float | Tensor) -> Tensor:
            alpha, sigma = (torch.as_tensor(f(t), dtype=torch.float64).view(-1, 1) for f in (schedule.alpha, schedule.sigma))
            variance = (alpha * self.widths) ** 2 + sigma**2
            away = x[:, None] - alpha[..., None] * self.means
            log = -0.5 * (away.square().sum(-1) / variance + x.shape[1] * variance.log())
            shares = torch.softmax(log, dim=1)[..., None]
            return (shares * (self.means + (alpha * self.widths**2 / variance)[..., None] * away)).sum(1)

        return call

    def samples(self, n: int) -> Tensor:
        """(n, d) draws of the data."""
        k = (torch.special.ndtr(normal(range(n), 4, 1)[:, 0]) * len(self.widths)).long().clamp(max=len(self.widths) - 1)
        return self.means[k] + self.widths[k, None] * normal(range(n), 3, self.means.shape[1]).double()


def distance(x: Tensor, y: Tensor) -> float:
    """Mean over 32 fixed directions of the 1-Wasserstein distance between the projections of two sets of equal size."""
    directions = torch.nn.functional.normalize(normal([1], 0, 32 * x.shape[1]).view(32, -1).double(), dim=1)
    a, b = ((v @ directions.T).sort(dim=0).values for v in (x, y))
    return float((a - b).abs().mean())


def measure(
    budgets: tuple[int, ...] = BUDGETS,
    solvers: Sequence[str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """The whole record, or that of some solvers. A line is a solver on a grid with `rmse` (None for an SDE) and `distance`, in
    the order of `budgets`.

    `progress` is called with a solver's name and its number of cells, once they are done.
    """
    schedule, data = vp_cosine(), Mixture.made()
    n, d = SETUP["n"], data.means.shape[1]
    ask = data.denoiser(schedule)
    start = normal(range(n), 0, d).double()
    real = data.samples(n)

    def run(solver: str, grid: str, nfe: int) -> Tensor:
        table = plan(solver, schedule, nfe, grid=grid)
        return sample(ask, table, from_seeds(range(n)), start=start * table.start[1], dtype=torch.float64)

    solver, spacing, calls = REFERENCE
    exact = run(solver, spacing, calls)
    grids = [g for g in GRIDS if g not in LEFT_OUT]
    lines: list[dict[str, Any]] = []
    for name, info in list_solvers().items():
        if name in DISTILLED or (solvers is not None and name not in solvers):
            continue
        for grid in grids:
            found = [run(name, grid, nfe) for nfe in budgets]
            errors = None if info.stochastic else [_rounded(rmse(x, exact)) for x in found]
            lines.append({"solver": name, "grid": grid, "rmse": errors, "distance": [_rounded(distance(x, real)) for x in found]})
        if progress is not None:
            progress(name, len(grids) * len(budgets))
    off = rmse(exact, run(solver, spacing, calls // 2))
    reference = {"solver": solver, "grid": spacing, "calls": calls, "movement": off, "distance": distance(exact, real)}
    floor = distance(data.samples(2 * n)[n:], real)  # one set of real data against another
    return {"setup": SETUP, "reference": reference, "floor": floor, "budgets": list(budgets), "lines": lines}


def rmse(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().mean().sqrt())


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def to_json(record: dict[str, Any]) -> str:
    """The record with one line of text for each line of figures."""
    head = {k: v for k, v in record.items() if k != "lines"}
    body = ",\n ".join(json.dumps(line) for line in record["lines"])
    return json.dumps(head, indent=1)[:-2] + ',\n "lines": [\n ' + body + "\n ]\n}\n"
