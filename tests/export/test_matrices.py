"""The matrices of a plan give what the eager executor gives, for every solver, whatever its rows look like."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.export.table import compile_table
from fastdiff.plans import IDENTITY, Plan, Row, Weights

CHURN = {"s_churn": 40.0}
OPTIONS = {"euler churn": ("euler", CHURN), "heun churn": ("heun", CHURN), "ddim eta": ("ddim", {"eta": 0.7})}
CASES = {**{name: (name, {}) for name in fd.list_solvers()}, **OPTIONS}


def curved(x, t):
    """A prediction that is neither linear nor the same for two points or two times."""
    return (x * 0.3 + t).sin() * 0.8 if isinstance(x, torch.Tensor) else np.sin(x * 0.3 + t) * 0.8


def both(plan):
    draws = [torch.randn(3, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(plan.draws + 1)]
    want = fd.sample(curved, plan, fd.noise.recorded(draws), start=draws[0] * plan.start[1], dtype=torch.float64)
    got = compile_table(plan).run(draws[0].numpy() * plan.start[1], [z.numpy() for z in draws[1:]], curved)
    return got, want.numpy()


@pytest.mark.parametrize("nfe", [1, 2, 5, 9])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("case", CASES)
def test_the_matrices_are_the_plan(case, nfe, end):
    solver, options = CASES[case]
    for schedule in (fd.schedule.vp_cosine(), fd.schedule.edm()):
        plan = fd.plan(solver, schedule, nfe, end=end, **options)
        got, want = both(plan)
        # eps forms cancel weights that are hundreds of times their sum: what they round off stays
        largest = max(sum(map(abs, w.values)) for row in plan.rows for w in (row.next, row.base))
        np.testing.assert_allclose(got, want, rtol=0, atol=max(1e-11, 1e-12 * largest) * max(1.0, np.abs(want).max()))


def test_told_times_are_the_rows_own():
    plan = fd.plan("unipc-2", fd.schedule.vp_cosine(), 6)
    moved = replace(plan, rows=tuple(replace(row, t=row.t * 0.98) for row in plan.rows))
    got, want = both(moved)
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert np.abs(want - both(plan)[1]).max() > 1e-3, "the shift must show, or the test says nothing"
    np.testing.assert_array_equal(compile_table(moved).t, [row.t for row in moved.rows])


def test_rows_without_a_call_are_multiplied_in():
    """A restart: noise in rows of their own, before the first call, between two calls and behind the last."""
    alpha = 1.0
    lift = Row(0.5, alpha, 1.0, Weights(1.0, (), (1.0,)), Weights(1.0, (), (1.0,)), store=(), draw="free")
    twice = replace(lift, sigma=2**0.5)
    ddim = Row(0.5, alpha, 3**0.5, Weights(0.5, (0.5,)), Weights(0.5, (0.5,)))
    rows = (lift, twice, ddim, replace(lift, sigma=0.75**0.5), replace(ddim, sigma=1.75**0.5), replace(lift, sigma=0.4375**0.5))
    plan = Plan("restart", rows, (1.0, 1.0), (1.0, 1.4375**0.5), stochastic=True)
    table = compile_table(plan)
    assert (plan.nfe, len(table.rows), plan.draws) == (2, 2, 4)
    got, want = both(plan)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_multistep_method_carries_no_base_of_its_own():
    plan = fd.plan("dpmpp-2m", fd.schedule.vp_cosine(), 6)
    assert compile_table(plan).states == plan.registers


def test_a_plan_without_a_call_is_refused():
    idle = Plan("idle", (Row(0.5, 1.0, 1.0, IDENTITY, IDENTITY, store=()),), (1.0, 1.0), (1.0, 1.0))
    with pytest.raises(FastdiffError, match="idle never calls"):
        compile_table(idle)
