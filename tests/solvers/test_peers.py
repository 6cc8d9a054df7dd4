"""Trajectories of diffusers 0.42.1 and k-diffusion 0.1.1, frozen in tests/data, reproduced on the same levels."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import BIMODAL

import fastdiff as fd
from fastdiff.grid import Grid, Node, node_at

RUNS = json.loads((Path(__file__).parents[1] / "data" / "peer_trajectories.json").read_text())["runs"]
SCHEDULE = fd.schedule.ve(sigma_min=0.02, sigma_max=200.0)  # for inner points and churn: the peers cap neither
BOUND = 1e-12  # on |ours - theirs| at data of size 1

SECOND = {"midpoint": "midpoint", "heun": "exact"}
MULTISTEP = {1: "ddim", 2: "dpmpp-2m", 3: "dpmpp-3m-compat"}  # plain "dpmpp-3m" corrects the published one
OURS = {
    "EulerDiscreteScheduler": lambda o: ("euler", {}),
    "EulerAncestralDiscreteScheduler": lambda o: ("euler-ancestral", {}),
    "HeunDiscreteScheduler": lambda o: ("heun", {}),
    "LMSDiscreteScheduler": lambda o: (f"lms-{o['order']}", {}),
    "DDIMScheduler": lambda o: ("ddim", {"eta": o["eta"]}),
    "DDPMScheduler": lambda o: ("ddpm", {}),
    "UniPCMultistepScheduler": lambda o: (
        f"unipc-{o['solver_order']}",
        {"lower_final": True, "variant": o["solver_type"], "correct": "disable_corrector" not in o},
    ),
    "DPMSolverSinglestepScheduler": lambda o: (f"dpmpp-{o['solver_order']}s-grid", {}),
    "LCMScheduler": lambda o: ("lcm", {}),
    "TCDScheduler": lambda o: ("tcd", {"gamma": o["eta"]}),
    "SASolverScheduler": lambda o: (
        "sa-solver",
        {"predictor": o["predictor_order"], "corrector": o["corrector_order"], "lower_final": True, **tau_of(o["betas"])},
    ),
    "sample_euler": lambda o: ("euler", {}),
    "sample_euler_ancestral": lambda o: ("euler-ancestral", {"eta": o["eta"]}),
    "sample_heun": lambda o: ("heun", {k: v for k, v in o.items() if k.startswith("s_")}),
    "sample_lms": lambda o: (f"lms-{o['order']}", {}),
    "sample_dpmpp_2m": lambda o: ("dpmpp-2m", {"lower_final": False}),
    "sample_dpm_2": lambda o: ("dpm-2", {}),
    "sample_dpm_2_ancestral": lambda o: ("dpm-2-ancestral", {"eta": o["eta"]}),
    "sample_dpmpp_2s_ancestral": lambda o: ("dpmpp-2s-ancestral", {"eta": o["eta"]}) if o["eta"] else ("dpmpp-2s", {}),
    # independent noises where its own Brownian tree would give one path, since the frozen file replaces the tree
    "sample_dpmpp_sde": lambda o: ("dpmpp-sde", {"eta": o["eta"], "one_path": False}),
    "sample_dpmpp_2m_sde": lambda o: ("dpmpp-2m-sde", {"eta": o["eta"], "second": SECOND[o["solver_type"]]}),
    "sample_dpmpp_3m_sde": lambda o: ("dpmpp-3m-sde-compat", {"eta": o["eta"]}),  # plain "dpmpp-3m-sde" corrects it
    "sample_dpm_fast": lambda o: ("dpm-fast", {}),
    "DEISMultistepScheduler": lambda o: (f"deis-log-rho-{o['solver_order']}", {}),
    "PNDMScheduler": lambda o: ("plms" if o["skip_prk_steps"] else "pndm", {}),
}


@functools.cache
def diffusers_schedule(betas):
    """The discrete-time schedule as diffusers makes it, in float32."""
    low, high = {"linear": (0.0001, 0.02), "scaled_linear": (0.00085**0.5, 0.012**0.5)}[betas]
    steps = torch.linspace(low, high, 1000, dtype=torch.float32)
    steps = steps if betas == "linear" else steps**2
    return fd.schedule.vp_from_alphas_cumprod(torch.cumprod(1.0 - steps, dim=0).double())


def tau_of(betas):
    """SASolverScheduler's own tau function: 1 at times from 200 to 800, else 0."""
    schedule = diffusers_schedule(betas)
    return {"tau_min": node_at(schedule, 199.9).u, "tau_max": node_at(schedule, 800.1).u}


