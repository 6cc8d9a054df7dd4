"""The order of every solver, measured as DESIGN.md defines it: from a start near lam = 0 to sigma_min, on two grids."""

import itertools
import math

import numpy as np
import pytest
import torch
from analytic import BIMODAL, GAUSSIAN, interpret, result

import fastdiff as fd

STEPS = (40, 80, 160, 320)  # three halvings
MORE = (640, 1280)  # where three halvings from 40 are not asymptotic yet: an error that changes its sign on the way
FLOOR = 1e-13  # rounding of a run in float64; the slope is fitted where errors are 100 times above
SCHEDULES = {
    "edm": fd.schedule.edm(sigma_min=0.02, sigma_max=1.5),
    "vp_cosine": fd.schedule.vp_cosine(logsnr_min=-1.0, logsnr_max=7.0),
}
GRIDS = ("karras", "uniform_lambda")
POINTS = np.linspace(-2.2, 2.2, 9)
SOLVERS = fd.list_solvers()
DETERMINISTIC = [name for name, info in SOLVERS.items() if not info.stochastic]
MULTISTEP = [name for name in DETERMINISTIC if "start" in SOLVERS[name].options]
SUBSET = [("edm", "karras"), ("vp_cosine", "uniform_lambda")]  # the others are slow
EVERY = [pytest.param(s, g, marks=() if (s, g) in SUBSET else pytest.mark.slow) for s in SCHEDULES for g in GRIDS]


def slope(errors, steps=STEPS):
    """Orders gained per halving of the step: least squares of log error on log steps."""
    return -np.polyfit(np.log2(steps), np.log2(errors), 1)[0]


def errors(name, schedule, grid, data, steps=STEPS, **options):
    plans = [fd.plan(name, schedule, steps=n, grid=grid, end="sigma_min", **options) for n in steps]
    start = POINTS * math.hypot(*plans[0].start)
    exact = data.flow(start, plans[0].start, plans[0].end)
    return [float(np.sqrt(np.mean((result(p, data.denoise, start) - exact) ** 2))) for p in plans], plans


def last_slope(found, measure, stated):
    """The slope of the last three halvings above the floor; more of them where the first three are not there yet.

    `measure(n)` is the error at n steps.
    """
    steps = list(STEPS)
    for n in (0, *MORE):
        if n:
            steps, found = [*steps[1:], n], [*found[1:], measure(n)]
        if slope(found, steps) >= stated - 0.15 or found[-1] <= 100 * FLOOR:
            break
    return slope(found, steps)


def check_order(name, schedule, grid, data, stated, **options):
    found, plans = errors(name, SCHEDULES[schedule], grid, data, **options)
    assert {p.order for p in plans} == {stated}
    assert min(found) > 100 * FLOOR

    def measure(n):
        return errors(name, SCHEDULES[schedule], grid, data, (n,), **options)[0][0]

    assert last_slope(found, measure, stated) >= stated - 0.15
    for n, coarse, fine in zip(STEPS, found, found[1:], strict=False):
        assert n < 80 or fine <= max(FLOOR, 1.05 * coarse)
    return plans


@pytest.mark.parametrize(("schedule", "grid"), EVERY)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_and_convergence(name, schedule, grid):
    for data in (GAUSSIAN, BIMODAL):
        check_order(name, schedule, grid, data, SOLVERS[name].order)


@pytest.mark.parametrize(("schedule", "grid"), EVERY)
@pytest.mark.parametrize("name", [n for n in MULTISTEP if SOLVERS[n].first])
def test_full_order_with_a_runge_kutta_start(name, schedule, grid):
    info = SOLVERS[name]
    for data in (GAUSSIAN, BIMODAL):
        for n, plan in zip(STEPS, check_order(name, schedule, grid, data, info.full_order, start="rk"), strict=True):
            extra = sum(info.first) - len(info.first)
            assert plan.nfe == n + extra and plan.provenance == {"start": "rk", "start_calls": extra}


def test_a_start_that_costs_nothing_is_the_ramp():
    """Up to order 2 (UniPC with its corrector: 3) a first-order start loses nothing."""
    for name in (n for n in MULTISTEP if not SOLVERS[n].first):
        ramp, rk = (fd.plan(name, SCHEDULES["edm"], 8, start=start) for start in ("ramp", "rk"))
        assert rk.rows == ramp.rows and rk.order == ramp.order == SOLVERS[name].order == SOLVERS[name].full_order


@pytest.mark.parametrize("nfe", range(1, 12))
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("schedule", ["edm", "flow"])
@pytest.mark.parametrize("name", [n for n in SOLVERS if SOLVERS[n].first])
def test_calls_are_exact_with_a_start(name, schedule, end, nfe):
    options = {"start": "rk"} if "start" in SOLVERS[name].options else {}
    plan = fd.plan(name, {**SCHEDULES, "flow": fd.schedule.flow()}[schedule], nfe, end=end, **options)
    assert plan.nfe == nfe


