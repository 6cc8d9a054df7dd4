"""Trainable tables: step 0 is the solver, mean and spread hold whatever is learned, gradients are right."""

import numpy as np
import pytest
import torch
from toy import SCHEDULE, Mixture

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.plans import expand
from fastdiff.tuning import LearnedTable, SolverNodes

DETERMINISTIC = [name for name, info in fd.list_solvers().items() if not info.stochastic]
SCHEDULES = [SCHEDULE, fd.schedule.flow(), fd.schedule.edm()]


def run_both(table, plan, schedule):
    """The endpoint of the solver's plan, of the table, and of the table's plan."""
    den = fd.Denoiser(lambda x, t: torch.tanh(1.3 * x) * (1 + 0.1 * torch.as_tensor(t).view(-1, 1)).to(x.dtype), schedule, "x0")
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).view(2, 4) * plan.start[1]
    return [
        fd.sample(den, plan, start=x, dtype=torch.float64), table(den, x).detach(),
        fd.sample(den, table.plan("t", {}), start=x, dtype=torch.float64),
    ]  # fmt: skip


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_step_zero_is_the_solver_for_every_deterministic_one(solver, schedule):
    plan = fd.plan(solver, schedule, 6, grid="uniform_t")
    for table in (LearnedTable(plan, schedule), SolverNodes(solver, schedule, 6, "uniform_t")):
        want, learned, saved = run_both(table, plan, schedule)
        torch.testing.assert_close(learned, want, rtol=0, atol=1e-9)
        torch.testing.assert_close(saved, want, rtol=0, atol=1e-9)


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


def moved(table, seed, size=1.0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in table.parameters():
            parameter += size * torch.randn_like(parameter)
    return table


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("solver", ["ipndm-3", "heun", "dpmpp-3s"])
def test_any_learned_table_keeps_mean_and_spread(solver, seed):
    """The plan checks itself when it is made: exact mean and spread, after every parameter was moved at random."""
    plan = moved(LearnedTable(fd.plan(solver, SCHEDULE, 6), SCHEDULE), seed).plan("random", {})
    assert plan.mean == plan.spread == "exact" and plan.nfe == 6
    assert all(b.sigma <= a.sigma for a, b in zip(plan.rows, plan.rows[1:], strict=False))
    assert all(SCHEDULE.t_min <= row.t <= SCHEDULE.t_max for row in plan.rows)


def test_a_learned_plan_can_be_learned_on():
    first = moved(LearnedTable(fd.plan("unipc-2", SCHEDULE, 5, grid="uniform_t"), SCHEDULE), 0, 0.1).plan("once", {})
    want, learned, saved = run_both(LearnedTable(first, SCHEDULE), first, SCHEDULE)
    torch.testing.assert_close(learned, want, rtol=0, atol=1e-7)  # times come back from log-SNRs
    torch.testing.assert_close(saved, want, rtol=0, atol=1e-7)


def check_gradients(table, x, indices):
    den = Mixture()

    def value():
        return float(table(den, x).detach().square().sum())

    table(den, x).square().sum().backward()
    for parameter, index in indices:
        with torch.no_grad():
            kept = float(parameter[index])
            parameter[index] = kept + 1e-6
            up = value()
            parameter[index] = kept - 1e-6
            down = value()
            parameter[index] = kept
        assert float(parameter.grad[index]) == pytest.approx((up - down) / 2e-6, rel=1e-3, abs=1e-6)


def test_gradients_of_a_learned_table_are_those_of_finite_differences():
    table = LearnedTable(fd.plan("dpmpp-2m", SCHEDULE, 4, grid="uniform_t"), SCHEDULE)
    with torch.no_grad():
        table.told += torch.tensor([0.0, 0.1, -0.1, 0.05])
    x = fd.noise.normal(range(3), 0, 6).double() * table.plan("t", {}).start[1]
    nodes, weights, told = table.times.increments, table.corrections, table.told
    check_gradients(table, x, [(nodes, 0), (nodes, 2), (weights, (1, 0)), (weights, (3, 2)), (told, 1), (told, 3)])


def test_gradients_pass_through_a_denoiser_to_the_times():
    """The network's own preconditioning depends on the time too: c_noise, c_skip and c_out, here of a v prediction."""
    den = fd.Denoiser(lambda x, t: torch.tanh(x) * (1 + t.view(-1, 1)), SCHEDULE, "v")
    table = LearnedTable(fd.plan("dpmpp-2m", SCHEDULE, 4, grid="uniform_t"), SCHEDULE)
    x = fd.noise.normal(range(3), 0, 6).double() * table.plan("t", {}).start[1]
    table(den, x).square().sum().backward()
    for parameter, k in ((table.times.increments, 1), (table.told, 2)):
        values = []
        for step in (1e-3, -1e-3):  # c_noise is float32: smaller steps drown in its rounding
            with torch.no_grad():
                parameter[k] += step
                values.append(float(table(den, x).square().sum()))
                parameter[k] -= step
        assert float(parameter.grad[k]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.01)


@pytest.mark.parametrize("solver", ["ipndm-3", "unipc-2", "dpmpp-3s", "heun"])
def test_gradients_of_a_solvers_nodes_are_those_of_finite_differences(solver):
    table = SolverNodes(solver, SCHEDULE, 6, "uniform_t")
    x = fd.noise.normal(range(3), 0, 6).double() * table.plan("t", {}).start[1]
    last = len(table.times.increments) - 1
    check_gradients(table, x, [(table.times.increments, k) for k in (0, 1, last)])


def test_coefficients_leave_what_is_older_than_the_solver_reads():
    plan = fd.plan("dpmpp-2m", SCHEDULE, 5, grid="uniform_t")
    table = moved(LearnedTable(plan, SCHEDULE, "coefficients"), 0, 0.1)
    gains = LearnedTable(plan, SCHEDULE)
    with torch.no_grad():
        now, before = table.numbers(), gains.numbers()
    start = now.alpha[0] / now.sigma[0]
    shares = now.weights / (now.alpha - start * now.sigma)[1:, None]
    old = before.weights / (before.alpha - start * before.sigma)[1:, None]
    for i in range(5):
        for j in range(i - 1):
            assert float(shares[i, j]) == pytest.approx(float(old[i, j]), abs=1e-12)
    assert float((shares - old).abs().max()) > 0.01


def test_checkpointing_changes_nothing_but_memory():
    table, x = LearnedTable(fd.plan("dpmpp-2m", SCHEDULE, 4), SCHEDULE), fd.noise.normal(range(3), 0, 6)
    grads = []
    for flag in (False, True):
        table.zero_grad()
        table(Mixture(), x, flag).square().sum().backward()
        grads.append(table.corrections.grad.clone())
    assert torch.equal(*grads)


def test_what_cannot_be_tuned_is_refused():
    for solver in ("euler-ancestral", "ddpm"):
        with pytest.raises(FastdiffError, match="cannot be tuned"):
            LearnedTable(fd.plan(solver, SCHEDULE, 5), SCHEDULE)
        with pytest.raises(FastdiffError, match="cannot be tuned"):
            SolverNodes(solver, SCHEDULE, 5)
    with pytest.raises(FastdiffError, match="clean data"):
        LearnedTable(fd.plan("ddim", SCHEDULE, 5, end="sigma_min"), SCHEDULE)