def ours(run):
    """(solver, options) of a peer's run, or None where we have none."""
    name, o = run["name"], run["options"]
    if name == "PNDMScheduler" and not o["skip_prk_steps"] and 1000 // o["steps"] % 2:
        return None  # its Runge-Kutta start then moves the state to one time step and asks the network at the one before
    if name in OURS:
        return OURS[name](o)
    if name == "DPMSolverMultistepScheduler":
        if o["algorithm_type"] == "dpmsolver":
            return "dpm-solver-2m", {}
        if o["solver_type"] == "heun":
            return "res-2m", {}
        if o["algorithm_type"] == "dpmsolver++":
            return MULTISTEP[o["solver_order"]], {}  # it lowers the final orders below 15 steps, as we do by default
        if o["solver_order"] == 1:  # SDE-DPM-Solver++ of order 1 is DDIM at eta = 1
            return "ddim", {"eta": 1.0}
        return "dpmpp-2m-sde", {"lower_final": o["steps"] < 15}
    if name == "IPNDMScheduler" and "trained_betas" in o:
        return "ipndm-4", {}
    # SDE-DPM-Solver++ of order 3 in diffusers is not frozen: its third-order term has -0.5 where +0.5 belongs (k-diffusion has
    # it right), so that its error is of order 1. DPM-2 of diffusers has k-diffusion's formulas.
    # No table of ours: IPNDMScheduler as shipped starts at alpha = 0, where it divides by 1e-8.
    return None


# Not in the frozen file: our corrections, what diffusers and k-diffusion do not have (ER-SDE, gradient estimation, tAB, RK4,
# restart, PECE, consistency models in VP, ...), and orders below the peer's.
NOT_FROZEN = {
    "dpmpp-3m", "dpmpp-3m-sde", "dpmpp-3s", "dpm-solver-3m", "dpm-solver-3s", "res-3m", "ipndm-1", "ipndm-2", "ipndm-3",
    "deis-log-rho-1", "deis-tab-1", "deis-tab-2", "deis-tab-3", "deis-tab-4", "rk4", "gradient-estimation", "er-sde-1",
    "er-sde-2", "er-sde-3", "er-sde-3-compat", "euler-maruyama", "restart", "sa-solver-pece", "consistency",
    "predictor-corrector", "annealed-langevin",
}  # fmt: skip

COVERED = [run for run in RUNS if ours(run)]


def label(run):
    o = {k: v for k, v in run["options"].items() if k not in ("trained_betas", "sigma_min", "sigma_max", "rho")}
    return f"{run['name']}-" + "-".join(str(v) for v in o.values())


