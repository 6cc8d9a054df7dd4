"""Our solvers under k-diffusion's calling convention: its own frozen results, its callback, its models, and a ComfyUI node."""

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import rich
import torch
from analytic import BIMODAL

import fastdiff as fd
from fastdiff.compat import kdiffusion
from fastdiff.errors import FastdiffError

ROOT = Path(__file__).parents[2]
RUNS = [
    run for run in json.loads((ROOT / "tests" / "data" / "peer_trajectories.json").read_text())["runs"]
    if run["peer"] == "k-diffusion" and "sigmas" in run and run["name"] != "sample_dpm_fast"  # that one takes no sigmas
]  # fmt: skip
ARGUMENTS = {"eta", "s_churn", "s_tmin", "s_tmax", "s_noise"}  # that our solvers have under the same names
COMPAT = {"sample_dpmpp_3m_sde": "dpmpp-3m-sde-compat"}
EXTRA = {"sample_dpmpp_sde": {"one_path": False}, "sample_dpmpp_2m": {"lower_final": False}}  # as in tests/solvers/test_peers.py


def mixture(x, sigma, **_):
    return BIMODAL.denoise_torch(x, 1.0, sigma.view(-1, *(1,) * (x.ndim - 1)))


@pytest.mark.parametrize("run", RUNS, ids=lambda r: f"{r['name']}-{'-'.join(map(str, r['options'].values()))}")
def test_the_same_name_gives_k_diffusion_s_result(run):
    options = {k: v for k, v in run["options"].items() if k in ARGUMENTS}
    solver = COMPAT.get(run["name"], run["name"].removeprefix("sample_"))
    if run["name"] == "sample_lms":
        solver = f"lms-{run['options']['order']}"
    if run["name"] == "sample_dpmpp_2m_sde":
        options["second"] = {"midpoint": "midpoint", "heun": "exact"}[run["options"]["solver_type"]]
    if run["name"] == "sample_dpmpp_2s_ancestral" and not options["eta"]:
        solver = "dpmpp-2s"
        del options["eta"]
    noises = iter(run["noises"])

    def noise_sampler(high, low):
        return torch.tensor(next(noises), dtype=torch.float64)[:, None]

    x = torch.tensor(run["start"], dtype=torch.float64)[:, None]
    sigmas = torch.tensor(run["sigmas"], dtype=torch.float64)
    sample = kdiffusion.sampler(solver, **EXTRA.get(run["name"], {}))
    out = sample(mixture, x, sigmas, noise_sampler=noise_sampler, disable=True, **options)
    assert np.abs(out.flatten().numpy() - run["result"]).max() <= 1e-12


def test_callback_and_arguments():
    seen, asked = [], []

    def model(x, sigma, cond=None):
        asked.append((cond, sigma.tolist(), sigma.dtype))
        return mixture(x, sigma)

    x = torch.randn(2, 3, 4, 4) * 10
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.0])
    out = kdiffusion.sample_heun(model, x, sigmas, {"cond": 7}, seen.append, True)
    assert [s["i"] for s in seen] == [0, 1, 2] and [float(s["sigma"]) for s in seen] == [10.0, 3.0, 1.0]
    assert len(asked) == 5 and all(a[0] == 7 and len(a[1]) == 2 for a in asked)
    torch.testing.assert_close(seen[0]["x"], x)
    torch.testing.assert_close(seen[-1]["denoised"], out)  # the last step of Heun goes to the prediction itself
    assert {"x", "i", "sigma", "sigma_hat", "denoised"} <= set(seen[0])
    half = kdiffusion.sample_heun(model, x.half(), sigmas.half(), disable=True)
    assert half.dtype == torch.float16 == asked[-1][2]
    assert kdiffusion.sample_heun(model, x, sigmas[:1]) is x


