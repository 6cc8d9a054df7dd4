"""Write peer_trajectories.json: what independent samplers (diffusers, k-diffusion) compute on a Gaussian mixture.

Our solver tests compare plans with these frozen numbers, so neither peer is a dependency of the test run. To make the
file again, in a throw-away environment (k-diffusion's own imports are broken, hence --no-deps and the stubs below):

    python3 -m venv v && v/bin/pip install torch==2.13.0 numpy scipy tqdm torchdiffeq torchsde pillow safetensors \
        regex requests importlib_metadata filelock httpx huggingface_hub
    v/bin/pip install --no-deps diffusers==0.42.1 k-diffusion==0.1.1.post1
    OMP_NUM_THREADS=1 v/bin/python tests/data/make_peer_trajectories.py

What a run holds (all numbers are float64, written with full precision):

- coordinates "vp": the state is alpha*x0 + sigma*eps with alpha^2 + sigma^2 = 1; "ve": the state is x0 + sigma*eps, so
  every level is [1, sigma] (a VP model would be called at state/hypot(1, sigma)). calls, start, end, states and result
  are all in these coordinates.
- calls: the level at which the denoiser is evaluated, in order; states: the point of each evaluation (short runs only).
- start = linspace(-2.2, 2.2, 9) * start_scale. start_scale is scheduler.init_noise_sigma (1 for vp; the largest sigma,
  not hypot(sigma, 1), for ve), or sigmas[0] for k-diffusion.
- noises: every unit noise the peer drew, in order, including those it multiplies by zero.
- orders: the order of each step as the peer chose it, where it has one.
- rmse_to_ode: distance of the result from the exact probability-flow endpoint (null for stochastic runs).

The tables of diffusers (alphas_cumprod, sigmas) are built by it in float32, as shipped, and then widened to float64, so
that levels are those a user gets while the arithmetic is double. Where a scheduler's step() casts to float32, that name
means float64 inside its module during the run. "precision" is measured: a run in which any float32 tensor with a value
other than 0 and 1 arises is marked "float32".
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import math
import platform
import sys
import types
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch.overrides import TorchFunctionMode

WEIGHTS, MEANS, STDS = (0.35, 0.65), (-1.0, 0.8), (0.3, 0.5)
POINTS = np.linspace(-2.2, 2.2, 9)
STEPS = (5, 8, 20)
STATES_UP_TO = 6
BETAS = {
    "linear": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}


def denoise(y, alpha, sigma):
    """E[x0 | y] for the mixture, elementwise in float64 numpy."""
    y = np.asarray(y, dtype=np.float64)
    w, m, s = (np.array(v)[:, None] for v in (WEIGHTS, MEANS, STDS))
    flat = y.reshape(1, -1)
    var = alpha**2 * s**2 + sigma**2
    log_r = np.log(w) - 0.5 * np.log(var) - 0.5 * (flat - alpha * m) ** 2 / var
    r = np.exp(log_r - log_r.max(0))
    r /= r.sum(0)
    return (r * (m + alpha * s**2 / var * (flat - alpha * m))).sum(0).reshape(y.shape)


def ode_endpoint(start, level, end):
    """The probability-flow ODE solved to about 1e-10, in the angle phi of the variance-preserving form."""

    def slope(phi, y):
        a, s = math.cos(phi), math.sin(phi)
        x0 = denoise(y, a, s)
        return a * (y - a * x0) / s - s * x0

    phi, phi_end = math.atan2(level[1], level[0]), math.atan2(end[1], end[0])
    y = np.asarray(start) / math.hypot(*level)
    stop = max(phi_end, 1e-7)
    y = solve_ivp(slope, (phi, stop), y, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    if phi_end < stop:
        y = denoise(y, math.cos(stop), math.sin(stop))
    return y * math.hypot(*end)


class Noises:
    """Unit noise with few decimals (so that the file stays small), remembered in the order drawn."""

    def __init__(self, key):
        self.rng = np.random.Generator(np.random.Philox(zlib.crc32(key.encode())))
        self.drawn = []

    def draw(self, *_args, **_kwargs):
        z = np.round(self.rng.standard_normal(len(POINTS)), 4)
        self.drawn.append(z)
        return torch.from_numpy(z).reshape(-1, 1)


class Float32Watch(TorchFunctionMode):
    """Notices any float32 tensor that is not exactly zeros and ones."""

    def __init__(self):
        super().__init__()
        self.seen = False
        self.busy = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.busy and isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.busy = True
            self.seen |= not bool(((out == 0) | (out == 1)).all())
            self.busy = False
        return out


class DoubleTorch:
    """The torch module, except that float32 is float64."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


