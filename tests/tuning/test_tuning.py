"""Tuning: learning helps on seeds it never saw, a run resumes bit for bit, and what cannot work is refused."""

import math

import pytest
import torch
from toy import SCHEDULE, Frozen, Mixture, pairs

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.tuning import LearnedTable, NodeSearch, Score, SearchConfig, SolverNodes, TuneConfig, Tuner, rmse_of
from fastdiff.tuning.features import Distribution
from fastdiff.tuning.search import FINALISTS, candidates, cost, halving
from fastdiff.tuning.targets import endpoints
from fastdiff.tuning.tune import endpoint_error, relaxed


@pytest.fixture(scope="module")
def data():
    den = Mixture()
    return den, pairs(den, 128, 0), pairs(den, 128, 1000), pairs(den, 256, 5000)


def table(nfe=4, grid="uniform_t", freedom="full"):
    return LearnedTable(fd.plan("dpmpp-2m", SCHEDULE, nfe, grid=grid), SCHEDULE, freedom)


@pytest.mark.parametrize("freedom, bar", [("coefficients", 0.7), ("full", 0.6)])
def test_learning_beats_the_plan_it_started_from_on_seeds_it_never_saw(data, freedom, bar):
    _, train, validation, test = data
    tuner = Tuner(table(5, "uniform_lambda", freedom), [train], [validation], TuneConfig(steps=150, batch=64, lr=0.03))
    plan = tuner.run()
    assert rmse_of(plan, [test]) < bar * rmse_of(tuner.source, [test])
    assert tuner.best_score.rmse == pytest.approx(rmse_of(plan, [validation]), rel=1e-5)


@pytest.mark.parametrize("solver", ["dpmpp-2m", "dpmpp-2s"])
def test_nodes_alone_help_with_and_without_gradients(data, solver):
    den, train, validation, test = data
    start = rmse_of(fd.plan(solver, den, 6, grid="uniform_lambda"), [test])
    tuner = Tuner(SolverNodes(solver, SCHEDULE, 6, "uniform_lambda"), [train], [validation], TuneConfig(steps=40, batch=64))
    assert rmse_of(tuner.run(), [test]) < 0.8 * start
    frozen = Frozen()
    parts = [[pairs(frozen, n, first)] for n, first in ((64, 0), (64, 1000))]
    search = NodeSearch(SolverNodes(solver, SCHEDULE, 6, "uniform_lambda"), *parts, SearchConfig(60, 64))
    assert rmse_of(search.run(), [test]) < 0.8 * start


def test_one_plan_may_hold_for_two_kinds_of_pairs(data):
    """Two denoisers stand for two guidance scales: the plan that saw both is better on both than where it began."""
    _, train, validation, _ = data

    class Wide(Mixture):
        def __call__(self, x, t):
            return 0.9 * super().__call__(x, t)

    wide = Wide()
    parts, held = [train, pairs(wide, 128, 0)], [validation, pairs(wide, 64, 1000)]
    tuner = Tuner(table(5), parts, held, TuneConfig(steps=60, batch=64))
    plan = tuner.run()
    assert all(rmse_of(plan, [p]) < rmse_of(tuner.source, [p]) for p in held)


def test_the_relaxed_target_moves_starts_inside_a_ball(data):
    _, train, validation, _ = data
    tuner = Tuner(table(), [train], [validation], TuneConfig(steps=8, relax=0.05))
    tuner.run()
    norms = tuner.moved[0].flatten(1).norm(dim=1)
    assert 0 < float(norms.max()) <= 0.05 * math.sqrt(6) * (1 + 1e-6)
    out = relaxed(torch.zeros(2, 3), torch.tensor([[1.0, 0, 0], [0, 0, 0]]), 0.1)
    assert float(out[0, 0]) < 0 and not out[1].any()


def test_the_same_seed_gives_the_same_plan_and_a_resume_goes_on_bit_for_bit(data, tmp_path):
    _, train, validation, _ = data
    config = TuneConfig(steps=12, validate_every=3, relax=0.05, distribution=0.1)
    whole = Tuner(table(), [train], [validation], config).run()
    broken = Tuner(table(), [train], [validation], config, tmp_path / "s.pt")

    def stop(progress):
        if progress.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.run(callback=stop)
    resumed = Tuner(table(), [train], [validation], config, tmp_path / "s.pt")
    assert resumed.step == 6
    assert resumed.run() == whole
    with pytest.raises(FastdiffError, match="another tuning run"):
        Tuner(table(), [train], [validation], TuneConfig(steps=13), tmp_path / "s.pt")


