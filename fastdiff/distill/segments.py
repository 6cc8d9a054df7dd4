"""One solver on many short intervals at once: each sample of a batch runs its own, with its own row of weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import FastdiffError
from ..plans import Plan, expand
from ..sampling import DenoiserLike
from ..schedule import NoiseSchedule
from ..solvers import plan as make_plan

Level = tuple[Tensor, Tensor]  # alpha and sigma
RHO = 7.0  # Karras et al. 2022, eq. 5


class Segments:
    """The intervals of a falling list of times, and the last one to clean data, each solved in `calls` teacher calls.

    Written against the start of its interval, the point after call k is (sigma_k/sigma_0) x + sum_j W_kj D_j for any solver
    that keeps mean and spread; so intervals differ in numbers alone, and a batch may mix them.

    Args:
        times: (n,) starts of the intervals, noisiest first.
        calls: evaluations in each interval.
        solver: a deterministic solver; the teacher's nodes inside an interval are spaced as the intervals are (`nodes`).
    """

    def __init__(self, schedule: NoiseSchedule, times: Sequence[float], calls: int, solver: str = "ddim") -> None:
        if calls < 1:
            raise FastdiffError(f"a segment needs at least 1 teacher call; given {calls}")
        plans = [_plan(schedule, solver, a, b, calls) for a, b in zip(times, [*times[1:], None], strict=True)]
        if any(p.stochastic or p.spread != "exact" or not all(row.calls for row in p.rows) for p in plans):
            raise FastdiffError(f"solver {solver} cannot teach: it must be deterministic and keep mean and spread")
        levels = np.array([[(row.alpha, row.sigma) for row in p.rows] + [p.end] for p in plans])
        self.times = torch.tensor([[row.t for row in p.rows] for p in plans])  # (n, calls)
        self.carry = torch.tensor(levels[:, 1:, 1] / levels[:, :1, 1])  # (n, calls): weight of the start
        self.weights = torch.tensor(np.array([expand(p) for p in plans]))  # (n, calls, calls)
        self.alpha, self.sigma = torch.tensor(levels[..., 0]), torch.tensor(levels[..., 1])  # (n, calls + 1)
        self.top = float(levels[0, 0, 1])  # sigma of the first start

    def __len__(self) -> int:
        return len(self.times)

    def run(self, teacher: DenoiserLike, x: Tensor, which: Tensor) -> Tensor:
        """From each sample's noisy state at the start of its interval (B, *) to its end; `which` (B,) names the intervals."""
        shape = (-1, *(1,) * (x.ndim - 1))
        times, carry, weights = self.times[which], self.carry[which], self.weights[which]
        y, predictions = x, []
        for k in range(self.times.shape[1]):
            predictions.append(teacher(y, times[:, k]))
            y = x * carry[:, k].to(x).view(shape)
            for j, d in enumerate(predictions):
                y = y + d * weights[:, k, j].to(x).view(shape)
        return y

    def target(self, x: Tensor, end: Tensor, which: Tensor) -> Tensor:
        """The denoised prediction with which one DDIM step takes x to the interval's end: `jump_target`."""
        start, stop = ((self.alpha[which, k], self.sigma[which, k]) for k in (0, -1))
        return jump_target(x, end, start, stop)


def jump_target(x: Tensor, end: Tensor, start: Level, stop: Level) -> Tensor:
    """The denoised prediction with which one DDIM step takes x (B, *) from level `start` to `end` at level `stop`.

    x~ = (z'' - (sigma''/sigma) z) / (alpha'' - (sigma''/sigma) alpha) (Salimans and Ho 2022, appendix G): a small difference of
    nearly equal numbers where intervals are short, so in float64.
    """
    shape = (-1, *(1,) * (x.ndim - 1))
    ratio = stop[1] / start[1]
    gain = stop[0] - ratio * start[0]
    ratio, gain = (v.to(x.device).view(shape) for v in (ratio, gain))
    return ((end.double() - ratio * x.double()) / gain).to(x.dtype)


def nodes(schedule: NoiseSchedule, a: float, b: float, count: int) -> np.ndarray:
    """`count` times from a to b, uniform; where time is sigma itself (ve, edm) uniform in sigma^(1/7), as EDM's own grid."""
    if schedule.name not in ("ve", "edm"):
        return np.linspace(a, b, count)
    t = np.linspace(a ** (1 / RHO), b ** (1 / RHO), count) ** RHO
    t[0], t[-1] = a, b  # to the bit
    return t


def _plan(schedule: NoiseSchedule, solver: str, a: float, b: float | None, calls: int) -> Plan:
    """A plan from time a to time b, or to clean data."""
    if b is None:
        inside = nodes(schedule, a, schedule.t_min, calls + 1)[:-1]
        return make_plan(solver, schedule, calls, grid=inside.tolist())
    return make_plan(solver, schedule, calls, grid=nodes(schedule, a, b, calls + 1).tolist(), end="sigma_min")