def numbers(values):
    return [float(v) for v in np.asarray(values, dtype=np.float64).reshape(-1)]


def record(peer, name, options, coordinates, calls, end, start, result, noises, watch, states, **more):
    stochastic = len(noises.drawn) > 0
    ode = None
    if not stochastic:
        ode = float(np.sqrt(np.mean((numbers(result) - ode_endpoint(numbers(start), calls[0], end)) ** 2)))
    run = {
        "peer": peer,
        "name": name,
        "options": options,
        "coordinates": coordinates,
        "calls": [numbers(c) for c in calls],
        "end": numbers(end),
        "timesteps": None,
        "start": numbers(start),
        "noises": [numbers(z) for z in noises.drawn],
        "result": numbers(result),
        "precision": "float32" if watch.seen or result.dtype != torch.float64 else "float64",
        "rmse_to_ode": ode if ode is None else float(f"{ode:.3g}"),
    }
    if len(calls) <= STATES_UP_TO:
        run["states"] = [numbers(s) for s in states]
    return run | more


# ---------------------------------------------------------------------------------------------------------- diffusers


def widen(scheduler):
    """Every float table of the scheduler as float64; timesteps stay, since they are looked up by equality."""
    for key, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "timesteps":
            setattr(scheduler, key, value.double())


def spy_orders(scheduler):
    """Note which of the scheduler's order-1, -2, -3 updates each step calls."""
    orders = []
    for attr in dir(type(scheduler)):
        for order, word in enumerate(("first", "second", "third"), start=1):
            if attr.endswith(f"_{word}_order_update"):
                method = getattr(scheduler, attr)

                def noted(*args, _method=method, _order=order, **kwargs):
                    orders.append(_order)
                    return _method(*args, **kwargs)

                setattr(scheduler, attr, noted)
    return orders


