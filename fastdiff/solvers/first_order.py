"""First order: DDIM at any eta, DDPM, Euler with churn and Euler ancestral. In (alpha, sigma) they are one step."""

from __future__ import annotations

import math

from ..errors import FastdiffError
from ..grid import Grid
from ..plans import Plan, Weights
from ..schedule import NoiseSchedule
from .churn import Churn
from .shared import ancestral, ddim, ends, row


def build_ddim(schedule: NoiseSchedule, grid: Grid, *, eta: float = 0.0) -> Plan:
    """DDIM (Song et al. 2020, eq. 12); eta = 1 is ancestral sampling. eta in [0, 1]."""
    if not 0.0 <= eta <= 1.0:
        raise FastdiffError(f"eta must lie in [0, 1]; given {eta}")
    rows = []
    for a, b in zip(grid.nodes, grid.nodes[1:], strict=False):
        w = ancestral(a, b, eta) if eta else ddim(a, b)
        rows.append(row(a, w, draw=(a.t, b.t) if w.z else None))
    return Plan("ddim" if not eta else f"ddim(eta={eta:g})", tuple(rows), **ends(grid), stochastic=eta > 0)


def build_euler_ancestral(schedule: NoiseSchedule, grid: Grid, *, eta: float = 1.0) -> Plan:
    """Euler ancestral (k-diffusion); the same table as DDIM at that eta."""
    plan = build_ddim(schedule, grid, eta=eta)
    return Plan("euler-ancestral", plan.rows, plan.start, plan.end, stochastic=plan.stochastic)


def build_ddpm(schedule: NoiseSchedule, grid: Grid, *, variance: str = "small") -> Plan:
    """DDPM's ancestral step (Ho et al. 2020, eq. 7), posterior variance "small" (beta-tilde), "large" (beta) or "learned",
    between the two by the network's second output (Nichol and Dhariwal 2021, eq. 15; diffusers' learned_range).

    The large variance has more noise than the posterior: the spread is waived.
    """
    if variance not in ("small", "large", "learned"):
        raise FastdiffError(f'variance must be "small", "large" or "learned"; given {variance!r}')
    rows = []
    for a, b in zip(grid.nodes, grid.nodes[1:], strict=False):
        w = ancestral(a, b)
        larger = a.sigma / b.sigma if w.z else 1.0  # beta/beta-tilde is its square: beta = 1 - alpha_a^2/alpha_b^2 where VP
        if variance == "large" and w.z:
            w = Weights(w.x, w.h, (w.z[0] * larger,))
        var = (0.0, math.log(larger)) if variance == "learned" and w.z else None
        rows.append(row(a, w, draw=(a.t, b.t) if w.z else None, var=var))
    spread = "exact" if variance == "small" else f"waived: the {variance} variance exceeds the posterior's"
    return Plan("ddpm", tuple(rows), **ends(grid), stochastic=True, spread=spread)


def build_euler(
    schedule: NoiseSchedule, grid: Grid, *,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> Plan:  # fmt: skip
    """Euler in sigma/alpha, with the churn of Karras et al. 2022, algorithm 2, without its correction."""
    churn = Churn(schedule, grid, s_churn, s_tmin, s_tmax, s_noise)
    rows = []
    for i in range(grid.steps):
        a, b = churn.level(i), grid.nodes[i + 1]
        rows.append(row(a, *churn.land(ddim(a, b), i + 1), draw=churn.draw(i + 1)))
    return Plan("euler", tuple(rows), **ends(grid), first=churn.first, **churn.declarations)
