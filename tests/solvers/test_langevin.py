"""Langevin samplers: the papers' loops written out, the law they leave, their budgets and their mistakes."""

import math

import numpy as np
import pytest
from analytic import BIMODAL, GAUSSIAN, interpret, result

import fastdiff as fd
from fastdiff.errors import FastdiffError

SCHEDULES = {"edm": fd.schedule.edm(), "vp_cosine": fd.schedule.vp_cosine(), "flow": fd.schedule.flow()}
START = np.linspace(-2.0, 2.0, 7)


def score(x, alpha, sigma):
    return (alpha * BIMODAL.denoise(x, alpha, sigma) - x) / sigma**2


def levels(schedule, steps, grid):
    return [(n.alpha, n.sigma) for n in fd.grid.make(grid, schedule, steps).nodes]


@pytest.mark.parametrize("corrections", [1, 2])
def test_predictor_corrector_is_the_papers_loop(corrections):
    """Song et al. 2021, algorithm 2 in VE: an ancestral step, then steps of 2 (r sigma)^2 along the score."""
    schedule, r, steps = SCHEDULES["edm"], 0.1, 6
    plan = fd.plan("predictor-corrector", schedule, steps=steps, grid="karras", corrections=corrections, snr=r)
    noises = np.random.default_rng(0).standard_normal((plan.draws, len(START)))
    draws, x = iter(noises), START * plan.start[1]
    for (_, a), (_, b) in zip(*(levels(schedule, steps, "karras")[i:] for i in (0, 1)), strict=False):
        x = x + (a**2 - b**2) * score(x, 1.0, a) + (math.sqrt(b**2 * (a**2 - b**2) / a**2) * next(draws) if b else 0.0)
        for _ in range(corrections if b else 0):
            size = 2 * (r * b) ** 2
            x = x + size * score(x, 1.0, b) + math.sqrt(2 * size) * next(draws)
    assert next(draws, None) is None
    np.testing.assert_allclose(result(plan, BIMODAL.denoise, START * plan.start[1], noises), x, rtol=0, atol=1e-11)


def test_annealed_langevin_is_ncsns_loop():
    """Song and Ermon 2019, algorithm 1, and the prediction at the end."""
    schedule, epsilon, each, steps = SCHEDULES["edm"], 2e-6, 4, 5
    nodes = levels(schedule, steps, "karras")
    least = nodes[-2][1]
    plan = fd.plan("annealed-langevin", schedule, steps=steps, grid="karras", each=each, step=epsilon / least**2)
    assert plan.nfe == (steps - 1) * each + 1
    noises = np.random.default_rng(0).standard_normal((plan.draws, len(START)))
    draws, x = iter(noises), START * plan.start[1]
    for _, sigma in nodes[:-2]:
        size = epsilon * sigma**2 / least**2
        for _ in range(each):
            x = x + size / 2 * score(x, 1.0, sigma) + math.sqrt(size) * next(draws)
    expected = x + least**2 * score(x, 1.0, least)
    assert next(draws, None) is None
    np.testing.assert_allclose(result(plan, BIMODAL.denoise, START * plan.start[1], noises), expected, rtol=0, atol=1e-11)


def law(plan):
    """Mean and standard deviation of the result on Gaussian data, exactly: the denoiser is affine there."""
    (c,), (s,) = GAUSSIAN.means, GAUSSIAN.stds
    unit = np.eye(2 + plan.draws)

    def denoise(y, alpha, sigma):
        return c * unit[0] + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (y - alpha * c * unit[0])

    start = plan.start[0] * c * unit[0] + GAUSSIAN.std(*plan.start) * unit[1]
    end = interpret(plan, denoise, start, unit[2:])[-1]
    return end[0], float(np.linalg.norm(end[1:]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_corrections_bring_a_coarse_predictors_spread_closer(schedule):
    """Ten ancestral steps leave Gaussian data too narrow; corrections at every level mend it, to a limit of their own size."""
    off = []
    for corrections in (0, 8, 32):
        plan = fd.plan("predictor-corrector", SCHEDULES[schedule], steps=10, end="sigma_min", corrections=corrections)
        mean, std = law(plan)
        assert mean == pytest.approx(plan.end[0] * GAUSSIAN.means[0], abs=1e-9)
        off.append(abs(std - GAUSSIAN.std(*plan.end)))
    assert off[0] > 1.2 * off[1] > 1.2**2 * off[2]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_longer_annealing_comes_closer(schedule):
    off = []
    for each in (2, 10, 50):
        plan = fd.plan("annealed-langevin", SCHEDULES[schedule], steps=30, end="zero", each=each)
        mean, std = law(plan)
        off.append(abs(std - GAUSSIAN.stds[0]) + abs(mean - GAUSSIAN.means[0]))
    assert off[0] > 4 * off[1] > 4**2 * off[2]


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["predictor-corrector", "annealed-langevin"])
def test_the_mean_is_exact_and_the_spread_says_why_it_is_not(name, schedule, end):
    for nfe in (1, 2, 3, 5, 12, 31):
        plan = fd.plan(name, SCHEDULES[schedule], nfe, end=end)
        assert plan.nfe == nfe and plan.mean == "exact"
        assert (plan.spread == "exact") == all(row.draw != "free" for row in plan.rows)
        least = min(spread / max(row.sigma, 1e-300) for (_, spread, _), row in zip(plan.moments(), plan.rows, strict=False))
        assert least >= 1 - 1e-12  # never less noise than the level's


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("predictor-corrector", {"snr": 0.0}, "snr must lie between 0 and 1"),
        ("predictor-corrector", {"snr": math.nan}, "snr must lie between 0 and 1"),
        ("predictor-corrector", {"corrections": -1}, "corrections must be a whole number"),
        ("predictor-corrector", {"corrections": 1.5}, "corrections must be a whole number"),
        ("annealed-langevin", {"step": 1.0}, "step must lie between 0 and 1"),
        ("annealed-langevin", {"each": 0}, "each must be a whole number"),
        ("annealed-langevin", {"each": True}, "each must be a whole number"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(FastdiffError, match=message) as caught:
        fd.plan(name, SCHEDULES["edm"], 8, **options)
    assert "\n" not in str(caught.value)