def run_diffusers(cls_name, steps, kwargs, step_kwargs=None, betas="linear"):
    import diffusers

    cls = getattr(diffusers, cls_name)
    module = sys.modules[cls.__module__]
    config = dict(kwargs) if cls_name == "IPNDMScheduler" else BETAS[betas] | kwargs
    scheduler = cls(num_train_timesteps=1000, **config)
    scheduler.set_timesteps(steps)
    widen(scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    step_kwargs = dict(step_kwargs or {})
    ve = cls_name in {
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
    }
    ipndm = cls_name == "IPNDMScheduler"
    if ipndm:  # this one keeps alphas beside betas (its name for sigma): make the pair exact again
        scheduler.alphas = (1 - scheduler.betas**2).sqrt()

    def level(i, t):
        if ve:
            return 1.0, float(scheduler.sigmas[i])
        if ipndm:
            return float(scheduler.alphas[i]), float(scheduler.betas[i])
        if hasattr(scheduler, "sigmas"):
            a = 1 / math.sqrt(1 + float(scheduler.sigmas[i]) ** 2)
            return a, a * float(scheduler.sigmas[i])
        a2 = float(scheduler.alphas_cumprod[int(t)])
        return math.sqrt(a2), math.sqrt(1 - a2)

    if ve or ipndm or hasattr(scheduler, "sigmas"):
        end = level(-1, None)
    else:
        a2 = float(getattr(scheduler, "final_alpha_cumprod", getattr(scheduler, "one", None)))
        end = math.sqrt(a2), math.sqrt(1 - a2)

    noises = Noises(json.dumps([cls_name, steps, betas, kwargs, step_kwargs], sort_keys=True))
    start = torch.from_numpy(POINTS * float(scheduler.init_noise_sigma)).reshape(-1, 1)
    x, calls, states, chosen = start, [], [], []
    orders, watch = spy_orders(scheduler), Float32Watch()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "torch", DoubleTorch()))
        if hasattr(module, "randn_tensor"):
            stack.enter_context(mock.patch.object(module, "randn_tensor", noises.draw))
        for i, t in enumerate(scheduler.timesteps):
            alpha, sigma = level(i, t)
            scheduler.scale_model_input(x, t)  # its value is not needed: the level is known
            x0 = torch.from_numpy(denoise(x.numpy(), alpha, sigma))
            out = (x - alpha * x0) / sigma
            if ipndm:  # it takes v
                out = alpha * out - sigma * x0
            calls.append((alpha, sigma))
            states.append(x)
            with watch:
                x = scheduler.step(out, t, x, **step_kwargs).prev_sample
            if hasattr(scheduler, "this_order"):
                chosen.append(int(scheduler.this_order))
    full = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    more = {"timesteps": numbers(scheduler.timesteps), "config": full}
    if orders or chosen:
        more["orders"] = chosen or orders
    options = {"steps": steps, "betas": None if ipndm else betas, **kwargs, **step_kwargs}
    return record(
        "diffusers", cls_name, options, "ve" if ve else "vp", calls, end, start, x, noises, watch, states, **more
    )


