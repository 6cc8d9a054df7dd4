"""Our solvers under k-diffusion's calling convention: its own frozen results, its callback, its models; ComfyUI and A1111."""

import inspect
import json
import runpy
import sys
import types
from collections import namedtuple
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


NOISE = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMAS = torch.linspace(10, 0, 25).double() ** 2 / 10


def installed(monkeypatch, **modules):
    """Stand-ins for another program's modules, by their dotted names with two underscores for a dot."""
    for name, contents in modules.items():
        module = types.ModuleType(name.replace("__", "."))
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if "." in module.__name__:
            parent, child = module.__name__.rsplit(".", 1)
            setattr(sys.modules[parent], child, module)


def by_plan(solver, schedule, start, sigmas):
    plan = fd.plan(solver, schedule, steps=len(sigmas) - 1, grid=sigmas[:-1].tolist())
    return fd.sample(BIMODAL.network(schedule), plan, start=start, dtype=torch.float64)


class ComfyKSampler:
    """What ComfyUI's comfy.samplers.KSAMPLER does around a sampler function (read 2026-11; so since 0.3): the model it hands over
    also takes the mask of inpainting, and knows whether it is a flow model three objects down."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        extra_args["denoise_mask"] = denoise_mask
        sampling = guider.inner_model.model_sampling

        class Masked:
            inner_model = guider

            def __call__(self, x, sigma, denoise_mask, model_options, seed):
                assert denoise_mask is None and seed == 7 and "transformer_options" in model_options
                return guider(x, sigma, model_options=model_options, seed=seed)

        def each(x):
            return callback(x["i"], x["denoised"], x["x"], len(sigmas) - 1)

        start = sampling.noise_scaling(sigmas[0], noise, latent_image, True)
        made = self.sampler_function(
            Masked(), start, sigmas, extra_args=extra_args, callback=each if callback else None, disable=disable_pbar,
            **self.extra_options,
        )  # fmt: skip
        return sampling.inverse_noise_scaling(sigmas[-1], made)


def test_the_comfyui_node(monkeypatch):
    installed(monkeypatch, comfy={}, comfy__samplers={"KSAMPLER": ComfyKSampler})
    node = runpy.run_path(str(ROOT / "tests" / "examples" / "comfyui_node.py"))["NODE_CLASS_MAPPINGS"]["FastdiffSampler"]
    assert node.RETURN_TYPES == ("SAMPLER",)  # what SamplerCustom takes
    choices, default = node.INPUT_TYPES()["required"]["solver"]
    assert default["default"] in choices and len(choices) == len(fd.list_solvers())
    (made,) = getattr(node(), node.FUNCTION)("unipc-2")

    class EPS:
        def noise_scaling(self, sigma, noise, latent, max_denoise):
            return noise * sigma + (0 if latent is None else latent)

        def inverse_noise_scaling(self, sigma, latent):
            return latent

    class CONST(EPS):
        def noise_scaling(self, sigma, noise, latent, max_denoise):
            return noise * sigma

        def inverse_noise_scaling(self, sigma, latent):
            return latent / (1 - sigma)

    class Guider:
        """comfy.samplers.CFGGuider: the guided prediction, and below it the model."""

        def __init__(self, kind):
            self.flow = kind is CONST
            self.inner_model = types.SimpleNamespace(model_sampling=type("ModelSampling", (kind,), {})())

        def __call__(self, x, sigma, model_options, seed):
            s = sigma.view(-1, 1, 1, 1)
            return BIMODAL.denoise_torch(x, 1 - s if self.flow else 1.0, s)

    for kind, sigmas, schedule in ((EPS, SIGMAS, fd.schedule.ve(0.01, 20.0)),
                                   (CONST, torch.linspace(1, 0, 25).double(), fd.schedule.flow())):  # fmt: skip
        calls = []
        out = made.sample(Guider(kind), sigmas, {"model_options": {"transformer_options": {}}, "seed": 7},
                          lambda *a, to=calls: to.append(a), NOISE, disable_pbar=True)  # fmt: skip
        assert [(a[0], a[3]) for a in calls] == [(i, 24) for i in range(24)]
        assert (out - by_plan("unipc-2", schedule, NOISE * sigmas[0], sigmas)).abs().max() < 1e-10


def test_the_a1111_script(monkeypatch):
    """Under modules/sd_samplers_kdiffusion.py of the web UI 1.10 (read 2026-11), which takes a function for a name since 1.6."""
    SamplerData = namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])

    class KDiffusionSampler:
        def __init__(self, funcname, sd_model, options=None):
            self.func = funcname if callable(funcname) else None
            self.model_wrap_cfg, self.seen = sd_model, []

        def sample(self, x, sigmas):
            takes = inspect.signature(self.func).parameters
            offered = {"n": 24, "sigma_min": 0.1, "sigma_max": 10.0, "sigmas": sigmas, "eta": 1.0}
            given = {name: value for name, value in offered.items() if name in takes}
            extra = {"cond": 1, "image_cond": 2, "uncond": 3, "cond_scale": 7.0, "s_min_uncond": 0.0}
            return self.func(self.model_wrap_cfg, x * sigmas[0], extra_args=extra, disable=False,
                             callback=lambda d: self.seen.append((d["i"], d["denoised"].shape)), **given)  # fmt: skip

    menu = types.SimpleNamespace(all_samplers=[SamplerData("Euler", None, [], {})], set_samplers=lambda: shown.append(True))
    shown = []
    installed(monkeypatch, modules={}, modules__sd_samplers_common={"SamplerData": SamplerData},
              modules__sd_samplers_kdiffusion={"KDiffusionSampler": KDiffusionSampler})  # fmt: skip
    monkeypatch.setattr(sys.modules["modules"], "sd_samplers", menu, raising=False)
    script = runpy.run_path(str(ROOT / "tests" / "examples" / "a1111_script.py"))
    assert shown and set(menu.all_samplers_map) == {"Euler", *(f"fastdiff {name}" for name in script["SOLVERS"])}

    def guided(x, sigma, cond, image_cond, uncond, cond_scale, s_min_uncond):
        assert (cond, uncond, cond_scale) == (1, 3, 7.0)
        return mixture(x, sigma)

    for name in script["SOLVERS"]:
        sampler = menu.all_samplers_map[f"fastdiff {name}"].constructor(guided)
        out = sampler.sample(NOISE, SIGMAS)
        assert out.isfinite().all() and [i for i, _ in sampler.seen] == list(range(24))
        if not fd.list_solvers()[name].stochastic:
            assert (out - by_plan(name, fd.schedule.ve(0.01, 20.0), NOISE * SIGMAS[0], SIGMAS)).abs().max() < 1e-10
