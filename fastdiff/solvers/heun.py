"""Heun's method in sigma/alpha: EDM's second-order sampler (Karras et al. 2022, algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence

from ..grid import Grid, Node
from ..plans import IDENTITY, Plan, Weights
from ..schedule import NoiseSchedule
from .churn import Churn
from .shared import carry, check_counts, ddim, ends, gain, row


def build_heun(
    schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int],
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> Plan:  # fmt: skip
    """A step of two calls is the trapezoidal rule on eps = (x - alpha D)/sigma; of one call, Euler."""
    check_counts(counts, grid, 2)
    churn = Churn(schedule, grid, s_churn, s_tmin, s_tmax, s_noise)
    rows = []
    for i, count in enumerate(counts):
        a, b = churn.level(i), grid.nodes[i + 1]
        last = ddim(a, b)
        if count == 2 and b.sigma > 0.0:
            rows.append(row(a, last, IDENTITY))
            a, last = b, trapezoid(a, b)
        rows.append(row(a, *churn.land(last, i + 1), draw=churn.draw(i + 1)))
    return Plan("heun", tuple(rows), **ends(grid), first=churn.first, order=2, **churn.declarations)


def trapezoid(a: Node, b: Node) -> Weights:
    """The trapezoidal rule on eps, on (base, D at b, D at a), with Euler's point put in for the state at b.

    It loses nothing to the division by sigma_b that eps needs. At alpha = 0 eps holds no prediction: there the two
    denoised predictions are averaged instead, to the same order.
    """
    k = gain(a, b)
    newer = b.alpha * (a.u / b.u - 1) / 2 if a.alpha > 0.0 else k / 2
    return Weights(carry(a, b), (newer, k - newer))
