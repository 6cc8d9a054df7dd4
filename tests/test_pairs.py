"""Embedded pairs: one step against scipy and against k-diffusion's formulas, their orders, and whole runs, sample by sample."""

import math

import numpy as np
import pytest
import torch
from analytic import BIMODAL, GAUSSIAN
from scipy.integrate import RK23, RK45
from scipy.integrate._ivp.rk import rk_step
from test_adaptive import NOISE, SCHEDULES, Elementwise, endpoint

import fastdiff as fd
from fastdiff.coeffs import exponential_integrals
from fastdiff.errors import FastdiffError
from fastdiff.pairs import ALIASES, DEFAULT, PAIRS, Field, Multistep, adams, find

VE = fd.schedule.ve(sigma_min=0.01, sigma_max=100.0)
FIELD = Field(VE, lambda x, lam: BIMODAL.network(VE)(x, torch.exp(-lam)))
X = torch.from_numpy(np.linspace(-3.0, 3.0, 5))[:, None]
HIGH, LOW = 1.7, 0.9  # sigma at both ends of the step


def attempt(name, x=X, high=HIGH, low=LOW):
    lam, h = (torch.full((len(x),), v, dtype=torch.float64) for v in (-math.log(high), math.log(high / low)))
    return PAIRS[name].attempt(FIELD, x, lam, h, ())


def eps(x, sigma):
    return (x - BIMODAL.denoise(x, 1.0, sigma)) / sigma


@pytest.mark.parametrize(("name", "method"), [("bosh3", RK23), ("dopri5", RK45)])
def test_classical_pairs_are_scipys(name, method):
    """The same step of dx/dsigma = eps by scipy's own stages and its own error weights."""
    x, stages = X[:, 0].numpy(), np.empty((method.n_stages + 1, len(X)))
    new, slope = rk_step(lambda s, y: eps(y, s), HIGH, x, eps(x, HIGH), LOW - HIGH, method.A, method.B, method.C, stages)
    tried = attempt(name)
    np.testing.assert_allclose(tried.high[:, 0], new, rtol=0, atol=1e-13)
    np.testing.assert_allclose(tried.high[:, 0] - tried.low[:, 0], -(LOW - HIGH) * stages.T @ method.E, rtol=0, atol=1e-13)
    (last,), (first,) = tried.taken, tried.refused
    np.testing.assert_allclose(last[:, 0], slope, rtol=0, atol=1e-13)
    np.testing.assert_allclose(first[:, 0], eps(x, HIGH), rtol=0, atol=1e-13)


def test_dpm_pairs_are_k_diffusions():
    """DPMSolver.dpm_solver_{1,2,3}_step of k-diffusion 0.1.1, in t = -log sigma, written out."""
    t, h = -math.log(HIGH), math.log(HIGH / LOW)
    x, end = X[:, 0].numpy(), LOW
    e = eps(x, HIGH)

    def inner(r):
        return math.exp(-(t + r * h))

    one = x - end * math.expm1(h) * e
    half = eps(x - inner(1 / 2) * math.expm1(h / 2) * e, inner(1 / 2))
    two = x - end * math.expm1(h) * e - end / (2 * (1 / 2)) * math.expm1(h) * (half - e)
    r1, r2 = 1 / 3, 2 / 3
    e1 = eps(x - inner(r1) * math.expm1(r1 * h) * e, inner(r1))
    two_r1 = x - end * math.expm1(h) * e - end / (2 * r1) * math.expm1(h) * (e1 - e)
    u2 = x - inner(r2) * math.expm1(r2 * h) * e - inner(r2) * (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1) * (e1 - e)
    three = x - end * math.expm1(h) * e - end / r2 * (math.expm1(h) / h - 1) * (eps(u2, inner(r2)) - e)
    for name, high, low in (("dpm-12", two, one), ("dpm-23", three, two_r1)):
        tried = attempt(name)
        np.testing.assert_allclose(tried.high[:, 0], high, rtol=0, atol=1e-13)
        np.testing.assert_allclose(tried.low[:, 0], low, rtol=0, atol=1e-13)


ONE_STEP = [name for name, pair in PAIRS.items() if not isinstance(pair, Multistep)]


