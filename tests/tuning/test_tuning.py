"""Learned plans: step 0 is the solver, mean and spread hold whatever is learned, learning helps, and a run resumes."""

import math

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.bench.cells import Setup
from fastdiff.errors import FastdiffError
from fastdiff.tuning import LearnedTable, Pairs, TuneConfig, Tuner
from fastdiff.tuning.table import expand
from fastdiff.tuning.tune import endpoint_error, paired_error

SCHEDULE = fd.schedule.vp_cosine()


class Mixture(fd.Denoiser):
    """Two narrow modes in each of 6 dimensions: a flow that bends."""

    def __init__(self):
        super().__init__(lambda x, t: x, SCHEDULE, "x0", shape=(6,))

    def __call__(self, x, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        a, s = (f(t).to(x.dtype).view(-1, 1) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
        m, v = 0.8, 0.01
        total = a**2 * v + s**2
        centre = m * torch.tanh(a * m * x / total)
        return centre + a * v / total * (x - a * centre)


def pairs(den, n, first):
    noise = fd.noise.normal(range(first, first + n), 0, 6)
    return Pairs(noise, fd.sample(den, fd.plan("dpmpp-2m", den, 400, grid="uniform_lambda"), noise=noise), Setup(n, first), den)


@pytest.fixture(scope="module")
def data():
    den = Mixture()
    return den, pairs(den, 128, 0), pairs(den, 128, 1000)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "dpmpp-3m", "unipc-3", "ipndm-4", "lms-3"])
@pytest.mark.parametrize("schedule", [SCHEDULE, fd.schedule.flow(), fd.schedule.edm()], ids=lambda s: s.name)
def test_step_zero_is_the_solver(solver, schedule):
    den = fd.Denoiser(lambda x, t: torch.tanh(1.3 * x), schedule, "x0")
    plan = fd.plan(solver, schedule, 6, grid="uniform_t")
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).view(2, 4) * plan.start[1]
    want = fd.sample(den, plan, start=x, dtype=torch.float64)
    table = LearnedTable(plan, schedule)
    torch.testing.assert_close(table(den, x).detach(), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(fd.sample(den, table.plan("t", {}), start=x, dtype=torch.float64), want, rtol=0, atol=1e-12)


def test_expand_agrees_with_the_plan():
    plan = fd.plan("unipc-3", SCHEDULE, 7)
    rng = np.random.default_rng(0)
    predictions = iter(rng.normal(size=7))
    seen = []

    def given(x, t):
        seen.append(next(predictions))
        return torch.full_like(x, seen[-1])

    x = fd.sample(given, plan, start=torch.ones(1, 1, dtype=torch.float64), dtype=torch.float64)
    assert float(x) == pytest.approx(float(expand(plan)[-1] @ np.array(seen)), abs=1e-12)  # nothing is left of x at the end


@pytest.mark.parametrize("seed", range(5))
def test_any_learned_table_keeps_mean_and_spread(seed):
    """The plan checks itself when it is made: exact mean and spread, after every parameter was moved at random."""
    table = LearnedTable(fd.plan("ipndm-3", SCHEDULE, 6), SCHEDULE)
    torch.manual_seed(seed)
    with torch.no_grad():
        table.increments += torch.randn_like(table.increments)
        table.shares += torch.randn_like(table.shares)
    plan = table.plan("random", {})
    assert plan.mean == plan.spread == "exact" and plan.nfe == 6
    assert all(b.t < a.t for a, b in zip(plan.rows, plan.rows[1:], strict=False))


def test_gradients_are_those_of_finite_differences():
    den = Mixture()
    table = LearnedTable(fd.plan("dpmpp-2m", SCHEDULE, 4, grid="uniform_t"), SCHEDULE)
    x = fd.noise.normal(range(3), 0, 6).double() * table.source.start[1]

    def value():
        return float(table(den, x).detach().square().sum())

    table(den, x).square().sum().backward()
    for parameter in (table.increments, table.shares):
        for index in ((0,), (2,)) if parameter.ndim == 1 else ((1, 0), (3, 2)):
            with torch.no_grad():
                kept = float(parameter[index])
                parameter[index] = kept + 1e-6
                up = value()
                parameter[index] = kept - 1e-6
                down = value()
                parameter[index] = kept
            assert float(parameter.grad[index]) == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-7)


