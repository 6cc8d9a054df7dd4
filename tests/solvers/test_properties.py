"""Properties of every plan, over schedule, grid, solver, options, end and N together: what no example by hand would cover."""

import math

import numpy as np
import pytest
import torch
from analytic import BIMODAL
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_plans import INEXACT, SCHEDULES, VARIANTS

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.plans import Plan, expand
from fastdiff.sampling import run

GRIDS = {**{name: {} for name in fd.grid.GRIDS}, "flow_shift": {"num_tokens": 1024}}
ALL = [*VARIANTS, *((name, {}) for name in sorted(INEXACT)), ("restart", {"interval": (0.05, 20.0), "length": 3})]
START = np.linspace(-2.0, 2.0, 7)


def plan_of(name, schedule, nfe, grid, end, options):
    """The plan, or None where a restart's interval does not lie within the grid's levels, which is refused in one line."""
    try:
        return fd.plan(name, schedule, nfe, grid=grid, grid_options=GRIDS[grid], end=end, **options)
    except FastdiffError as e:
        if "interval" in options and "must hold a node of the grid" in str(e):
            return None
        raise


@st.composite
def made_plans(draw, most=12):
    """(plan, schedule, asked for): any solver with any of the tested options on any grid of any schedule."""
    name, options = draw(st.sampled_from(ALL))
    schedule = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    grid, end = draw(st.sampled_from(sorted(GRIDS))), draw(st.sampled_from(["zero", "sigma_min"]))
    nfe = draw(st.integers(1, most))
    plan = plan_of(name, schedule, nfe, grid, end, options)
    assume(plan is not None)
    return plan, schedule, nfe, end, grid


def check(plan, schedule, nfe, end, grid):
    assert plan.nfe == nfe
    assert Plan.from_json(plan.to_json()) == plan and repr(Plan.from_json(plan.to_json())) == repr(plan)
    lowest = float(schedule.t_of_lam(-math.log(0.029))) if grid == "ays" else schedule.t_min  # its tables have their own end
    least = (float(schedule.alpha(lowest)), float(schedule.sigma(lowest)))
    np.testing.assert_allclose(plan.end, (1.0, 0.0) if end == "zero" else least, rtol=1e-9, atol=0)
    mean, spread, rounding = plan.moments()[-1]  # the last row lands on the end, in mean and, where it is kept, in noise
    bound = 1e-12 * math.hypot(*plan.end) + rounding
    assert plan.mean != "exact" or abs(mean - plan.end[0]) <= bound
    assert plan.spread != "exact" or abs(spread - plan.end[1]) <= bound
    rng = np.random.default_rng(nfe)
    noises = torch.from_numpy(rng.standard_normal((1 + plan.draws, len(START))))
    level = {row.t: (row.alpha, row.sigma) for row in plan.rows}
    seen = []
    out = run(
        lambda y, t: torch.from_numpy(BIMODAL.denoise(y.numpy(), *level[t])), plan, torch.from_numpy(START * plan.start[1]),
        fd.noise.recorded(list(noises)), callback=lambda i, y: seen.append(y),
    )  # fmt: skip
    assert len(seen) == len(plan.rows) and all(bool(y.isfinite().all()) for y in seen) and torch.equal(out, seen[-1])


def check_expanded(plan):
    """The triangular form says of each prediction what the executor makes of it: with predictions that are given, not asked."""
    rng = np.random.default_rng(len(plan.rows))
    given_ = torch.from_numpy(rng.standard_normal((len(plan.rows), len(START))))
    silence = fd.noise.recorded([torch.zeros(len(START), dtype=torch.float64)] * (1 + plan.draws))

    def points(predictions, start):
        answers, seen = iter(predictions), []
        run(lambda y, t: next(answers).clone(), plan, torch.from_numpy(start), silence, lambda i, y: seen.append(y.clone()))
        return torch.stack(seen).numpy()

    weights = expand(plan)
    assert (np.triu(weights, 1) == 0).all()
    # rounding: what is summed up on the way is as large as the largest weight at any point, and on eps as 1/sigma of its level
    size = 1e-11 * max(1.0, np.abs(weights).sum(1).max()) + 10 * max(r for _, _, r in plan.moments())
    np.testing.assert_allclose(points(given_, 0 * START), weights @ given_.numpy(), rtol=0, atol=size)
    if not plan.stochastic and plan.spread == "exact":
        carried = points(0 * given_, START)[-1]
        np.testing.assert_allclose(carried, START * plan.end[1] / plan.start[1], rtol=0, atol=size)


@settings(max_examples=150)
@given(made_plans())
def test_every_plan_is_finite_exact_in_calls_and_files_and_lands_on_its_end(made):
    check(*made)


@settings(max_examples=100)
@given(made_plans())
def test_the_expanded_form_is_the_executor(made):
    check_expanded(made[0])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "options"), ALL, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_the_exhaustive_matrix(name, options, schedule):
    """Every solver and option on every schedule and grid, to both ends, at 1, 3 and 8 or 2, 5 and 12 calls."""
    s, checked = SCHEDULES[schedule], 0
    for grid in GRIDS:
        for end, budgets in (("zero", (1, 3, 8)), ("sigma_min", (2, 5, 12))):
            for nfe in budgets:
                if (plan := plan_of(name, s, nfe, grid, end, options)) is None:
                    continue
                check(plan, s, nfe, end, grid)
                check_expanded(plan)
                checked += 1
    assert checked == 6 * len(GRIDS) or ("interval" in options and checked >= len(GRIDS))
