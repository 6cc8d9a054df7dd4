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
from fastdiff.errors import FastdiffError
from fastdiff.pairs import ALIASES, PAIRS, Field, find

VE = fd.schedule.ve(sigma_min=0.01, sigma_max=100.0)
FIELD = Field(VE, lambda x, lam: BIMODAL.network(VE)(x, torch.exp(-lam)))
X = torch.from_numpy(np.linspace(-3.0, 3.0, 5))[:, None]
HIGH, LOW = 1.7, 0.9  # sigma at both ends of the step


def attempt(name, x=X, high=HIGH, low=LOW):
    lam, h = (torch.full((len(x),), v, dtype=torch.float64) for v in (-math.log(high), math.log(high / low)))
    return PAIRS[name].attempt(FIELD, x, lam, h, None)


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
    np.testing.assert_allclose(tried.last[:, 0], slope, rtol=0, atol=1e-13)
    np.testing.assert_allclose(tried.first[:, 0], eps(x, HIGH), rtol=0, atol=1e-13)


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


@pytest.mark.parametrize("name", PAIRS)
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


@pytest.mark.parametrize("name", [n for n in PAIRS if n != "dpmpp-23"])  # that one: test_adaptive.py
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_error_falls_with_the_tolerance(name, schedule):
    s = SCHEDULES[schedule]
    end = (float(s.alpha(s.t_min)), float(s.sigma(s.t_min)))
    exact, found, costs = endpoint(s, BIMODAL, NOISE.numpy(), end), [], []
    for tol in (1e-1, 1e-3):
        den = Elementwise(s)
        out = fd.sample_adaptive(den, NOISE, solver=name, rtol=tol, atol=tol, max_nfe=3000, dtype=torch.float64)
        assert int(out.nfe.sum()) == den.asked and not bool(out.unfinished.any())
        outside = 1 + (float(s.alpha(s.t_max)) == 0.0)  # at the end, and away from alpha = 0
        pair = PAIRS[name]
        first, later = (pair.calls, pair.calls - 1) if name in ("bosh3", "dopri5") else (0, pair.calls)
        assert set(((out.nfe - outside - first) % later).tolist()) == {0}
        found.append(float(np.sqrt(np.mean((out.x.numpy() - exact) ** 2))))
        costs.append(float(out.nfe.double().mean()))
    assert found[0] <= 1e-1 and found[1] <= 2e-3 and found[1] < 0.2 * found[0] and costs[1] > costs[0]


@pytest.mark.parametrize("name", ["bosh3", "dpm-12"])
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


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "dpm-12"])
def test_max_nfe_is_never_passed(name):
    for limit in (PAIRS[name].calls + 2, 17):
        with pytest.warns(UserWarning, match="reached max_nfe"):
            out = fd.sample_adaptive(Elementwise(SCHEDULES["flow"]), NOISE, solver=name, rtol=1e-7, atol=1e-7, max_nfe=limit)
        assert int(out.nfe.max()) <= limit and bool(out.x.isfinite().all())
    with pytest.raises(FastdiffError, match=f"max_nfe must be at least {PAIRS[name].calls + 2}"):
        fd.sample_adaptive(Elementwise(SCHEDULES["vp"]), NOISE, solver=name, max_nfe=PAIRS[name].calls + 1)


def test_names():
    assert all(find(alias) is PAIRS[name] for alias, name in ALIASES.items())
    with pytest.raises(FastdiffError, match="unknown adaptive solver 'dopri'; did you mean dopri5"):
        fd.sample_adaptive(Elementwise(SCHEDULES["vp"]), NOISE, solver="dopri")