def diffusers_cases():
    """(class, constructor options, step options)"""
    yield "EulerDiscreteScheduler", {}, {}
    yield "EulerDiscreteScheduler", {"use_karras_sigmas": True}, {}
    yield "EulerAncestralDiscreteScheduler", {}, {}
    yield "HeunDiscreteScheduler", {}, {}
    yield "HeunDiscreteScheduler", {"use_karras_sigmas": True}, {}
    yield "LMSDiscreteScheduler", {}, {"order": 4}
    ddim = {"clip_sample": False, "set_alpha_to_one": True}
    yield "DDIMScheduler", {**ddim, "timestep_spacing": "leading"}, {"eta": 0.0}
    yield "DDIMScheduler", {**ddim, "timestep_spacing": "trailing"}, {"eta": 0.0}
    yield "DDIMScheduler", {**ddim, "timestep_spacing": "leading"}, {"eta": 1.0}
    yield "DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}, {}
    dpm = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
    for final in ("zero", "sigma_min"):
        for order in (1, 2, 3):
            options = {**dpm, "solver_order": order, "final_sigmas_type": final, "euler_at_final": False}
            yield "DPMSolverMultistepScheduler", options, {}
        for order in (2, 3):
            yield "DPMSolverSinglestepScheduler", {**dpm, "solver_order": order, "final_sigmas_type": final}, {}
        for order in (1, 2, 3):
            options = {"solver_type": "bh2", "predict_x0": True, "solver_order": order, "final_sigmas_type": final}
            yield "UniPCMultistepScheduler", options, {}
    karras = {"use_karras_sigmas": True, "solver_order": 2, "final_sigmas_type": "zero"}
    yield "DPMSolverMultistepScheduler", {**dpm, **karras, "euler_at_final": False}, {}
    yield "UniPCMultistepScheduler", {"solver_type": "bh2", "predict_x0": True, **karras}, {}
    for order in (1, 2):
        yield "DPMSolverMultistepScheduler", {**dpm, "algorithm_type": "sde-dpmsolver++", "solver_order": order}, {}
    for order in (2, 3):
        yield "DEISMultistepScheduler", {"solver_order": order}, {}
    yield "DPMSolverMultistepScheduler", {**dpm, "solver_type": "heun", "solver_order": 2}, {}
    noise = {**dpm, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    yield "DPMSolverMultistepScheduler", {**noise, "solver_order": 2}, {}
    for order in (2, 3):  # to sigma = 0 it returns NaN
        options = {"solver_type": "bh1", "predict_x0": True, "solver_order": order, "final_sigmas_type": "sigma_min"}
        yield "UniPCMultistepScheduler", options, {}
    bh2 = {"solver_type": "bh2", "predict_x0": True, "final_sigmas_type": "zero"}
    yield "UniPCMultistepScheduler", {**bh2, "solver_order": 4}, {}
    yield "UniPCMultistepScheduler", {**bh2, "solver_order": 3, "disable_corrector": list(range(20))}, {}
    for predictor, corrector in ((1, 1), (2, 2), (3, 4)):
        yield "SASolverScheduler", {"predictor_order": predictor, "corrector_order": corrector}, {}
    # its boundary condition belongs to the network: at this scaling c_skip = 0 and c_out = 1
    yield "LCMScheduler", {"timestep_scaling": 1e9}, {}
    yield "TCDScheduler", {}, {"eta": 0.3}
    for skip in (True, False):
        yield "PNDMScheduler", {"skip_prk_steps": skip, "set_alpha_to_one": False}, {}


def all_diffusers():
    for cls_name, kwargs, step_kwargs in diffusers_cases():
        for betas in BETAS:
            for steps in STEPS:
                yield cls_name, lambda a=(cls_name, steps, kwargs, step_kwargs, betas): run_diffusers(*a)
    for steps in STEPS:
        yield "IPNDMScheduler", lambda n=steps: run_diffusers("IPNDMScheduler", n, {})
        # the same formula on the sigmas of beta-linear at the integer times of the leading spacing, then 0
        acp = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))
        levels = [float(np.float32(math.sqrt(1 - acp[i * (1000 // steps)]))) for i in reversed(range(steps))]
        options = {"trained_betas": [*levels, 0.0]}
        yield "IPNDMScheduler(levels)", lambda n=steps, o=options: run_diffusers("IPNDMScheduler", n, o)


# -------------------------------------------------------------------------------------------------------- k-diffusion


def load_k_diffusion():
    """k_diffusion.sampling alone, with its real utils, past the packages which that file imports and we do not use."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    stubs = {name: types.ModuleType(name) for name in names}
    stubs["torchvision.transforms"].functional = stubs["torchvision.transforms.functional"]
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(importlib.metadata.distribution("k-diffusion").locate_file("k_diffusion"))]
    sys.modules.update(stubs, k_diffusion=package)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:  # diffusers must not take the stubs for the real thing
        for name in names:
            del sys.modules[name]


def run_k_diffusion(kd, name, n, options, uses_sampler):
    noises = Noises(json.dumps([name, n, options], sort_keys=True))
    watch, calls, states = Float32Watch(), [], []

    def model(x, sigma):
        calls.append((1.0, float(sigma.reshape(-1)[0])))
        states.append(x)
        return torch.from_numpy(denoise(x.numpy(), *calls[-1]))

    kwargs = dict(options)
    # several of them draw noise and multiply it by zero; a deterministic run gets zeros and records none
    noisy = options.get("eta", 0.0) > 0 or "s_churn" in options
    draw = noises.draw if noisy else lambda *_: torch.zeros(len(POINTS), 1)
    if uses_sampler:
        kwargs["noise_sampler"] = draw
    patch = mock.patch.object(torch, "randn_like", draw)
    torch.set_default_dtype(torch.float64)
    try:
        sigmas = kd.get_sigmas_karras(n, 0.02, 40.0)
        start = torch.from_numpy(POINTS).reshape(-1, 1) * sigmas[0]
        with patch, watch:
            if name == "sample_dpm_fast":
                x, end = kd.sample_dpm_fast(model, start, 0.02, 40.0, n, disable=True, **kwargs), (1.0, 0.02)
            else:
                x, end = getattr(kd, name)(model, start, sigmas, disable=True, **kwargs), (1.0, 0.0)
    finally:
        torch.set_default_dtype(torch.float32)
    grid = {"nfe": n} if name == "sample_dpm_fast" else {"karras_n": n}
    options = {**grid, "sigma_min": 0.02, "sigma_max": 40.0, "rho": 7.0, **options}
    more = {} if name == "sample_dpm_fast" else {"sigmas": numbers(sigmas)}
    return record("k-diffusion", name, options, "ve", calls, end, start, x, noises, watch, states, **more)


def k_diffusion_cases():
    """(function, options, whether it takes noise_sampler)"""
    yield "sample_euler", {}, False
    yield "sample_euler_ancestral", {"eta": 1.0}, True
    yield "sample_euler_ancestral", {"eta": 0.5}, True
    yield "sample_heun", {}, False
    yield "sample_heun", {"s_churn": 20.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}, False
    yield "sample_dpm_2", {}, False
    yield "sample_dpm_2_ancestral", {"eta": 1.0}, True
    for order in (1, 2, 3, 4):
        yield "sample_lms", {"order": order}, False
    for eta in (0.0, 1.0):
        yield "sample_dpmpp_2s_ancestral", {"eta": eta}, True
        yield "sample_dpmpp_sde", {"eta": eta}, True
        yield "sample_dpmpp_2m_sde", {"eta": eta, "solver_type": "midpoint"}, True
        yield "sample_dpmpp_3m_sde", {"eta": eta}, True
    yield "sample_dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}, True
    yield "sample_dpmpp_2m", {}, False
    yield "sample_dpm_fast", {"eta": 0.0}, True


def all_k_diffusion():
    kd = load_k_diffusion()
    for name, options, uses_sampler in k_diffusion_cases():
        for n in (3, 5, 10, 20):
            yield name, lambda a=(kd, name, n, options, uses_sampler): run_k_diffusion(*a)


# --------------------------------------------------------------------------------------------------------------- main


def text_of(payload):
    """JSON with one run a line."""
    head = {k: v for k, v in payload.items() if k != "runs"}
    lines = ",\n".join(json.dumps(r, separators=(",", ":"), allow_nan=False) for r in payload["runs"])
    return json.dumps(head, separators=(",", ":"))[:-1] + ',\n"runs":[\n' + lines + "\n]}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("peer_trajectories.json"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    runs, configs, failed = [], [], []
    for name, make in [*all_diffusers(), *all_k_diffusion()]:
        try:
            run = make()
        except Exception as error:  # a peer that fails is a fact to report, not a reason to stop
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if not np.isfinite(run["result"]).all():
            failed.append(name)
            print(f"NOT FINITE {name} {run['options']}", file=sys.stderr)
            continue
        if "config" in run:  # many runs share one
            config = run.pop("config")
            if config not in configs:
                configs.append(config)
            run["config"] = configs.index(config)
        runs.append(run)
        ode = run["rmse_to_ode"]
        flag = " <-- far" if ode is not None and len(run["calls"]) >= 20 and ode > 0.2 else ""
        print(run["peer"], name, json.dumps(run["options"])[:110], run["precision"], ode, run.get("orders"), flag)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "diffusers", "k-diffusion", "numpy", "scipy")}
    payload = {
        "problem": {
            "weights": WEIGHTS,
            "means": MEANS,
            "stds": STDS,
            "points": numbers(POINTS),
            "start": "points * scheduler.init_noise_sigma (vp: 1; ve: sigmas[0]); k-diffusion: points * sigmas[0]",
            "levels": "calls, end, start, states, result are in the run's coordinates; ve has alpha = 1",
        },
        "versions": {**versions, "python": platform.python_version()},
        "configs": configs,
        "runs": runs,
    }
    out.write_text(text_of(payload))
    print(f"{len(runs)} runs, {len(failed)} failed, {out.stat().st_size} bytes -> {out}")


if __name__ == "__main__":
    main()
