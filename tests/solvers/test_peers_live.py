"""The installed diffusers, run in float32 as its pipelines run it, beside our executor in float32: 1e-5 of the result.

The frozen trajectories (test_peers.py) are float64 and see every state; this sees what a user sees, at the library's own
precision. What differs on purpose is listed in fastdiff/solvers/PEERS.md.
"""

import pytest
import torch
from analytic import BIMODAL
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)

import fastdiff as fd
from fastdiff.prediction import coefficients

SHAPE = (4, 3, 2)
TRAILING = {"timestep_spacing": "trailing"}
NO_CLIP = {"clip_sample": False, **TRAILING}
RUNS = [
    (EulerDiscreteScheduler, TRAILING, "euler", {}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True}, "euler", {}),
    (EulerAncestralDiscreteScheduler, TRAILING, "euler-ancestral", {}),
    (HeunDiscreteScheduler, TRAILING, "heun", {}),
    (LMSDiscreteScheduler, TRAILING, "lms-4", {}),
    (DDIMScheduler, {**NO_CLIP, "set_alpha_to_one": True}, "ddim", {}),
    (DDPMScheduler, NO_CLIP, "ddpm", {}),
    (DPMSolverMultistepScheduler, {"solver_order": 2, "use_karras_sigmas": True}, "dpmpp-2m", {}),
    (DPMSolverMultistepScheduler, {"solver_order": 3, **TRAILING}, "dpmpp-3m-compat", {}),
    (DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++", **TRAILING}, "dpmpp-2m-sde", {}),
    (DPMSolverSinglestepScheduler, {"solver_order": 2, "final_sigmas_type": "zero"}, "dpmpp-2s-grid", {}),
    (DEISMultistepScheduler, {"solver_order": 2, **TRAILING}, "deis-log-rho-2", {}),
    (UniPCMultistepScheduler, {"solver_order": 2, **TRAILING}, "unipc-2", {"lower_final": True}),
    (UniPCMultistepScheduler, {"solver_order": 3, "use_karras_sigmas": True}, "unipc-3", {"lower_final": True}),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, "euler", {}),
]  # fmt: skip
IDS = [f"{kind.__name__}-{solver}-{i}" for i, (kind, _, solver, _) in enumerate(RUNS)]


def network(schedule, flow):
    """The mixture's eps, or its velocity, as float32 network outputs at a batch of times."""

    def call(x, t):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        x = x.double()  # the network is exact, its output is what a float32 network would return at best
        d = BIMODAL.denoise_torch(x, alpha, sigma)
        return ((x - alpha * d) / sigma - (d if flow else 0.0)).float()

    return call


def peer(scheduler, times, ask, start, noises, scale):
    """The loop of a pipeline; `noises` are handed to its steps in order."""
    draws, x = iter(noises), start
    patch = pytest.MonkeyPatch()
    module = type(scheduler).__module__
    if hasattr(__import__(module, fromlist=["x"]), "randn_tensor"):
        patch.setattr(f"{module}.randn_tensor", lambda *a, **k: next(draws))
    try:
        for t, level in zip(scheduler.timesteps, times, strict=True):
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(ask(seen if scale else x, level), t, x).prev_sample
    finally:
        patch.undo()
    return x


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("kind", "config", "solver", "options"), RUNS, ids=IDS)
def test_float32_results_agree(kind, config, solver, options, steps):
    scheduler = kind(**config)
    flow = "FlowMatch" in kind.__name__
    scheduler.set_timesteps(steps)
    schedule = fd.schedule.flow() if flow else fd.schedule.vp_from_alphas_cumprod(scheduler.alphas_cumprod.double())
    sigmas = scheduler.sigmas.double() if hasattr(scheduler, "sigmas") else None
    if sigmas is None:
        times = scheduler.timesteps.double().tolist()
    elif flow:
        times = sigmas[: len(scheduler.timesteps)].tolist()
    else:  # the network is asked at the level that the scheduler works with, not at the time it rounds that to
        times = [float(schedule.t_of_lam(-s.log())) for s in sigmas[: len(scheduler.timesteps)]]
    unique = list(dict.fromkeys(times))
    one_call = fd.list_solvers()[solver].nfe_per_step == 1
    budget = {"steps": len(unique)} if one_call else {"nfe": len(times)}
    end = "zero" if sigmas is None or sigmas[-1] == 0 else "sigma_min"
    nodes = unique if end == "zero" else [*unique, 0.0]  # DEIS ends at the model's least noisy time
    plan = fd.plan(solver, schedule, grid=nodes, end=end, **budget, **options)
    noises = torch.randn(2 * steps + 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    start = noises[0] * plan.start[1]
    ve = kind.__name__.startswith(("Euler", "Heun", "LMS"))  # its state is x/alpha, scaled back for the network
    ask = network(schedule, flow)
    theirs = peer(scheduler, times, ask, start / plan.start[0] if ve else start, noises[1:], ve)
    prediction = "flow" if flow else "eps"

    def denoise(x, t):  # as Denoiser does; but it would round the time to float32 for the network
        c = coefficients(prediction, float(schedule.alpha(t)), float(schedule.sigma(t)))
        return c.c_skip * x + c.c_out * ask(x, t)

    ours = fd.sample(denoise, plan, fd.noise.recorded(list(noises)), start=start)
    assert ours.dtype == torch.float32
    bound = 3e-5 if solver == "unipc-3" else 1e-5  # diffusers solves for its three weights in float32
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=bound * max(1.0, float(theirs.abs().max())))