def test_every_solver_states_an_order_or_why_it_has_none():
    for name, info in SOLVERS.items():
        assert bool(info.order) != bool(info.why_no_order), name
        assert ("start" in info.options) <= (info.full_order >= info.order), name
        assert fd.plan(name, SCHEDULES["edm"], 6).order == info.order or name == "restart", name


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("unipc-3", {"correct": False}, 2),
        ("unipc-3", {"correct": False, "start": "rk"}, 3),
        ("unipc-2", {"variant": "bh1"}, 3),
        ("unipc-4", {"variant": "bh1", "start": "rk"}, 5),
        ("gradient-estimation", {"gamma": 1.2}, 1),
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
    *((name, {}) for name, info in SOLVERS.items() if info.stochastic and info.order),
    ("euler-ancestral", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("ddim", {"eta": 0.3}),
    ("euler", {"s_churn": 5.0}),
    ("heun", {"s_churn": 5.0}),
    ("dpm-2", {"s_churn": 5.0}),
    ("dpm-2-ancestral", {"eta": 0.5}),
    ("dpmpp-2s-ancestral", {"eta": 0.5}),
    ("dpmpp-sde", {"eta": 0.5}),
    ("dpmpp-sde", {"one_path": False}),
    ("dpmpp-2m-sde", {"eta": 0.5}),
    ("dpmpp-2m-sde", {"eta": 2.0}),
    ("dpmpp-2m-sde", {"second": "exact"}),
    ("sa-solver", {"tau": 0.5}),
    ("sa-solver", {"tau_min": 0.1, "tau_max": 0.5}),
    ("sa-solver", {"predictor": 3, "corrector": 4}),
    ("sa-solver", {"predictor": 3, "corrector": 0}),
    ("sa-solver", {"predictor": 2, "corrector": 1}),
    ("sa-solver-pece", {"predictor": 3, "corrector": 4}),
    ("euler-maruyama", {"eta": 0.5}),
    ("restart", {"repeats": 3, "length": 5, "after": 4}),
]
CHURN_ORDER = 1  # the raised levels are a first-order change of the process, whatever the solver


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


@pytest.mark.parametrize(("schedule", "grid"), EVERY)
@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
def test_weak_order_on_gaussian_data(name, options, schedule, grid):
    """Mean and variance propagated exactly through the table: their bias falls at the weak order that the plan states."""

    def bias(n):
        plan = fd.plan(name, SCHEDULES[schedule], steps=n, grid=grid, end="sigma_min", **options)
        assert plan.stochastic and plan.draws >= 1
        mean, variance = moments(plan, GAUSSIAN)
        off, wide = abs(mean - plan.end[0] * GAUSSIAN.means[0]), abs(variance - GAUSSIAN.std(*plan.end) ** 2)
        if plan.mean == "exact":
            assert off < 1e-12
            off = 0.0
        return plan.order if "s_churn" not in options else CHURN_ORDER, off + wide

    orders, found = zip(*(bias(n) for n in STEPS), strict=True)
    assert len(set(orders)) == 1 and (options or orders[0] == SOLVERS[name].order)
    assert last_slope(list(found), lambda n: bias(n)[1], orders[0]) >= orders[0] - 0.15
    assert all(fine <= 1.05 * coarse for coarse, fine in itertools.pairwise(found[1:]))


@pytest.mark.parametrize("name", ["dpm-2-ancestral", "dpmpp-2s-ancestral", "dpmpp-sde", "dpmpp-2m-sde"])
def test_without_noise_it_is_the_ode_method(name):
    plan = fd.plan(name, SCHEDULES["edm"], 9, eta=0.0)
    ode = fd.plan({"dpm-2-ancestral": "dpm-2", "dpmpp-2m-sde": "dpmpp-2m"}.get(name, "dpmpp-2s"), SCHEDULES["edm"], 9,
                  **{"lower_final": False} if name == "dpmpp-2m-sde" else {})  # fmt: skip
    assert not plan.stochastic and plan.rows == ode.rows


def test_sa_solver_without_noise_is_unipc_with_the_other_function():
    """tau = 0: the same predictor and corrector as UniPC-2 with B(h) = h, but that the corrector has one point less."""
    sa = fd.plan("sa-solver", SCHEDULES["edm"], steps=20, grid="karras", tau=0.0, predictor=2, corrector=3)
    pc = fd.plan("unipc-2", SCHEDULES["edm"], steps=20, grid="karras", variant="bh1")
    for ours, theirs in zip(sa.rows, pc.rows, strict=True):
        np.testing.assert_allclose(ours.next.values, theirs.next.values, rtol=0, atol=1e-12)
        np.testing.assert_allclose(ours.base.values, theirs.base.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, info in SOLVERS.items() if info.stochastic])
def test_the_executor_samples_the_propagated_moments(name):
    """One Monte Carlo run of the real loop with Philox noise: mean and variance within 4 standard errors of the table's."""
    schedule, n = SCHEDULES["edm"], 4096
    plan = fd.plan(name, schedule, 8, grid="karras", end="sigma_min")
    mean, variance = moments(plan, GAUSSIAN)
    noise = fd.noise.from_seeds(range(n))
    start = plan.start[0] * GAUSSIAN.means[0] + GAUSSIAN.std(*plan.start) * noise(0, (n, 1), torch.device("cpu")).double()
    out = fd.sample(GAUSSIAN.network(schedule), plan, noise, start=start, dtype=torch.float64)
    assert abs(float(out.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert abs(float(out.var()) / variance - 1) < 4 * math.sqrt(2 / n)
