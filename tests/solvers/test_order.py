"""The order of every solver, measured as DESIGN.md defines it: from a start near lam = 0 to sigma_min, on two grids."""

import itertools
import math

import numpy as np
import pytest
from analytic import BIMODAL, GAUSSIAN, interpret, result

import fastdiff as fd

STEPS = (40, 80, 160, 320)  # three halvings
FLOOR = 1e-13  # rounding of a run in float64; the slope is fitted where errors are 100 times above
SCHEDULES = {
    "edm": fd.schedule.edm(sigma_min=0.02, sigma_max=1.5),
    "vp_cosine": fd.schedule.vp_cosine(logsnr_min=-1.0, logsnr_max=7.0),
}
GRIDS = ("karras", "uniform_lambda")
POINTS = np.linspace(-2.2, 2.2, 9)
DETERMINISTIC = [name for name, info in fd.list_solvers().items() if not info.stochastic]


def slope(errors):
    """Orders gained per halving of the step: least squares of log error on log steps."""
    return -np.polyfit(np.log2(STEPS), np.log2(errors), 1)[0]


def errors(name, schedule, grid, data, **options):
    plans = [fd.plan(name, schedule, steps=n, grid=grid, end="sigma_min", **options) for n in STEPS]
    start = POINTS * math.hypot(*plans[0].start)
    exact = data.flow(start, plans[0].start, plans[0].end)
    return [float(np.sqrt(np.mean((result(p, data.denoise, start) - exact) ** 2))) for p in plans], plans


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_and_convergence(name, schedule, grid):
    for data in (GAUSSIAN, BIMODAL):
        found, plans = errors(name, SCHEDULES[schedule], grid, data)
        stated = fd.list_solvers()[name].order
        assert {p.order for p in plans} == {stated}
        assert min(found) > 100 * FLOOR
        assert slope(found) >= stated - 0.15
        for n, coarse, fine in zip(STEPS, found, found[1:], strict=False):
            assert n < 80 or fine <= max(FLOOR, 1.05 * coarse)


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("unipc-3", {"correct": False}, 2),
        ("unipc-1", {"correct": False}, 1),
        ("unipc-3", {"lower_final": True}, 2),
        ("dpmpp-3m", {"lower_final": True}, 2),
        ("dpmpp-2m", {"lower_final": False}, 2),
    ],
)
def test_order_with_options(name, options, order):
    found, plans = errors(name, SCHEDULES["edm"], "karras", BIMODAL, **options)
    assert plans[0].order == order
    assert order - 0.15 <= slope(found) <= order + 0.5  # stated neither above nor a whole order below what it reaches


STOCHASTIC = [
    ("ddpm", {}),
    ("euler-ancestral", {}),
    ("euler-ancestral", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("ddim", {"eta": 0.3}),
    ("euler", {"s_churn": 5.0}),
    ("heun", {"s_churn": 5.0}),
]


def moments(plan, data):
    """Mean and variance of a plan's result on Gaussian data, exactly.

    The denoiser is affine there, so a state is a vector: its mean and its weights on the independent unit normals.
    """
    (c,), (s,) = data.means, data.stds
    unit = np.eye(2 + plan.draws)

    def denoise(y, alpha, sigma):
        return c * unit[0] + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (y - alpha * c * unit[0])

    start = plan.start[0] * c * unit[0] + data.std(*plan.start) * unit[1]
    end = interpret(plan, denoise, start, unit[2:])[-1]
    return end[0], float(end[1:] @ end[1:])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
def test_stochastic_moments_on_gaussian_data(name, options, schedule, grid):
    found = []
    for n in STEPS:
        plan = fd.plan(name, SCHEDULES[schedule], steps=n, grid=grid, end="sigma_min", **options)
        assert plan.stochastic and plan.draws >= n - 1
        mean, variance = moments(plan, GAUSSIAN)
        assert mean == pytest.approx(plan.end[0] * GAUSSIAN.means[0], abs=1e-12)
        found.append(abs(variance - GAUSSIAN.std(*plan.end) ** 2))
    assert slope(found) >= 1 - 0.15
    assert all(fine <= 1.05 * coarse for coarse, fine in itertools.pairwise(found[1:]))


def test_every_stochastic_solver_is_covered():
    assert {n for n, i in fd.list_solvers().items() if i.stochastic} <= {n for n, _ in STOCHASTIC}
