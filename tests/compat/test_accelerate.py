"""fd.accelerate on real pipelines, undone again; and the examples of the seats, run."""

import runpy
from dataclasses import replace
from pathlib import Path

import diffusers
import pipelines
import pytest
import torch
from pipelines import images

import fastdiff as fd
from fastdiff import ops
from fastdiff.errors import FastdiffError

EXAMPLES = Path(__file__).parents[2] / "tests" / "examples"
CALLS = {"ddpm": "unet", "sd": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_counted_and_undone(name, capsys):
    pipe = getattr(pipelines, name)()
    before, want = pipe.scheduler, images(pipe, 3)
    report = fd.accelerate(pipe, nfe=6)
    assert capsys.readouterr().out == f"{report}\n" and type(before).__name__ in str(report)
    network, calls = getattr(pipe, CALLS[name]), []
    hook = network.register_forward_hook(lambda *_: calls.append(1))
    assert images(pipe, report.steps).isfinite().all()
    assert len(calls) == 6  # with classifier-free guidance too: one call for both
    hook.remove()
    report.undo()
    assert pipe.scheduler is before
    torch.testing.assert_close(images(pipe, 3), want, rtol=0, atol=0)


def test_kernels_where_they_run(monkeypatch):
    pipe = pipelines.sd()
    assert "kernels: torch's (the tensors are on cpu" in str(fd.accelerate(pipe, 3, quiet=True))
    want = images(pipe, 3)
    monkeypatch.setattr(ops, "why_torch", lambda device: None)  # the ops then run by torch, at the kernels' places
    report = fd.accelerate(pipe, 3, quiet=True)
    assert "sites of unet fused, 0 left" in str(report) and "sites of vae fused, 0 left" in str(report)
    torch.testing.assert_close(images(pipe, 3), want, rtol=0, atol=1e-4)
    report.undo()
    assert not any("forward" in m.__dict__ for m in pipe.unet.modules())


def test_the_choice_and_what_is_given():
    pipe = pipelines.sd()
    solvers = {nfe: fd.accelerate(pipe, nfe, quiet=True).pipe.scheduler.seat.solver for nfe in (5, 20)}
    assert solvers == {5: "ipndm-3", 20: "unipc-2"}
    fd.accelerate(pipe, 7, solver="dpmpp-3m", grid="karras", quiet=True)
    assert (pipe.scheduler.seat.solver, pipe.scheduler.seat.grid) == ("dpmpp-3m", "karras")
    plan = fd.plan("unipc-3", pipe.scheduler.seat.schedule(), 9)
    report = fd.accelerate(pipe, plan=plan, quiet=True)
    assert report.steps == 9 and pipe.scheduler.seat.plan == plan


def test_a_distilled_network_keeps_its_own_steps():
    """No ODE solver leads through the predictions of a consistency model."""
    pipe = pipelines.sd(scheduler=diffusers.LCMScheduler(**pipelines.SD_SCHEDULER))
    want = images(pipe, 4)
    report = fd.accelerate(pipe, 4, quiet=True)
    assert "-> solver LCMScheduler" in str(report) and report.steps == 4
    torch.testing.assert_close(images(pipe, 4), want, rtol=0, atol=1e-4)
    assert "solver ddim" in str(fd.accelerate(pipe, 4, solver="ddim", quiet=True))


def test_a_plan_tuned_for_the_pipeline_is_found_beside_it(tmp_path):
    pipelines.ddpm().save_pretrained(tmp_path / "p")
    den = fd.load(tmp_path / "p")
    about = {"checkpoint": den.hash, "prediction": den.prediction, "schedule": den.schedule.config(), "guidance": [1.0]}
    for name, made in (("mine", about), ("another", {**about, "checkpoint": "0" * 64})):
        plan = replace(fd.plan("unipc-3", den, 6), name=name, provenance={"tuned_for": made})
        plan.save(tmp_path / "p" / "plans" / f"{name}.json")
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "p")
    assert "plan mine" in str(fd.accelerate(pipe, 6, guidance=1.0, quiet=True))
    for nfe, options in ((6, {}), (6, {"guidance": 2.0}), (5, {"guidance": 1.0}), (6, {"guidance": 1.0, "solver": "unipc-2"})):
        report = fd.accelerate(diffusers.DDPMPipeline.from_pretrained(tmp_path / "p"), nfe, quiet=True, **options)
        assert "solver" in str(report)


def test_nearer_to_the_converged_images_than_the_pipeline_s_own():
    """The network is random and smooth, so a better solver must show."""
    config = {**pipelines.SD_SCHEDULER, "clip_sample": False, "timestep_spacing": "trailing"}
    pipe = pipelines.sd(scheduler=diffusers.DDIMScheduler(**config))
    own = images(pipe, 6, guidance_scale=1.0)
    pipe.scheduler = fd.compat.DiffusersScheduler.from_config(pipe.scheduler.config, solver="unipc-3", grid="uniform_t")
    converged = images(pipe, 40, guidance_scale=1.0)
    fd.accelerate(pipe, 6, quiet=True)
    ours = images(pipe, 6, guidance_scale=1.0)
    assert (ours - converged).square().mean() < 0.5 * (own - converged).square().mean()


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        (lambda p: setattr(p, "scheduler", None), {}, "is no diffusion pipeline"),
        (lambda p: setattr(p, "unet", None), {}, "is no diffusion pipeline"),
        (lambda p: None, {"nfe": 0}, "at least 1"),
        (lambda p: None, {"solver": "heun"}, "15 calls in 8 steps"),
        (lambda p: None, {"plan": fd.plan("ddim", fd.schedule.flow(), 8)}, "for another schedule"),
    ],
    ids=["no scheduler", "no network", "nfe", "heun", "plan"],
)
def test_bad_input_changes_nothing(change, options, match):
    pipe = pipelines.sd()
    change(pipe)
    before = pipe.scheduler
    with pytest.raises(FastdiffError, match=match):
        fd.accelerate(pipe, **options)
    assert pipe.scheduler is before


def test_examples(tmp_path, capsys):
    folder = tmp_path / "pipeline"
    pipelines.ddpm().save_pretrained(folder)
    image = runpy.run_path(str(EXAMPLES / "accelerate_pipeline.py"))["main"](folder, nfe=4)
    assert image.size == (8, 8) and "ipndm-3" in capsys.readouterr().out
    made = runpy.run_path(str(EXAMPLES / "diffusers_scheduler.py"))["main"](folder)
    assert set(made) == {"solver", "class", "plan"} and {i.size for i in made.values()} == {(8, 8)}