def test_learning_beats_the_plan_it_started_from_on_seeds_it_never_saw(data):
    den, train, validation = data
    start = fd.plan("dpmpp-2m", den, 5, grid="uniform_lambda")
    tuner = Tuner(start, train, validation, TuneConfig(steps=150, batch=64, lr=0.03))
    plan = tuner.run()
    test = pairs(den, 256, 5000)
    assert paired_error(plan, test) < 0.6 * paired_error(start, test)
    assert tuner.best_error == pytest.approx(paired_error(plan, validation))


@pytest.mark.parametrize("freedom, moved, kept", [("nodes", "increments", "shares"), ("shares", "shares", "increments")])
def test_freedom_says_what_moves(data, freedom, moved, kept):
    den, train, validation = data
    tuner = Tuner(fd.plan("dpmpp-2m", den, 4), train, validation, TuneConfig(steps=3, freedom=freedom))
    before = {k: v.clone() for k, v in tuner.table.state_dict().items()}
    tuner.run()
    assert not torch.equal(before[moved], getattr(tuner.table, moved)) and torch.equal(before[kept], getattr(tuner.table, kept))


def test_the_same_seed_gives_the_same_plan_and_a_resume_goes_on_bit_for_bit(data, tmp_path):
    den, train, validation = data
    start, config = fd.plan("dpmpp-2m", den, 4, grid="uniform_t"), TuneConfig(steps=12, validate_every=3)
    whole = Tuner(start, train, validation, config).run()
    broken = Tuner(start, train, validation, config, tmp_path / "s.pt")

    def stop(progress):
        if progress.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.run(callback=stop)
    resumed = Tuner(start, train, validation, config, tmp_path / "s.pt")
    assert resumed.step == 6
    assert resumed.run() == whole
    with pytest.raises(FastdiffError, match="another tuning run"):
        Tuner(start, train, validation, TuneConfig(steps=13), tmp_path / "s.pt")


def test_checkpointing_changes_nothing_but_memory(data):
    den, _, _ = data
    table = LearnedTable(fd.plan("dpmpp-2m", den, 4), SCHEDULE)
    x = fd.noise.normal(range(3), 0, 6)
    grads = []
    for flag in (False, True):
        table.zero_grad()
        table(den, x, flag).square().sum().backward()
        grads.append(table.shares.grad.clone())
    assert torch.equal(*grads)


def test_the_robust_error_is_quadratic_then_linear():
    target = torch.zeros(1, 4, dtype=torch.float64)
    small, large = (float(endpoint_error(torch.full_like(target, v), target, 1.0)) for v in (0.01, 100.0))
    assert small == pytest.approx(0.01**2 / 2, rel=1e-3) and large == pytest.approx(99.0, rel=1e-2)


def test_what_cannot_be_tuned_is_refused(data):
    _, train, validation = data
    for solver in ("heun", "euler-ancestral"):
        with pytest.raises(FastdiffError, match="cannot be tuned"):
            LearnedTable(fd.plan(solver, SCHEDULE, 5), SCHEDULE)
    with pytest.raises(FastdiffError, match="freedom"):
        LearnedTable(fd.plan("ddim", SCHEDULE, 5), SCHEDULE, "all")
    plan = fd.plan("ddim", SCHEDULE, 5)
    with pytest.raises(FastdiffError, match="more pairs"):
        Tuner(plan, train, validation, TuneConfig(batch=1000))
    with pytest.raises(FastdiffError, match="share"):
        Tuner(plan, train, train, TuneConfig())

    class Frozen(Mixture):
        def __call__(self, x, t):
            return super().__call__(x, t).detach()

    frozen = Frozen()
    with pytest.raises(FastdiffError, match="no gradient"):
        Tuner(plan, Pairs(train.noise, train.target, train.setup, frozen), validation, TuneConfig())
    with pytest.raises(FastdiffError):
        TuneConfig(lr=math.nan)
