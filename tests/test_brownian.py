"""One Brownian path a seed: its law, that it knows nothing of steps or batches, and what SDE solvers gain by it."""

import itertools
import math

import numpy as np
import pytest
import torch
from analytic import BIMODAL

import fastdiff as fd
from fastdiff.brownian import HIGHEST, LOWEST, Path, shared_path
from fastdiff.errors import FastdiffError

CPU = torch.device("cpu")
SCHEDULE = fd.schedule.edm(sigma_min=0.02, sigma_max=5.0)


def test_increments_are_independent_unit_normals():
    """Over steps of every size, down to a few leaves of the tree: mean, variance and correlation within 4.5 standard errors."""
    n = 20_000
    path = Path(range(n), 1, CPU)
    lams = [-math.inf, -20.0, -9.0, -3.0, -0.5, 0.0, 0.01, 0.02, 0.7, 2.0, 2.1, 6.0]
    values = [path.at(lam)[:, 0].numpy() for lam in lams]
    clocks = [math.exp(2 * lam) for lam in lams]
    pairs = zip(itertools.pairwise(values), itertools.pairwise(clocks), strict=True)
    units = [(b - a) / math.sqrt(v - u) for (a, b), (u, v) in pairs]
    bound = 4.5 / math.sqrt(n)
    for z in units:
        assert abs(z.mean()) < bound and abs(z.var() - 1) < bound * math.sqrt(2)
    correlation = np.corrcoef(units) - np.eye(len(units))
    assert np.abs(correlation).max() < bound


def test_a_value_depends_on_its_seed_and_place_alone():
    lams = [3.0, -2.0, 0.4, LOWEST, HIGHEST, -17.0]
    path = Path([7, 8, 2**63], 10, CPU)
    found = {lam: path.at(lam) for lam in lams}
    for lam in reversed(lams):
        again = Path([8], 10, CPU).at(lam)
        assert torch.equal(again[0], found[lam][1]) and torch.equal(path.at(lam), found[lam])
    assert not torch.equal(found[0.4][0], found[0.4][1])
    nearby = Path([8], 10, CPU).at(0.4 + 1e-12)
    torch.testing.assert_close(nearby[0], found[0.4][1], rtol=0, atol=1e-4)  # continuous: sqrt(1e-12) of a step
    with pytest.raises(FastdiffError, match="reaches log-SNR 16"):
        path.at(HIGHEST + 1)


def states(solver, steps, **options):
    """The states at 8 levels that all numbers of steps share, for a constant prediction; and the end."""
    nodes = np.geomspace(5.0, 0.02, steps + 1).tolist()
    plan = fd.plan(solver, SCHEDULE, steps=steps, grid=nodes, end="sigma_min", **options)
    seen = {}
    calls = iter([row.sigma for row in plan.rows[1:]] + [plan.end[1]])
    fd.sample(
        lambda x, t: torch.full_like(x, 0.3), plan, seeds=range(4), start=torch.zeros(4, 5), brownian=True, dtype=torch.float64,
        callback=lambda i, y: seen.__setitem__(round(math.log(next(calls)), 6), y.clone()),
    )  # fmt: skip
    return [seen[round(math.log(s), 6)] for s in np.geomspace(5.0, 0.02, 9)[1:]]


@pytest.mark.parametrize("solver", ["ddpm", "euler-ancestral", "dpmpp-2m-sde", "dpmpp-3m-sde", "dpmpp-2s-ancestral", "dpmpp-sde"])
def test_for_a_constant_prediction_steps_make_no_difference(solver):
    """8 and 24 steps pass through the same states, to the float32 of the unit noises; without the path they do not."""
    for a, b in zip(states(solver, 8), states(solver, 24), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=2e-6 * float(a.abs().max()))


SLOW = [pytest.param(solver, marks=pytest.mark.slow) for solver in ("sa-solver", "er-sde-2", "dpmpp-2m-sde")]


@pytest.mark.parametrize("solver", ["ddpm", *SLOW])
def test_samples_converge_as_steps_grow(solver):
    """The distance between N and 2N steps falls with N on one path, as strong order 1 has it, and does not on draws by number."""

    def end(steps, brownian):
        plan = fd.plan(solver, SCHEDULE, steps=steps, grid="uniform_lambda", end="sigma_min")
        start = 5.0 * fd.noise.normal(range(64), 0, 4).double()
        return fd.sample(BIMODAL.network(SCHEDULE), plan, seeds=range(64), start=start, brownian=brownian, dtype=torch.float64)

    def apart(n, brownian):
        return float((end(2 * n, brownian) - end(n, brownian)).square().mean().sqrt())

    coarse, fine = apart(16, True), apart(64, True)
    assert math.log(coarse / fine, 4) > 0.8
    assert fine < 0.1 * apart(64, False)


def test_only_draws_with_an_interval_come_from_the_path():
    churned = fd.plan("euler", SCHEDULE, 8, s_churn=5.0)
    den = fd.Denoiser(BIMODAL.network(SCHEDULE), SCHEDULE, "x0", shape=(3,))
    assert torch.equal(fd.sample(den, churned, seeds=[1, 2], brownian=True), fd.sample(den, churned, seeds=[1, 2]))
    ddpm = fd.plan("ddpm", SCHEDULE, 8)
    whole = fd.sample(den, ddpm, seeds=[1, 2, 3], brownian=True)
    assert torch.equal(fd.sample(den, ddpm, seeds=[2], brownian=True)[0], whole[1])
    assert not torch.equal(fd.sample(den, ddpm, seeds=[1, 2, 3]), whole)
    source = shared_path([4], ddpm)
    assert torch.equal(source(0, (1, 3), CPU), fd.noise.normal([4], 0, 3)) and source(1, (1, 3), CPU).dtype == torch.float32
    with pytest.raises(FastdiffError, match="give seeds= with brownian=True"):
        fd.sample(den, ddpm, fd.noise.from_seeds([1]), start=torch.zeros(1, 3), brownian=True)
