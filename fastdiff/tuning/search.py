"""Without learning: the best solver and grid of the registry for a budget, by successive halving on paired endpoint errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..bench.cells import LEFT_OUT
from ..errors import FastdiffError
from ..grid import GRIDS
from ..metrics import bootstrap, paired_bootstrap
from ..plans import Plan
from ..schedule import NoiseSchedule
from ..solvers import list_solvers
from ..solvers import plan as make_plan
from .targets import Pairs, endpoints, squared_errors

FIRST = 16  # seeds of the first round; each round doubles them
KEEP = 3  # a third goes on: of 300 candidates 100 see a second round, 34 a third
FINALISTS = 4


@dataclass(frozen=True)
class Ranked:
    """A candidate on all seeds: its RMSE with a bootstrap interval, and by how much its mean squared error exceeds the
    winner's (paired interval; 0 for the winner)."""

    plan: Plan
    rmse: float
    low: float
    high: float
    behind: tuple[float, float]


def candidates(schedule: NoiseSchedule, nfe: int) -> list[Plan]:
    """Every deterministic solver on every grid that can meet the budget, each table once, under its first name."""
    found: dict[tuple[object, ...], Plan] = {}
    for name, info in list_solvers().items():
        if info.stochastic:
            continue  # its samples have no paired error
        for grid in (g for g in GRIDS if g not in LEFT_OUT):
            try:
                plan = make_plan(name, schedule, nfe, grid=grid)
            except FastdiffError:
                continue  # the budget is too small for the method, or the grid has no such nodes on this schedule
            key = tuple(v for row in plan.rows for v in (row.t, row.next, row.base))
            found.setdefault(key, replace(plan, name=f"{name} · {grid}"))
    if not found:
        raise FastdiffError(f"no solver of the registry can sample in {nfe} evaluations: give more")
    return list(found.values())


def halving(plans: Sequence[Plan], pairs: Pairs, advance: Callable[[int], None] | None = None) -> list[Ranked]:
    """The finalists, best first, measured on all seeds; the others went out in rounds of 16, 32, 64, ... seeds."""
    errors: dict[int, np.ndarray] = {i: np.zeros(0) for i in range(len(plans))}
    done, until = 0, min(FIRST, pairs.setup.n)
    while done < pairs.setup.n:
        among = range(done, until)
        for i in errors:
            x = endpoints(plans[i], pairs, among)
            squared = squared_errors(x, pairs.target[done:until]).double().numpy()
            errors[i] = np.concatenate([errors[i], np.nan_to_num(squared, nan=math.inf)])
            if advance:
                advance(len(squared) * plans[i].nfe)
        ranked = sorted(errors, key=lambda i: float(errors[i].mean()))
        errors = {i: errors[i] for i in ranked[: max(FINALISTS, math.ceil(len(ranked) / KEEP))]}
        done, until = until, min(2 * until, pairs.setup.n)
    ranked = list(errors)[:FINALISTS]
    return [_ranked(plans[i], errors[i], errors[ranked[0]]) for i in ranked]


def cost(plans: Sequence[Plan], n: int) -> int:
    """Evaluations (images x NFE) that `halving` makes at most."""
    count, done, until, total = len(plans), 0, min(FIRST, n), 0
    nfe = max(plan.nfe for plan in plans)
    while done < n:
        total += count * (until - done) * nfe
        count = min(count, max(FINALISTS, math.ceil(count / KEEP)))
        done, until = until, min(2 * until, n)
    return total


def _ranked(plan: Plan, error: np.ndarray, winner: np.ndarray) -> Ranked:
    found = bootstrap(lambda rows: float(np.sqrt(error[rows].mean())), len(error))
    behind = (0.0, 0.0)
    if error is not winner:
        gain = paired_bootstrap(error, winner)
        behind = (gain.lo, gain.hi)
    return Ranked(plan, found.value, found.lo, found.hi, behind)

