"""Sampling of distilled few-step models: every step predicts clean data, then noise leads back to the next level.

They have no order: with more steps they sample another process than the ODE, and their models are trained for few.
"""

from __future__ import annotations

import math

from ..errors import FastdiffError
from ..grid import Grid, Node, node_at
from ..plans import Plan, Weights
from ..schedule import NoiseSchedule, VPFromAlphasCumprod
from .churn import lift_between
from .shared import ddim, ends, row


def build_lcm(schedule: NoiseSchedule, grid: Grid) -> Plan:
    """Multistep latent consistency sampling (Luo et al. 2023, algorithm 3): the prediction, noised to the next level. The model's
    boundary condition (c_skip, c_out) belongs to its denoiser."""
    rows = []
    for a, b in zip(grid.nodes, grid.nodes[1:], strict=False):
        fresh = (b.sigma,) if b.sigma else ()
        rows.append(row(a, Weights(0.0, (b.alpha,), fresh), draw=(a.t, b.t) if fresh else None))
    return Plan("lcm", tuple(rows), **ends(grid), order=0, stochastic=len(rows) > 1 or grid.nodes[-1].sigma > 0)


def build_consistency(schedule: NoiseSchedule, grid: Grid) -> Plan:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): the prediction counts as a sample at the least noisy level,
    so what is added leaves that level's noise out, and the spread falls short by it."""
    least = math.exp(-float(schedule.lam(schedule.t_min)))  # epsilon, as sigma/alpha
    rows = []
    for a, b in zip(grid.nodes, grid.nodes[1:], strict=False):
        up = b.alpha * math.sqrt(max((b.u - least) * (b.u + least), 0.0)) if b.sigma else 0.0
        fresh = (up,) if up else ()
        rows.append(row(a, Weights(0.0, (b.alpha,), fresh), draw=(a.t, b.t) if fresh else None))
    spread = "waived: the noise of the least noisy level is left out" if len(rows) > 1 or grid.nodes[-1].sigma else "exact"
    noisy = any(r.draw is not None for r in rows)
    return Plan("consistency", tuple(rows), **ends(grid), order=0, stochastic=noisy, spread=spread)


def build_tcd(schedule: NoiseSchedule, grid: Grid, *, gamma: float = 0.3) -> Plan:
    """Strategic stochastic sampling of trajectory consistency models (Zheng et al. 2024, algorithm 4): a deterministic step to
    the time (1 - gamma) t_b, then noise up to b. gamma 0 is DDIM, 1 consistency sampling. A discrete-time model goes to whole
    times."""
    if not 0.0 <= gamma <= 1.0:
        raise FastdiffError(f"gamma must lie in [0, 1]; given {gamma}")
    rows = []
    for a, b in zip(grid.nodes, grid.nodes[1:], strict=False):
        w, fresh = _through(a, b, _below(schedule, b, gamma))
        rows.append(row(a, w, draw=(a.t, b.t) if fresh else None))
    return Plan("tcd", tuple(rows), **ends(grid), order=0, stochastic=any(r.draw is not None for r in rows))


def _below(schedule: NoiseSchedule, b: Node, gamma: float) -> Node:
    if not b.sigma or not gamma:
        return b
    t = (1 - gamma) * b.t
    t = math.floor(t) if isinstance(schedule, VPFromAlphasCumprod) else t
    return node_at(schedule, min(max(t, schedule.t_min), b.t))


def _through(a: Node, b: Node, s: Node) -> tuple[Weights, bool]:
    """From a to s without noise, and with it up to b."""
    w = ddim(a, s)
    if s.t == b.t:
        return ddim(a, b), False
    scale, fresh = lift_between(s, b)
    return Weights(w.x * scale, tuple(h * scale for h in w.h), (fresh,)), True