def test_a_search_resumes_where_it_was_stopped(data, tmp_path):
    _, train, validation, _ = data
    asked = []

    def make(state):
        search = NodeSearch(SolverNodes("dpmpp-2m", SCHEDULE, 4, "uniform_t"), [train], [validation], SearchConfig(20, 64), state)
        own = search._loss
        search._loss = lambda *given: asked.append(1) or own(*given)
        return search

    whole = make(None).run()
    needed = len(asked)

    def stop(progress):
        if progress.step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "s.json").run(callback=stop)
    asked.clear()
    assert make(tmp_path / "s.json").run() == whole
    assert len(asked) == needed - 9
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(FastdiffError, match="not the state"):
        make(tmp_path / "s.json")


def test_the_robust_error_is_quadratic_then_linear():
    target = torch.zeros(1, 4, dtype=torch.float64)
    small, large = (float(endpoint_error(torch.full_like(target, v), target, 1.0)) for v in (0.01, 100.0))
    assert small == pytest.approx(0.01**2 / 2, rel=1e-3) and large == pytest.approx(99.0, rel=1e-2)


def test_blur_costs_more_in_distribution_than_it_saves_in_error():
    """Averages of two modes halve the squared error of samples that chose the wrong one, and are far from both."""
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(2, 1, 16, 16, generator=generator)
    right = torch.randint(0, 2, (64,), generator=generator)
    target, wrong, blurred = modes[right], modes[right.flip(0)], modes.mean(0, keepdim=True).expand(64, 1, 16, 16)
    assert (blurred - target).square().mean() < (wrong - target).square().mean()
    distribution = Distribution(target)
    chosen, averaged = (float(distribution.squared(x, target)) for x in (wrong, blurred))
    assert averaged > 10 * max(chosen, 1e-3)
    assert float(distribution.squared(target, target)) < 1e-6
    start = Score(1.0, 1.0, 1.0)
    assert Score(0.9, 0.9, 2.0).against(start) > 1 > Score(0.9, 0.9, 0.9).against(start)


def test_halving_finds_the_best_of_the_registry(data):
    _, _, validation, _ = data
    plans = candidates(SCHEDULE, 5)
    assert len({p.name for p in plans}) == len(plans) > 50 and all(p.nfe == 5 for p in plans)
    done = []
    ranked = halving(plans, validation, done.append)
    errors = sorted(rmse_of(p, [validation]) for p in plans)
    assert len(ranked) == FINALISTS and ranked[0].rmse == pytest.approx(errors[0], rel=1e-5)
    assert [r.rmse for r in ranked] == sorted(r.rmse for r in ranked)
    assert all(r.low <= r.rmse <= r.high for r in ranked)
    assert sum(done) <= cost(plans, validation.setup.n) < 0.5 * 5 * validation.setup.n * len(plans)
    assert endpoints(plans[0], validation, range(3, 7)).shape == (4, 6)


def test_what_cannot_be_tuned_is_refused(data):
    _, train, validation, _ = data
    with pytest.raises(FastdiffError, match="more pairs"):
        Tuner(table(), [train], [validation], TuneConfig(batch=1000))
    with pytest.raises(FastdiffError, match="share"):
        Tuner(table(), [train], [train], TuneConfig())
    elsewhere = LearnedTable(fd.plan("ddim", fd.schedule.flow(), 4), fd.schedule.flow())
    with pytest.raises(FastdiffError, match="targets are from schedule"):
        Tuner(elsewhere, [train], [validation], TuneConfig())
    with pytest.raises(FastdiffError, match="more pairs"):
        NodeSearch(SolverNodes("ddim", SCHEDULE, 4), [train], [validation], SearchConfig(batch=1000))
    with pytest.raises(FastdiffError, match="no gradient"):
        Tuner(table(), [pairs(Frozen(), 32, 0)], [validation], TuneConfig())
    for bad in ({"lr": math.nan}, {"batch": 1}, {"relax": -1.0}):
        with pytest.raises(FastdiffError):
            TuneConfig(**bad)
    with pytest.raises(FastdiffError):
        SearchConfig(0)
