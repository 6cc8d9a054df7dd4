"""The seat as each scheduler class of diffusers, beside the real one; and the table of classes in PEERS.md."""

import importlib
import inspect
import sys
import types
from pathlib import Path

import diffusers
import pipelines
import pytest
import torch
from pipelines import images

import fastdiff as fd
from fastdiff.compat.diffusers_classes import CLASSES
from fastdiff.compat.diffusers_refused import REFUSED
from fastdiff.errors import FastdiffError

Seat = fd.compat.DiffusersScheduler
ALIKE = 1e-4
SD = pipelines.sd_scheduler().config
FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
V = {"prediction_type": "v_prediction"}
START = {"skip_prk_steps": False}
FLOW_OF_SD = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}


def network(x, t):
    """Smooth in the sample and in the time that it is told."""
    return torch.sin(1.5 * x + 0.01 * float(t)) + 0.3 * x


def loop(scheduler, steps, first=0, **given):
    """A pipeline's loop from entry `first` of the timesteps."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(**({"num_inference_steps": steps} if steps else {}), **given)
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = torch.randn(2, 3, 4, 4, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps[first:]:
        y = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(y, t), t, x, **draws).prev_sample
    return x


def alike(name, steps, first=0, config=SD, given=None, **changes):
    theirs = loop(getattr(diffusers, name).from_config(config, **changes), steps, first, **(given or {}))
    ours = loop(Seat.from_config(config, solver=name, **changes), steps, first, **(given or {}))
    assert (theirs.isfinite().all() and theirs.std() > 0) or (name, steps) == ("IPNDMScheduler", 1)
    # no trained network: its samples leave [-1, 1] by far, so the bound is in units of the largest
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ALIKE * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "SASolverScheduler", "CogVideoXDDIMScheduler"])
@pytest.mark.parametrize("steps", [1, 2, 7, 10])
def test_every_spacing(name, spacing, steps):
    if (name, spacing, steps) == ("PNDMScheduler", "linspace", 1):  # the class gives its noise back: a step from time 0 to 0
        with pytest.raises(FastdiffError, match="ask for more steps"):
            Seat.from_config(SD, solver=name, timestep_spacing=spacing).set_timesteps(steps)
        return
    # at 7 steps DDIM and PNDM go 1000 // 7 = 142 on while their times lie 143 apart, with linspace always by another length
    alike(name, steps, timestep_spacing=spacing, **({"clip_sample": False} if "DDIM" in name else {}))


@pytest.mark.parametrize("name", ["DDIMParallelScheduler", "DDPMParallelScheduler"])
def test_the_parallel_classes(name):
    alike(name, 7)


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_ipndm(steps):
    alike("IPNDMScheduler", steps)  # at one step all that is left of the noise is nothing


@pytest.mark.parametrize("steps", [4, 7, 8])
@pytest.mark.parametrize("changes", [START, V, {**START, **V, "timestep_spacing": "linspace"}], ids=["start", "v", "both"])
def test_pndm_call_by_call(steps, changes):
    """With 8 steps the stride is odd, and the class asks at other times than it moves to."""
    alike("PNDMScheduler", steps, **changes)


@pytest.mark.parametrize("name", ["PNDMScheduler", "IPNDMScheduler", "SASolverScheduler", "DDIMScheduler"])
def test_a_start_in_the_middle(name):
    for first in (1, 3):
        alike(name, 7, first, **({"timestep_spacing": "linspace", "clip_sample": False} if name == "DDIMScheduler" else {}))


@pytest.mark.parametrize(
    "changes",
    [{"predictor_order": 3, "corrector_order": 4}, {"lower_order_final": False}, {"prediction_type": "v_prediction"},
     {"tau_func": lambda t: 0.5}, {"tau_func": lambda t: 0}, {"thresholding": True}],
    ids=["orders", "final", "v", "half", "none", "thresholding"],
)  # fmt: skip
def test_entries_of_sa_solver(changes):
    alike("SASolverScheduler", 8, **changes)


@pytest.mark.parametrize(
    ("name", "steps", "more"),
    [("FlowMatchHeunDiscreteScheduler", 1, {}), ("FlowMatchHeunDiscreteScheduler", 6, {}),
     ("FlowMatchHeunDiscreteScheduler", 6, {"first": 4}), ("FlowMatchLCMScheduler", 5, {}),
     ("FlowMatchLCMScheduler", 4, {"use_karras_sigmas": True}),
     ("FlowMatchLCMScheduler", None, {"given": {"timesteps": [1000.0, 700.0, 300.0]}}),
     ("FlowMatchEulerDiscreteScheduler", None, {"given": {"timesteps": [1000.0, 700.0, 300.0]}}),
     *((name, 6, {"config": SD, **FLOW_OF_SD})
       for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"))],
)  # fmt: skip
def test_flow_classes(name, steps, more):
    """Some tell the network a time that is rounded, or not shifted."""
    alike(name, steps, **{"config": FLOW, **more})


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"])
def test_edm_classes(name):
    for steps in (1, 5):
        alike(name, steps, config=getattr(diffusers, name)().config)


def test_a_consistency_model_pipeline():
    def make():
        net = pipelines.seeded(lambda: diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_class_embeds=3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        ))  # fmt: skip
        return pipelines.quiet(diffusers.ConsistencyModelPipeline(net, diffusers.CMStochasticIterativeScheduler()))

    for given in ({"num_inference_steps": 1}, {"num_inference_steps": None, "timesteps": [22, 0]}):
        made = []
        for seat in (False, True):
            pipe = make()
            if seat:
                pipe.scheduler = Seat.from_config(pipe.scheduler.config)
            out = pipe(batch_size=2, class_labels=[0, 1], generator=pipelines.generators(2), output_type="np", **given)
            made.append(torch.as_tensor(out.images))
        assert made[0].std() > 0.05
        torch.testing.assert_close(made[1], made[0], rtol=0, atol=ALIKE)


def test_dpm_solver_sde_on_the_same_draws(monkeypatch):
    """diffusers needs torchsde for the class's own noise, and for nothing else: here both get the noise of one generator."""
    if not diffusers.utils.is_torchsde_available():
        with pytest.raises(FastdiffError, match="requires the torchsde library"):
            Seat.from_config(SD, solver="DPMSolverSDEScheduler")
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
        monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", module.DPMSolverSDEScheduler)
    for changes in ({}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}):
        theirs = diffusers.DPMSolverSDEScheduler.from_config(SD, **changes)
        ours = Seat.from_config(SD, solver="DPMSolverSDEScheduler", **changes)
        ends = []
        for scheduler in (theirs, ours):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(2, 3, 4, 4, generator=generator)
            scheduler.set_timesteps(6)
            x = x * float(scheduler.init_noise_sigma)
            draws = {"generator": generator} if scheduler is ours else {}
            if scheduler is theirs:
                scheduler.noise_sampler = lambda high, low, g=generator: torch.randn(2, 3, 4, 4, generator=g)
            assert len(scheduler.timesteps) == 11 and scheduler.order == 2
            for t in scheduler.timesteps:
                x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **draws).prev_sample
            ends.append(x)
        torch.testing.assert_close(ends[1], ends[0], rtol=ALIKE, atol=ALIKE)


