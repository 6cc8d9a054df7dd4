"""Stochastic samplers that are no variant of an ODE method: Euler-Maruyama, ER-SDE-Solver and restart sampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import FastdiffError
from ..grid import Grid, Node, node_at_lam
from ..plans import Plan, Weights
from ..schedule import NoiseSchedule
from .churn import lift_between
from .dpmpp import check_eta
from .forms import Denoised, ExtendedReverse
from .heun import trapezoid
from .loops import Stage, add_stages, multistep, step
from .shared import ancestral, call_counts, check_counts, ddim, ends, row
from .tape import Sum, Tape


def build_euler_maruyama(schedule: NoiseSchedule, grid: Grid, *, eta: float = 1.0) -> Plan:
    """Euler-Maruyama on the reverse-time SDE in the schedule's own t (Song et al. 2021, eq. 6): drift f x - (1 + eta^2)/2 g^2
    score, noise eta g; eta = 0 is Euler on the probability-flow ODE in t. Mean and spread are kept to first order only.

    The step from alpha = 0, where f is infinite, and the one to sigma = 0 are those for a constant prediction.
    """
    check_eta(eta, most=float("inf"))
    rows = []
    for a, b in zip(grid.nodes, grid.nodes[1:], strict=False):
        if a.alpha == 0.0 or b.sigma == 0.0:
            w = ancestral(a, b, min(eta, 1.0)) if eta else ddim(a, b)
        else:
            dt = a.t - b.t
            f = _slope(lambda t: np.log(schedule.alpha(t)), a.t, dt)
            g2 = -2 * a.sigma**2 * _slope(schedule.lam, a.t, dt)
            pull = (1 + eta**2) / 2 * g2 * dt / a.sigma**2
            w = Weights(1 - f * dt - pull, (pull * a.alpha,), (eta * float(np.sqrt(g2 * dt)),) if eta else ())
        rows.append(row(a, w, draw=(a.t, b.t) if w.z else None))
    return Plan("euler-maruyama", tuple(rows), **ends(grid), stochastic=eta > 0, mean="order 1", spread="order 1")


def _slope(f: Callable[[float], float], t: float, dt: float) -> float:
    """df/dt from the side of the step, to about 1e-8: far below the error of a first-order method."""
    d = 1e-4 * dt
    return float((3 * f(t) - 4 * f(t - d) + f(t - 2 * d)) / (2 * d))


def build_er_sde(schedule: NoiseSchedule, grid: Grid, *, order: int, published: bool = False) -> Plan:
    """ER-SDE-Solver-k (Cui et al. 2023, algorithms 2 to 4) with the authors' noise function, on data prediction."""
    tape = multistep(schedule, grid, ExtendedReverse(published), order)
    name = f"er-sde-{order}" + ("-compat" if published else "")
    return Plan(name, tuple(tape.rows), **ends(grid), order=min(order, 2), stochastic=True)


def restart_counts(
    calls: int | None, steps: int | None, from_zero: bool, to_zero: bool, options: dict[str, Any]
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Calls of the grid's steps, and how many repeats a budget allows: fewer than asked for where it is too small."""
    repeats, length, after = (options.get(k, v) for k, v in (("repeats", 1), ("length", 2), ("after", 2)))
    interval = options.get("interval")
    _check_restart(repeats, length, after, interval)
    room = length + after if interval is None else 1  # steps that must lie around the turn
    for k in range(repeats, -1, -1):
        left = None if calls is None else calls - 2 * k * length
        if left is not None and left < 1:
            continue
        counts = call_counts(2, left, steps, False, to_zero)
        if k == 0 or len(counts) > room:
            break
    return counts, {**options, "repeats": k}


def _check_restart(repeats: int, length: int, after: int, interval: tuple[float, float] | None) -> None:
    if not all(isinstance(v, int) for v in (repeats, length, after)) or repeats < 0 or length < 1 or after < 2:
        given = f"{repeats}, {length}, {after}"
        raise FastdiffError(f"restart needs whole numbers repeats >= 0, length >= 1 and after >= 2; given {given}")
    if interval is not None and not (len(interval) == 2 and 0 < interval[0] < interval[1] < math.inf and after == 2):
        raise FastdiffError(f"restart's interval is (low, high) in sigma/alpha, 0 < low < high, and after= does not go with it; "
                            f"given {interval}, after = {after}")  # fmt: skip


def build_restart(
    schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], repeats: int = 1, length: int = 2, after: int = 2,
    interval: tuple[float, float] | None = None,
) -> Plan:  # fmt: skip
    """Restart sampling (Xu et al. 2023, algorithm 1) on Heun's method: from a node of the grid noise is added back up to a higher
    level, from where `length` steps lead down again, `repeats` times.

    The node lies `after` steps before the end and the level `length` steps before the node; or, with an interval (low, high) in
    sigma/alpha as in the paper, the node is the one nearest to low, the level is high, and the steps between are karras'.
    """
    check_counts(counts, grid, 2)
    _check_restart(repeats, length, after, interval)
    path = list(zip(grid.nodes, grid.nodes[1:], counts, strict=False))
    if repeats:
        turn = grid.steps - after if interval is None else _nearest(grid, interval)
        down = list(grid.nodes[turn - length : turn + 1])
        if interval is not None:
            down = _between(schedule, interval[1], grid.nodes[turn], length)
        again = [(a, b, 2) for a, b in itertools.pairwise(down)]
        path = [*path[:turn], *again * repeats, *path[turn:]]
    tape = Tape()
    for n, (a, b, calls) in enumerate(path):
        found, draw = _heun(a, b, calls, n), None
        if n + 1 < len(path) and path[n + 1][0].t != b.t:
            scale, fresh = lift_between(b, path[n + 1][0])
            node, key, point = found[-1]
            found[-1], draw = (node, key, Sum(point.x * scale, point.scaled(scale).h, ((key, fresh),))), "free"
        add_stages(tape, Denoised(), found, draw=draw)
    return Plan("restart", tuple(tape.rows), **ends(grid), order=2, stochastic=repeats > 0)


def _nearest(grid: Grid, interval: tuple[float, float]) -> int:
    """The node inside the grid nearest to the interval's lower level."""
    inner = [i for i, node in enumerate(grid.nodes) if i and node.sigma > 0.0 and node.u < interval[1]]
    if not inner or interval[1] > grid.nodes[0].u:
        raise FastdiffError(f"restart's interval {interval} must hold a node of the grid below its upper end, and lie below its "
                            f"noisiest level, {grid.nodes[0].u:g}: give more steps or another interval")  # fmt: skip
    return min(inner, key=lambda i: abs(math.log(grid.nodes[i].u / interval[0])))


def _between(schedule: NoiseSchedule, high: float, low: Node, length: int) -> list[Node]:
    """The nodes of `length` steps from sigma/alpha = high down to a node, as karras spaces them."""
    us = np.linspace(high ** (1 / 7), low.u ** (1 / 7), length + 1)[:-1] ** 7
    return [*(node_at_lam(schedule, -math.log(u)) for u in us), low]


def _heun(a: Node, b: Node, calls: int, n: int) -> list[Stage]:
    euler = step(Denoised(), [(n, a)], a, b)
    if calls == 1 or b.sigma == 0.0:
        return [(a, n, euler)]
    w = trapezoid(a, b)
    return [(a, n, euler), (b, (n, 1), Sum(w.x, (((n, 1), w.h[0]), (n, w.h[1]))))]
