"""Schedules and grids against diffusers' own tables, made by the installed library: betas, alphas_cumprod, sigmas, shifts.

Its tables are float32. What differs on purpose is listed in fastdiff/solvers/PEERS.md.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from scipy.stats import beta as beta_law

import fastdiff as fd


def discrete(scheduler):
    return fd.schedule.vp_from_alphas_cumprod(scheduler.alphas_cumprod.double())


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_a_models_own_table_is_kept_to_the_bit(name):
    table = DDPMScheduler(beta_schedule=name).alphas_cumprod.double()
    schedule = fd.schedule.vp_from_alphas_cumprod(table)
    t = np.arange(1000.0)
    np.testing.assert_allclose(schedule.alpha(t) ** 2, table.numpy(), rtol=1e-15)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, 1 - table.numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_continuous_schedules_are_the_limit_of_the_tables(name):
    """t = (i + 1)/T: the product of 1 - beta is the exponential of an integral to O(1/T); with ten times the entries ten times
    closer."""
    ours = {"linear": fd.schedule.vp_linear, "scaled_linear": fd.schedule.vp_scaled_linear}[name]()
    low, high = (0.0001, 0.02) if name == "linear" else (0.00085, 0.012)
    off = []
    for count in (1000, 10_000):
        made = DDPMScheduler(count, low * 1000 / count, high * 1000 / count, name).alphas_cumprod.double().numpy()
        t = (np.arange(count) + 1) / count
        off.append(np.abs(2 * np.log(ours.alpha(t)) - np.log(made)).max())
    assert off[0] < 0.1 and off[1] < 0.15 * off[0]


def test_the_cosine_schedule_is_the_capped_table_where_neither_is_cut():
    made = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double().numpy()[20:980]
    ours = fd.schedule.vp_cosine()
    np.testing.assert_allclose(ours.alpha((np.arange(20, 980) + 1) / 1000) ** 2, made, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_terminal_snr(name):
    """rescale_betas_zero_snr, which goes through float32 betas and products: 1e-5 of alpha^2, and exactly 0 at the end."""
    made = DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=True).alphas_cumprod.double().numpy()
    ours = discrete(DDIMScheduler(beta_schedule=name)).zero_terminal_snr()
    np.testing.assert_allclose(ours.alpha(np.arange(1000.0)) ** 2, made, rtol=0, atol=1e-5)
    assert float(ours.alpha(999.0)) == 0.0 == made[-1]


@pytest.mark.parametrize("n", [2, 5, 10, 33])
@pytest.mark.parametrize(
    ("flag", "grid"), [("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential"), ("lu", "uniform_lambda")]
)
def test_sigma_grids(flag, grid, n):
    """Euler's Karras and exponential sigmas, DPM-Solver's uniform lambda; times by log-linear interpolation in both."""
    flags = {"use_lu_lambdas": True, "timestep_spacing": "linspace"} if flag == "lu" else {flag: True}
    scheduler = (DPMSolverMultistepScheduler if flag == "lu" else EulerDiscreteScheduler)(**flags)
    scheduler.set_timesteps(n)
    nodes = fd.grid.make(grid, discrete(scheduler), n).nodes
    sigmas = scheduler.sigmas.double().numpy()
    assert sigmas[-1] == nodes[-1].sigma == 0.0
    np.testing.assert_allclose([node.u for node in nodes[:-1]], sigmas[:-1], rtol=2e-5)
    # DPM-Solver rounds its times to whole numbers
    np.testing.assert_allclose([node.t for node in nodes[:-1]], scheduler.timesteps, rtol=0, atol=0.501 if flag == "lu" else 2e-2)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_its_beta_grid_is_in_sigma_and_ours_in_time(n):
    scheduler = EulerDiscreteScheduler(use_beta_sigmas=True)
    scheduler.set_timesteps(n)
    schedule = discrete(scheduler)
    quantiles = beta_law.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6)
    high, low = (float(schedule.sigma(t) / schedule.alpha(t)) for t in (999.0, 0.0))
    np.testing.assert_allclose(scheduler.sigmas[:-1], low + quantiles * (high - low), rtol=1e-4)
    ours = [node.t for node in fd.grid.make("beta", schedule, n).nodes[:-1]]
    np.testing.assert_allclose(ours, quantiles * 999, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("n", [2, 4, 7, 20, 50])  # a single step is from full noise whatever the spacing; its leading one is not
def test_spacings_have_eulers_sigmas(spacing, n):
    scheduler = EulerDiscreteScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    nodes = fd.grid.make("uniform_t", discrete(scheduler), n, spacing=spacing).nodes
    assert [node.t for node in nodes[:-1]] == scheduler.timesteps.tolist()
    np.testing.assert_allclose([node.u for node in nodes], scheduler.sigmas, rtol=2e-5)


@pytest.mark.parametrize("n", [1, 4, 10, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_static_flow_shift(n, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=(1 - np.arange(n) / n).tolist())
    nodes = fd.grid.make("uniform_t", fd.schedule.flow(shift=shift), n).nodes
    np.testing.assert_allclose([node.sigma for node in nodes], scheduler.sigmas, rtol=0, atol=1e-6)
    np.testing.assert_allclose([1000 * node.t for node in nodes[:-1]], scheduler.timesteps, rtol=0, atol=1e-3)


@pytest.mark.parametrize("n", [1, 4, 10, 28])
@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (4096, 1.15)])
def test_resolution_dependent_flow_shift(n, tokens, mu):
    """FLUX: mu linear in the tokens, 0.5 at 256 and 1.15 at 4096; the scheduler's own exponential shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    scheduler.set_timesteps(sigmas=(1 - np.arange(n) / n).tolist(), mu=mu)
    nodes = fd.grid.make("flow_shift", fd.schedule.flow(), n, num_tokens=tokens).nodes
    np.testing.assert_allclose([node.sigma for node in nodes], scheduler.sigmas, rtol=0, atol=1e-6)


def test_without_given_sigmas_it_shifts_the_least_one_twice():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    ours = [node.sigma for node in fd.grid.make("uniform_t", fd.schedule.flow(shift=3.0), 10).nodes]
    assert scheduler.sigmas[0] == 1.0 and float(scheduler.sigmas[-2]) == pytest.approx(0.0089286, abs=1e-6)
    assert ours[-2] == pytest.approx(3 * 0.1 / (1 + 2 * 0.1), abs=1e-12)
    assert torch.is_tensor(scheduler.sigmas)