def test_unipc_bh1_to_clean_data_is_finite_here():
    """PEERS.md: B(h) = h is infinite on the step to sigma = 0, and the class's images are NaN."""
    changes = {"solver_type": "bh1", "use_karras_sigmas": True, "final_sigmas_type": "zero"}
    theirs = loop(diffusers.UniPCMultistepScheduler.from_config(SD, **changes), 5)
    assert theirs.isnan().all()
    assert loop(Seat.from_config(SD, solver="UniPCMultistepScheduler", **changes), 5).isfinite().all()


@pytest.mark.parametrize(
    ("solver", "changes", "match"),
    [
        ("SASolverScheduler", {"tau_func": lambda t: t / 1000}, "a tau_func of more than one strength has no equal"),
        ("SASolverScheduler", {"algorithm_type": "noise_prediction"}, "has no equal here"),
        ("SASolverScheduler", {"use_karras_sigmas": True}, "last step has no length"),
        ("PNDMScheduler", {"prediction_type": "sample"}, "has no equal here"),
        ("PNDMScheduler", {"skip_prk_steps": False}, "PNDMScheduler makes no list of 3 steps"),
        ("DDIMScheduler", {"steps_offset": 0, "set_alpha_to_one": False}, "only clips in its last step"),
        ("IPNDMScheduler", {"start": "rk"}, "reproduced as it is, without start"),
        ("FlowMatchLCMScheduler", {"invert_sigmas": True}, r"invert_sigmas \(a network whose time runs"),
        ("SCMScheduler", {}, "SCMScheduler is not reproduced .*middle time"),
        ("NoScheduler", {}, "not a scheduler class of diffusers"),
    ],
    ids=lambda given: given if isinstance(given, str) else " ".join(given),
)  # fmt: skip
def test_refused_in_one_line(solver, changes, match):
    with pytest.raises(FastdiffError, match=match) as caught:
        Seat.from_config(SD, solver=solver, **changes).set_timesteps(3)
    assert "\n" not in str(caught.value)


def test_every_class_of_diffusers_is_reproduced_or_refused_with_its_reason():
    there = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    assert set(CLASSES) | set(REFUSED) == there and not set(CLASSES) & set(REFUSED)
    lines = (Path(fd.__file__).parent / "solvers" / "PEERS.md").read_text().splitlines()
    for name in CLASSES:
        assert any(line.startswith("| reproduced |") and f"`{name}`" in line for line in lines), name
    for name, reason in REFUSED.items():
        assert any(f"`{name}`" in line and reason in line for line in lines), name


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_flow_classes_in_a_pipeline(name):
    theirs, ours = pipelines.sd3(), pipelines.sd3()
    config = theirs.scheduler.config
    theirs.scheduler, ours.scheduler = getattr(diffusers, name).from_config(config), Seat.from_config(config, solver=name)
    made = []
    for pipe in (theirs, ours):
        torch.manual_seed(5)  # the pipeline hands no generator to the step
        made.append(images(pipe, 4))
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=ALIKE)