def test_a_progress_bar_by_default(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setattr(rich, "_console", None)
    x = torch.randn(1, 1, 2, 2)
    kdiffusion.sample_euler(mixture, x, [2.0, 1.0, 0.0])
    assert "sampling" in capsys.readouterr().out
    kdiffusion.sample_euler(mixture, x, [2.0, 1.0, 0.0], disable=True)
    assert capsys.readouterr().out == ""


def test_noise_is_torch_s_by_default_and_told_its_interval():
    x, told = torch.randn(2, 1, 2, 2), []

    def noise_sampler(high, low):
        told.append((float(high), float(low)))
        return torch.zeros_like(x)

    kdiffusion.sample_euler_ancestral(mixture, x, [2.0, 1.0, 0.5, 0.0], noise_sampler=noise_sampler, disable=True)
    assert told == [(2.0, 1.0), (1.0, 0.5)]
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(kdiffusion.sample_euler_ancestral(mixture, x, [2.0, 1.0, 0.5, 0.0], disable=True))
    assert torch.equal(*outs)


def test_a_k_diffusion_model_is_a_denoiser():
    class Model(torch.nn.Module):
        sigma_min, sigma_max = torch.tensor(0.03), torch.tensor(20.0)

        def forward(self, x, sigma, shift=0.0):
            return mixture(x, sigma) + shift

    den = kdiffusion.denoiser(Model(), shape=(1, 2, 2))
    plan = fd.plan("dpmpp-2m", den, 8)
    got = fd.sample(den, plan, seeds=[1, 2], dtype=torch.float64)
    want = kdiffusion.sample_dpmpp_2m(
        lambda x, s: mixture(x, s), fd.noise.from_seeds([1, 2])(0, (2, 1, 2, 2), torch.device("cpu")).double() * plan.start[1],
        [row.t for row in plan.rows] + [0.0], disable=True,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert (den.bind(shift=1.0)(got, 1.0) - den(got, 1.0)).mean() == pytest.approx(1.0)
    with pytest.raises(FastdiffError, match="sigma_min and sigma_max: give them"):
        kdiffusion.denoiser(lambda x, s: x)


def test_bad_names_and_options():
    with pytest.raises(AttributeError, match="did you mean"):
        _ = kdiffusion.sample_dpmpp_2n
    with pytest.raises(FastdiffError, match="has no option"):
        kdiffusion.sampler("heun", eta=1.0)
    with pytest.raises(FastdiffError, match="strictly from noise to data"):
        kdiffusion.sample_euler(mixture, torch.randn(1, 1), [1.0, 2.0, 0.0], disable=True)


def test_the_comfyui_node(monkeypatch):
    """The example node under KSAMPLER.sample of ComfyUI 0.3's samplers.py, whose call is written down here."""

    class KSAMPLER:
        def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
            self.sampler_function, self.extra_options = sampler_function, extra_options or {}

        def sample(self, model_k, sigmas, extra_args, callback, noise, disable_pbar):
            def k_callback(x):
                return callback(x["i"], x["denoised"], x["x"], len(sigmas) - 1)

            return self.sampler_function(
                model_k, noise, sigmas, extra_args=extra_args, callback=k_callback, disable=disable_pbar, **self.extra_options
            )

    samplers = types.ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSAMPLER
    comfy = types.ModuleType("comfy")
    comfy.samplers = samplers
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)
    node = runpy.run_path(str(ROOT / "tests" / "examples" / "comfyui_node.py"))["NODE_CLASS_MAPPINGS"]["FastdiffSampler"]
    choices, _ = node.INPUT_TYPES()["required"]["solver"]
    assert "unipc-2" in choices and len(choices) == len(fd.list_solvers())
    (made,) = getattr(node(), node.FUNCTION)("unipc-2")

    class CONST:
        pass

    class ModelSampling(CONST):
        pass

    class Model:
        def __init__(self, flow):
            if flow:
                self.inner_model = types.SimpleNamespace(inner_model=types.SimpleNamespace(model_sampling=ModelSampling()))

        def __call__(self, x, sigma, model_options=None, seed=None):
            s = sigma.view(-1, 1, 1, 1)
            return BIMODAL.denoise_torch(x, 1 - s if hasattr(self, "inner_model") else 1.0, s)

    noise = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for flow, sigmas in ((False, torch.linspace(10, 0, 25) ** 2 / 10), (True, torch.linspace(1, 0, 25))):
        calls = []
        x = noise * float(sigmas[0])
        out = made.sample(Model(flow), sigmas.double(), {"seed": 0}, lambda *a, to=calls: to.append(a), x, True)
        assert [(a[0], a[3]) for a in calls] == [(i, 24) for i in range(24)]
        schedule = fd.schedule.flow() if flow else fd.schedule.ve(0.01, 20.0)
        plan = fd.plan("unipc-2", schedule, steps=24, grid=sigmas[:-1].double().tolist())
        want = fd.sample(BIMODAL.network(schedule), plan, start=x, dtype=torch.float64)
        assert (out - want).abs().max() < 1e-10