@pytest.mark.parametrize("name", ONE_STEP)
def test_both_results_have_their_order(name):
    """One step of half the length: the error falls by 2^(order + 1), order p and p - 1."""
    exact = {h: BIMODAL.flow(X[:, 0].numpy(), (1.0, 1.0), (1.0, math.exp(-h))) for h in (0.2, 0.1)}
    off = {}
    for h, wanted in exact.items():
        tried = attempt(name, X, 1.0, math.exp(-h))
        off[h] = [float(np.abs(r[:, 0].numpy() - wanted).max()) for r in (tried.high, tried.low)]
    order = PAIRS[name].order
    for (coarse, fine), p in zip(zip(off[0.2], off[0.1], strict=True), (order, order - 1), strict=True):
        assert p + 0.6 < math.log2(coarse / fine) < p + 2.2
    assert off[0.1][0] < off[0.1][1]


@pytest.mark.parametrize("name", [n for n in PAIRS if n != DEFAULT])  # that one: test_adaptive.py
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_error_falls_with_the_tolerance(name, schedule):
    s = SCHEDULES[schedule]
    end = (float(s.alpha(s.t_min)), float(s.sigma(s.t_min)))
    exact, found, costs = endpoint(s, BIMODAL, NOISE.numpy(), end), [], []
    for tol in (1e-1, 1e-3):
        den = Elementwise(s)
        out = fd.sample_adaptive(den, NOISE, solver=name, rtol=tol, atol=tol, max_nfe=3000, dtype=torch.float64)
        assert int(out.nfe.sum()) == den.asked and not bool(out.unfinished.any())
        pair = PAIRS[name]
        away = float(s.alpha(s.t_max)) == 0.0  # from alpha = 0
        last = not isinstance(pair, Multistep)  # those have evaluated the end when they get there
        attempts = out.accepted + out.rejected
        assert torch.equal(out.nfe, pair.calls - pair.later + pair.later * attempts + away + last)
        found.append(float(np.sqrt(np.mean((out.x.numpy() - exact) ** 2))))
        costs.append(float(out.nfe.double().mean()))
    assert found[0] <= 1e-1 and found[1] <= 2e-3 and found[1] < 0.2 * found[0] and costs[1] > costs[0]


@pytest.mark.parametrize("name", ["bosh3", "dpm-12", "unipc-3"])
def test_every_sample_has_its_own_steps_and_its_own_bits(name):
    s = SCHEDULES["vp"]
    noise = NOISE * torch.tensor([0.0, 0.1, 1.0, 3.0, 8.0], dtype=torch.float64)[:, None]
    together = fd.sample_adaptive(Elementwise(s), noise, solver=name, dtype=torch.float64)
    assert len(set(together.nfe.tolist())) > 1
    for i in (0, 2, 4):
        alone = fd.sample_adaptive(Elementwise(s), noise[i : i + 1], solver=name, dtype=torch.float64)
        assert torch.equal(alone.x[0], together.x[i]) and int(alone.nfe[0]) == int(together.nfe[i])


def test_float32_and_a_tight_tolerance_on_gaussian_data():
    """Dormand-Prince at 1e-8 in float64 is exact to 1e-7; at its defaults in float32 it stays within its tolerance."""
    s = fd.schedule.vp_cosine(logsnr_min=-4.0, logsnr_max=8.0)
    end = (float(s.alpha(s.t_min)), float(s.sigma(s.t_min)))
    exact = endpoint(s, GAUSSIAN, NOISE.numpy(), end)
    tight = fd.sample_adaptive(
        Elementwise(s, GAUSSIAN), NOISE, solver="dopri5", rtol=1e-8, atol=1e-8, max_nfe=5000, dtype=torch.float64
    )
    np.testing.assert_allclose(tight.x.numpy(), exact, rtol=0, atol=1e-7)
    loose = fd.sample_adaptive(Elementwise(s, GAUSSIAN), NOISE.float(), solver="dopri5")
    np.testing.assert_allclose(loose.x.numpy(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "dpm-12", "unipc-2"])
def test_max_nfe_is_never_passed(name):
    least = 1 + PAIRS[name].calls + PAIRS[name].last  # "flow" begins at alpha = 0
    for limit in (least, 17):
        with pytest.warns(UserWarning, match="reached max_nfe"):
            out = fd.sample_adaptive(Elementwise(SCHEDULES["flow"]), NOISE, solver=name, rtol=1e-7, atol=1e-7, max_nfe=limit)
        assert int(out.nfe.max()) <= limit and bool(out.x.isfinite().all())
    with pytest.raises(FastdiffError, match=f"max_nfe must be at least {least}"):
        fd.sample_adaptive(Elementwise(SCHEDULES["vp"]), NOISE, solver=name, max_nfe=least - 1)