def grid_of(run):
    """The levels of a run's steps, without the inner points of one-step methods; times are sigma in VE, else a count."""
    if run["name"] == "sample_dpm_fast":
        o = run["options"]
        high, low, n = math.log(o["sigma_max"]), math.log(o["sigma_min"]), o["nfe"]
        return Grid(tuple(Node(s, 1.0, s) for s in np.exp(np.linspace(high, low, n // 3 + 2)).tolist()))
    levels = [[1.0, s] for s in run["sigmas"][:-1]] if "sigmas" in run else run["calls"]
    if run["name"] == "HeunDiscreteScheduler":
        levels = levels[::2]
    if run["name"] == "PNDMScheduler":
        # PLMS evaluates its second level twice, the Runge-Kutta start takes four calls a step; the last step goes from its level
        # to the same level and moves nothing
        times = run["timesteps"]
        times = [times[0], *times[2:]] if run["options"]["skip_prk_steps"] else [*times[0:12:4], *times[12:]]
        return Grid(tuple(node_at(diffusers_schedule(run["options"]["betas"]), t) for t in times))
    if run["name"] in ("LCMScheduler", "TCDScheduler"):
        schedule = diffusers_schedule(run["options"]["betas"])
        nodes = [node_at(schedule, t) for t in run["timesteps"]]
        # TCD ends at time 0, whose noise it leaves in the sample, whatever it calls its end
        return Grid((*nodes, node_at(schedule, 0.0) if run["name"] == "TCDScheduler" else Node(0.0, *run["end"])))
    ve = run["coordinates"] == "ve"
    nodes = [Node(s if ve else float(len(levels) - i), a, s) for i, (a, s) in enumerate(levels)]
    return Grid((*nodes, Node(0.0, *run["end"])))


def calls_of(run):
    return run["calls"][: -1 if run["name"] == "PNDMScheduler" else None]


def reproduce(run):
    """Our result, and the points that our denoiser was asked at with their levels."""
    solver, options = ours(run)
    grid = grid_of(run)
    info = fd.list_solvers()[solver]
    calls = calls_of(run)
    budget = {"steps": grid.steps} if info.nfe_per_step == 1 else {"nfe": len(calls)}
    end = "zero" if grid.ends_clean else "sigma_min"
    timed = run["name"] in ("PNDMScheduler", "TCDScheduler")  # their inner points are times of the model
    schedule = diffusers_schedule(run["options"]["betas"]) if timed else SCHEDULE
    plan = fd.plan(solver, schedule, grid=grid, end=end, **budget, **options)
    level = {row.t: (row.alpha, row.sigma) for row in plan.rows}
    asked = []

    def denoiser(x, t):
        asked.append((level[t], x.flatten().tolist()))
        return torch.from_numpy(BIMODAL.denoise(x.numpy(), *level[t]))

    def column(values):
        return torch.tensor(values, dtype=torch.float64)[:, None]

    noises = run["noises"]
    if run["name"] == "SASolverScheduler":  # it draws where tau is 0 too, and multiplies by 0
        noises = [z for t, z in zip(run["timesteps"], noises, strict=True) if 200 <= t <= 800]
    noise = fd.noise.recorded([column(z) for z in (run["start"], *noises)])  # entry 0 is the start's slot
    out = fd.sample(denoiser, plan, noise, start=column(run["start"]), dtype=torch.float64)
    return out.flatten().numpy(), asked


@pytest.mark.parametrize("run", COVERED, ids=label)
def test_result_and_every_state_agree(run):
    out, asked = reproduce(run)
    assert np.abs(out - run["result"]).max() <= BOUND
    calls = calls_of(run)
    np.testing.assert_allclose([level for level, _ in asked], calls, rtol=1e-12)
    if "states" in run:
        states = np.array([x for _, x in asked])
        assert (np.abs(states - run["states"][: len(calls)]) / np.array(calls)[:, 1:].clip(1)).max() <= BOUND


def test_every_solver_of_ours_that_a_peer_has_is_compared():
    compared = {ours(run)[0] for run in COVERED}
    assert set(fd.list_solvers()) - compared == NOT_FROZEN
    assert len(COVERED) == 359


def test_published_third_order_is_not_the_corrected_one():
    run = next(r for r in COVERED if ours(r)[0] == "dpmpp-3m-compat" and r["options"]["steps"] == 20)
    grid, ours_ = grid_of(run), {}
    for name in ("dpmpp-3m", "dpmpp-3m-compat"):
        plan = fd.plan(name, SCHEDULE, steps=grid.steps, grid=grid, lower_final=True)
        level = {row.t: (row.alpha, row.sigma) for row in plan.rows}
        ours_[name] = fd.sample(
            lambda x, t, level=level: torch.from_numpy(BIMODAL.denoise(x.numpy(), *level[t])),
            plan, start=torch.tensor(run["start"], dtype=torch.float64)[:, None], dtype=torch.float64,
        )  # fmt: skip
    assert (ours_["dpmpp-3m"] - ours_["dpmpp-3m-compat"]).abs().max() > 1e-3
