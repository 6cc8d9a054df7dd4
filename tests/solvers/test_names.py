"""Names of other libraries: each means the solver, grid and options that it means there."""

import pytest

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.solvers.names import GRID_SUFFIXES, PRESETS, resolve

SCHEDULE = fd.schedule.vp_cosine()


@pytest.mark.parametrize(
    ("name", "solver", "options", "grid", "grid_options"),
    [
        ("dpmpp_2m_karras", "dpmpp-2m", {}, "karras", {}),
        ("DPM++ 2M Karras", "dpmpp-2m", {}, "karras", {}),
        ("DPM++ 2M", "dpmpp-2m", {}, None, {}),
        ("DPM++ SDE Karras", "dpmpp-sde", {}, "karras", {}),
        ("DPM++ 2M SDE Exponential", "dpmpp-2m-sde", {}, "exponential", {}),
        ("DPM++ 2M SDE Heun Karras", "dpmpp-2m-sde", {"second": "exact"}, "karras", {}),
        ("DPM++ 3M SDE", "dpmpp-3m-sde", {}, None, {}),
        ("DPM++ 2S a Karras", "dpmpp-2s-ancestral", {}, "karras", {}),
        ("DPM2", "dpm-2", {}, None, {}),
        ("DPM2 a Karras", "dpm-2-ancestral", {}, "karras", {}),
        ("DPM fast", "dpm-fast", {}, None, {}),
        ("LMS Karras", "lms-4", {}, "karras", {}),
        ("Euler a", "euler-ancestral", {}, None, {}),
        ("euler_a", "euler-ancestral", {}, None, {}),
        ("euler_ancestral_sgm_uniform", "euler-ancestral", {}, "sgm_uniform", {}),
        ("Heun", "heun", {}, None, {}),
        ("PLMS", "plms", {}, None, {}),
        ("Restart", "restart", {}, None, {}),
        ("UniPC", "unipc-2", {}, None, {}),
        ("uni_pc", "unipc-3", {"variant": "bh1"}, None, {}),
        ("uni_pc_bh2", "unipc-3", {}, None, {}),
        ("ddim", "ddim", {}, None, {}),
        ("ddim_ddim_uniform", "ddim", {}, "uniform_t", {"spacing": "leading"}),
        ("res_multistep_beta", "res-2m", {}, "beta", {}),
        ("er_sde_simple", "er-sde-3", {}, "simple", {}),
        ("sa_solver_pece", "sa-solver-pece", {}, None, {}),
        ("gradient_estimation_linear_quadratic", "gradient-estimation", {}, "linear_quadratic", {}),
        ("deis_normal", "deis-log-rho-3", {}, "uniform_t", {"spacing": "linspace"}),
        ("lcm_kl_optimal", "lcm", {}, "kl_optimal", {}),
        ("DPMSolverMultistepScheduler", "dpmpp-2m", {}, None, {}),
        ("EulerAncestralDiscreteScheduler", "euler-ancestral", {}, None, {}),
        ("EDMDPMSolverMultistepScheduler", "dpmpp-2m", {}, "karras", {}),
        ("KDPM2AncestralDiscreteScheduler", "dpm-2-ancestral", {}, None, {}),
        ("DEISMultistepScheduler", "deis-log-rho-2", {}, None, {}),
        ("SASolverScheduler", "sa-solver", {}, None, {}),
    ],
)
def test_a_name_means_what_it_means_elsewhere(name, solver, options, grid, grid_options):
    extra = {} if grid is None else {"grid": grid, "grid_options": grid_options}
    assert fd.plan(name, SCHEDULE, 7) == fd.plan(solver, SCHEDULE, 7, **options, **extra)


def test_every_preset_and_every_grid_suffix_makes_a_plan():
    for name in PRESETS:
        assert fd.plan(name, SCHEDULE, 6).nfe == 6
    for suffix, (grid, options) in GRID_SUFFIXES.items():
        assert fd.plan(f"euler_{suffix}", SCHEDULE, 6) == fd.plan("euler", SCHEDULE, 6, grid=grid, grid_options=options)


def test_what_is_given_wins_over_the_name():
    assert fd.plan("DPM++ 2M Karras", SCHEDULE, 6, grid="beta") == fd.plan("dpmpp-2m", SCHEDULE, 6, grid="beta")
    ours = fd.plan("uni_pc", SCHEDULE, 6, variant="bh2")
    assert ours == fd.plan("unipc-3", SCHEDULE, 6)


def test_no_name_stands_for_two_solvers():
    names = [n.lower() for info in fd.list_solvers().values() for n in (info.name, *info.aliases)]
    assert len(names) == len(set(names))
    assert not {n.lower() for n in PRESETS} & set(names)


@pytest.mark.parametrize(
    ("name", "near"), [("dpmpp2n", "dpmpp-2m"), ("dpm2m", "dpmpp-2m"), ("eulr", "euler"), ("unpic-2", "unipc-2")]
)
def test_an_unknown_name_offers_the_nearest(name, near):
    with pytest.raises(FastdiffError, match=f"did you mean .*{near}"):
        resolve(name)