def test_adams_weights_are_the_exponential_integrals():
    """Each sample's own nodes and step, through one to four of them; what lies beyond the count has no weight."""
    rng = np.random.default_rng(1)
    nodes = torch.from_numpy(-np.cumsum(rng.uniform(0.05, 2.0, (40, 4)), axis=1) + rng.uniform(0, 3, (40, 1)))
    h, count = torch.from_numpy(rng.uniform(1e-4, 11.0, 40)), torch.arange(40) % 4 + 1
    got = adams(nodes, h, count)
    for i, (length, n) in enumerate(zip(h.tolist(), count.tolist(), strict=True)):
        want = exponential_integrals(nodes[i, :n].tolist(), 0.0, length)
        np.testing.assert_allclose(got[i, :n], want, rtol=1e-11, atol=1e-13)
        assert not bool(got[i, n:].any())


@pytest.mark.parametrize("p", [2, 3])
def test_multistep_pairs_are_unipc_written_out(p):
    """Six uneven steps of two samples with steps of their own against one scalar loop each, predictor and corrector; the second
    sample refuses its third step, which leaves it as it was."""
    pair, lengths = Multistep(p), torch.tensor([[0.3, 0.5, 0.2, 0.7, 0.4, 0.6], [0.2, 0.1, 0.9, 0.3, 0.5, 0.2]]).double()
    x, lam, memory = X[[0, 3]], torch.full((2,), -math.log(HIGH), dtype=torch.float64), ()
    take = torch.ones(6, 2, dtype=torch.bool)
    take[2, 1] = False
    found = []
    for i in range(6):
        tried = pair.attempt(FIELD, x, lam, lengths[:, i], memory)
        found.append((tried.low, tried.high))
        memory = tuple(torch.where(take[i].view(-1, *(1,) * (a.ndim - 1)), a, b)
                       for a, b in zip(tried.taken, tried.refused, strict=True))  # fmt: skip
        x, lam = torch.where(take[i][:, None], tried.high, x), torch.where(take[i], lam + lengths[:, i], lam)
    for k in range(2):
        y, at = float(X[[0, 3]][k]), -math.log(HIGH)
        past = [(at, BIMODAL.denoise(np.array([y]), 1.0, HIGH)[0])]
        for i in range(6):
            end, s0, s1 = at + float(lengths[k, i]), math.exp(-at), math.exp(-at - float(lengths[k, i]))

            def step(points, end=end, at=at, y=y, ratio=s1 / s0):
                weights = exponential_integrals([t for t, _ in points], at, end)
                return y * ratio + sum(w * d for w, (_, d) in zip(weights, points, strict=True))

            low = step(past[:p])
            new = (end, BIMODAL.denoise(np.array([low]), 1.0, s1)[0])
            high = step([new, *past[:p]])
            np.testing.assert_allclose([float(r[k]) for r in found[i]], [low, high], rtol=0, atol=1e-12)
            if take[i, k]:
                past, y, at = [new, *past], high, end


@pytest.mark.parametrize("p", [2, 3])
def test_multistep_pairs_have_their_order(p):
    """The last step's estimate falls as h^(p + 1); the whole run, which begins with one prediction, as h^3 at least."""
    estimates, errors = [], []
    for steps in (40, 80):
        pair, memory, x = Multistep(p), (), X
        lam, h = torch.zeros(len(X), dtype=torch.float64), torch.full((len(X),), 2.0 / steps, dtype=torch.float64)
        for _ in range(steps):
            tried = pair.attempt(FIELD, x, lam, h, memory)
            x, lam, memory = tried.high, lam + h, tried.taken
        estimates.append(float((tried.high - tried.low).abs().max()))
        errors.append(float(np.abs(x[:, 0].numpy() - BIMODAL.flow(X[:, 0].numpy(), (1.0, 1.0), (1.0, math.exp(-2.0)))).max()))
    assert math.log2(estimates[0] / estimates[1]) > p + 0.7
    assert math.log2(errors[0] / errors[1]) > 2.7


def test_names():
    assert all(find(alias) is PAIRS[name] for alias, name in ALIASES.items())
    with pytest.raises(FastdiffError, match="unknown adaptive solver 'dopri'; did you mean dopri5"):
        fd.sample_adaptive(Elementwise(SCHEDULES["vp"]), NOISE, solver="dopri")
