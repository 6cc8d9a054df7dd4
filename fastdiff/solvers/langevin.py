"""Langevin dynamics as tables: NCSN's annealed Langevin sampling and the corrector of predictor-corrector sampling.

A step of size tau at a level is x + tau score + sqrt(2 tau) z with score = (alpha D - x)/sigma^2: affine, weights by level.
The papers take the size from norms of the batch at hand, tau = (r |z|/|score|)^2; a sample would then depend on its neighbours.
Here the norms' ratio is what it is on average for a perfect score of concentrated data, |z|/|score| = sigma, so that tau is
known beforehand and the sampler is a table. Whatever follows a corrector keeps the mean exactly and the spread up to its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import FastdiffError
from ..grid import Grid, Node
from ..plans import Plan, Row, Weights
from ..schedule import NoiseSchedule
from .info import Options
from .shared import ancestral, call_counts, check_counts, ends, row

SPREAD = "waived: a Langevin step of finite size leaves more noise than its level has"


def langevin(node: Node, size: float) -> Weights:
    """One step of size tau = size sigma^2 at a level, on (x, D, z)."""
    return Weights(1 - size, (size * node.alpha,), (math.sqrt(2 * size) * node.sigma,))


def _check(what: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise FastdiffError(f"{what} must lie between 0 and 1; given {value}")


def correcting_counts(
    calls: int | None, steps: int | None, from_zero: bool, to_zero: bool, options: Options
) -> tuple[tuple[int, ...], Options]:
    """Calls of each interval: the predictor's and `corrections` of the corrector, at the level where the predictor arrives. None
    at sigma = 0."""
    corrections = options.get("corrections", 1)
    if not isinstance(corrections, int) or isinstance(corrections, bool) or corrections < 0:
        raise FastdiffError(f"corrections must be a whole number of at least 0; given {corrections!r}")
    return call_counts(1 + corrections, calls, steps, False, to_zero), options


def build_predictor_corrector(
    schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], corrections: int = 1, snr: float = 0.16
) -> Plan:
    """Predictor-corrector sampling (Song et al. 2021, algorithms 2 to 5): the ancestral step, then annealed Langevin steps of
    size 2 (snr sigma)^2 at the level it reached. Data dependent in the paper, and not here: the norms in the step's size (see
    above), and the factor 1 - beta_i on it in VP, which goes to 1 as the grid gets finer."""
    check_counts(counts, grid, 1 + corrections)
    _check("snr", snr)
    rows = []
    for a, b, count in zip(grid.nodes, grid.nodes[1:], counts, strict=False):
        w = ancestral(a, b)
        rows.append(row(a, w, draw=(a.t, b.t) if w.z else None))
        rows += [row(b, langevin(b, 2 * snr**2), draw="free") for _ in range(count - 1)]
    return _plan("predictor-corrector", grid, rows)


def build_annealed_langevin(
    schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], each: int = 3, step: float = 0.2
) -> Plan:
    """NCSN's annealed Langevin dynamics (Song and Ermon 2019, algorithm 1): at every level of the grid `each` steps of size
    (step/2) sigma^2, the paper's alpha_i/2 with step = epsilon/sigma_L^2 (2e-5/0.01^2 there); then the state counts as one of the
    next level. The last step is the prediction (Song and Ermon 2020, section 3.3). Nothing is data dependent.

    From alpha = 0, where no score points to the data, and to the end the step is the ancestral one.
    """
    _check("step", step)
    rows = []
    for i, (a, b) in enumerate(zip(grid.nodes, grid.nodes[1:], strict=False)):
        if i == grid.steps - 1 or a.alpha == 0.0:
            w = ancestral(a, b)
            rows.append(row(a, w, draw=(a.t, b.t) if w.z else None))
            continue
        w = langevin(a, step / 2)
        rows += [row(a, w, draw="free") for _ in range(counts[i] - 1)]
        rows.append(row(a, w.scaled(b.alpha / a.alpha), draw="free"))
    return _plan("annealed-langevin", grid, rows)


def _plan(name: str, grid: Grid, rows: Sequence[Row]) -> Plan:
    spread = SPREAD if any(r.draw == "free" for r in rows) else "exact"
    return Plan(name, tuple(rows), **ends(grid), order=0, stochastic=any(r.draw is not None for r in rows), spread=spread)


def annealed_counts(
    calls: int | None, steps: int | None, from_zero: bool, to_zero: bool, options: Options
) -> tuple[tuple[int, ...], Options]:
    """Calls of each level: `each`, one in the first where it has no score and one in the last; what is left of a budget goes to a
    level before it."""
    each = options.get("each", 3)
    if not isinstance(each, int) or isinstance(each, bool) or each < 1:
        raise FastdiffError(f"each must be a whole number of at least 1; given {each!r}")
    return call_counts(each, calls, steps, from_zero, True), options
