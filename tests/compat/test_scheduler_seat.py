"""The scheduler seat inside real diffusers pipelines: the class's own images, our solvers' tables row by row, and bad input."""

import copy
import threading

import diffusers
import pipelines
import pytest
import torch
from analytic import BIMODAL
from pipelines import generators, images

import fastdiff as fd
from fastdiff.compat.diffusers_classes import CLASSES
from fastdiff.errors import FastdiffError

Seat = fd.compat.DiffusersScheduler
ALIKE = 1e-4  # images in [0, 1]
PIPELINES = {
    "ddpm": pipelines.ddpm, "sd": pipelines.sd, "sdxl": pipelines.sdxl, "sd3": pipelines.sd3, "flux": pipelines.flux,
    "inpaint": lambda: pipelines.sd(diffusers.StableDiffusionInpaintPipeline),
    "img2img": lambda: pipelines.sd(
        diffusers.StableDiffusionImg2ImgPipeline, diffusers.DDIMScheduler(clip_sample=False, **pipelines.SD_SCHEDULER)
    ),
}  # fmt: skip
SD_CONFIG = pipelines.sd_scheduler().config
APART = ("EDM", "FlowMatch", "CM", "DPMSolverSDE")  # in test_scheduler_classes: another model, or noise of its own
VP_CLASSES = [name for name in CLASSES if not name.startswith(APART)]
TWINS = ("DDIMParallelScheduler", "DDPMParallelScheduler", "CogVideoXDDIMScheduler")  # of others: in a pipeline only when slow


def both(make, steps, config=None, solver=None, changes=None, **more):
    """Images with diffusers' own scheduler and with ours in its place."""
    theirs, ours = make(), make()
    config = config or theirs.scheduler.config
    if solver:
        theirs.scheduler = getattr(diffusers, solver).from_config(config, **(changes or {}))
    ours.scheduler = Seat.from_config(config, solver=solver, **(changes or {}))
    return images(theirs, steps, **more), images(ours, steps, **more)


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
@pytest.mark.parametrize("steps", [3, 6])
def test_a_pipeline_s_own_class(make, steps):
    theirs, ours = both(make, steps)
    assert theirs.std() > 0.05  # pictures, not one grey
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ALIKE)


@pytest.mark.parametrize("solver", [pytest.param(n, marks=pytest.mark.slow) if n in TWINS else n for n in VP_CLASSES])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_class_name_is_that_class(solver, steps):
    theirs, ours = both(pipelines.sd, steps, SD_CONFIG, solver)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ALIKE)


@pytest.mark.slow
@pytest.mark.parametrize("solver", VP_CLASSES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_class_name_is_that_class_at_more_steps(solver, spacing):
    changes = {"timestep_spacing": spacing} if "timestep_spacing" in dir(getattr(diffusers, solver)().config) else {}
    if solver in ("DDIMScheduler", "DDIMParallelScheduler"):
        changes["clip_sample"] = False  # with it the class itself turns 1e-6 in these latents into 3e-3 in 20 steps
    theirs, ours = both(pipelines.sd, 20, SD_CONFIG, solver, changes)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ALIKE)


@pytest.mark.parametrize(
    ("solver", "changes"),
    [
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "prediction_type": "v_prediction"}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.0, "timestep_spacing": "trailing"}),
        ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False, "steps_offset": 0}),
        ("PNDMScheduler", {"skip_prk_steps": False, "steps_offset": 0}),
    ],
    ids=str,
)
def test_entries_of_the_config(solver, changes):
    theirs, ours = both(pipelines.sd, 5, SD_CONFIG, solver, changes)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ALIKE)


@pytest.mark.parametrize("solver", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
                                    "UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler"])  # fmt: skip
@pytest.mark.parametrize("cls", [diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline])
def test_strength(cls, solver):
    theirs, ours = both(lambda: pipelines.sd(cls), 6, SD_CONFIG, solver, strength=0.7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ALIKE)


@pytest.mark.parametrize(
    ("solver", "given"),
    [("DPMSolverMultistepScheduler", {"timesteps": [951, 700, 400, 120]}),
     ("EulerDiscreteScheduler", {"sigmas": [14.0, 5.0, 2.0, 0.5, 0.0]})],
    ids=str,
)  # fmt: skip
def test_custom_levels(solver, given):
    theirs, ours = both(pipelines.sd, 4, SD_CONFIG, solver, **given)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ALIKE)
    named = pipelines.sd()
    named.scheduler = Seat.from_config(SD_CONFIG, solver={"D": "dpmpp-2m", "E": "euler"}[solver[0]])
    assert (images(named, 4, **given) - theirs).abs().max() < 2e-2  # ours starts at the level itself, Euler at hypot(sigma, 1)


def drive(scheduler, steps, start, generator=None, dtype=torch.float64):
    """A pipeline's loop around a mixture's exact eps in float64."""
    scheduler.set_timesteps(steps)
    schedule = scheduler.run.prepared.schedule
    x, asked = start * scheduler.init_noise_sigma, []
    for t, (alpha, sigma) in zip(scheduler.timesteps, scheduler.run.levels, strict=True):
        asked.append(float(t))
        y = x.double()
        eps = (y - alpha * BIMODAL.denoise_torch(y, alpha, sigma)) / sigma
        x = scheduler.step(eps.to(dtype), t, x, generator, return_dict=False)[0]
    return x, asked, schedule


@pytest.mark.parametrize(
    "solver", ["ddim", "unipc-3", "dpmpp-3m", "heun", "dpm-2", "rk4", "dpmpp-3s", "lms-4", "plms", "pndm", "deis-tab-3",
               "dpmpp-sde", "sa-solver", "sa-solver-pece", "er-sde-3", "restart", "euler-ancestral", "dpm-fast"],
)  # fmt: skip
def test_every_row_is_one_step(solver):
    start = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler = Seat.from_config(SD_CONFIG, solver=solver)
    x, asked, schedule = drive(scheduler, 5, start, generators(3))
    plan = scheduler.run.prepared.plan
    assert plan == fd.plan(solver, schedule, steps=5)
    # times reach a network as float32 there, levels stay float64
    assert asked == pytest.approx([row.t for row in plan.rows], rel=1e-6, abs=1e-4)
    levels = {row.t: (row.alpha, row.sigma) for row in plan.rows}
    want = fd.sample(
        lambda y, t: BIMODAL.denoise_torch(y, *levels[t]), plan, fd.noise.from_torch(generators(3)), start=start * plan.start[1],
        dtype=torch.float64,
    )
    torch.testing.assert_close(x, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_is_wider_than_the_pipeline(dtype):
    """Samples cast at every step, the state not: the error stays that of one rounding, also where the loop changes a sample."""
    start = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    scheduler = Seat.from_config(SD_CONFIG, solver="ddim")
    scheduler.set_timesteps(20)
    exact = start.double() * scheduler.init_noise_sigma
    x = start * scheduler.init_noise_sigma
    exact = x.double()
    levels = [*scheduler.run.levels, scheduler.run.prepared.plan.end]
    for i, t in enumerate(scheduler.timesteps):
        zero = torch.zeros_like(x)  # eps = 0: x only scales by alpha
        x = scheduler.step(zero, t, x).prev_sample
        exact = exact * (levels[i + 1][0] / levels[i][0])
        if i == 10:
            x = x * 0.5
            exact = x.double()
    assert x.dtype == dtype
    assert ((x.double() - exact) / exact).abs().max() < 1.1 * torch.finfo(dtype).eps


def test_learned_variance():
    """Twice the channels: the noise of each element by the network's second half, as DDPMScheduler takes it."""
    config = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False).config
    theirs, ours = diffusers.DDPMScheduler.from_config(config), Seat.from_config(config)
    ends = []
    for scheduler in (theirs, ours):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 3, 4, 4, generator=generator)
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            out = torch.cat([0.8 * x, torch.sin(3 * x)], dim=1)
            x = scheduler.step(out, t, x, generator=generator).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)
    ours.set_timesteps(6)
    with pytest.raises(FastdiffError, match="needs learned variance"):
        ours.step(x, ours.timesteps[0], x)


SHARED = pytest.mark.parametrize(
    "name", ["sd", "sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddpm", "sdxl", "flux", "inpaint"))]
)


@SHARED
def test_twice_and_with_any_batch(name):
    """Per-sample generators, which flow pipelines do not hand to the step."""
    pipe = PIPELINES[name]()
    solver = "dpmpp-2m" if name in ("sd3", "flux") else "dpmpp-2m-sde"
    pipe.scheduler = Seat.from_config(pipe.scheduler.config, solver=solver)
    four = images(pipe, 5, 4)
    assert (four[0] - four[1]).abs().max() > 0.05
    torch.testing.assert_close(images(pipe, 5, 4), four, rtol=0, atol=0)
    near = 1e-5 if name == "sd" else ALIKE  # a network's own rounding differs with its batch
    torch.testing.assert_close(images(pipe, 5, 1), four[:1], rtol=0, atol=near)
    torch.testing.assert_close(images(copy.deepcopy(pipe), 5, 4), four, rtol=0, atol=0)


@SHARED
def test_two_threads_share_a_pipeline(name):
    pipe = PIPELINES[name]()
    pipe.scheduler = Seat.from_config(pipe.scheduler.config, solver="unipc-2")
    wanted = {steps: images(pipe, steps) for steps in (9, 14)}
    seen, barrier = {}, threading.Barrier(2)

    def work(steps):
        with torch.no_grad():
            barrier.wait()
            seen[steps] = images(pipe, steps)

    threads = [threading.Thread(target=work, args=(steps,)) for steps in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for steps, want in wanted.items():
        torch.testing.assert_close(seen[steps], want, rtol=0, atol=1e-6)


def test_a_plan_in_the_seat():
    pipe = pipelines.sd()
    schedule = Seat.from_config(SD_CONFIG).seat.schedule()
    pipe.scheduler = Seat.from_config(SD_CONFIG, solver="unipc-2", grid="karras")
    want = images(pipe, 6)
    pipe.scheduler = Seat.from_config(SD_CONFIG, plan=fd.plan("unipc-2", schedule, 6, grid="karras"))
    torch.testing.assert_close(images(pipe, 6), want, rtol=0, atol=1e-6)
    with pytest.raises(FastdiffError, match="takes 6 calls"):
        images(pipe, 7)
    pipe.scheduler = Seat.from_config(SD_CONFIG, plan=fd.plan("unipc-2", fd.schedule.flow(), 6))
    with pytest.raises(FastdiffError, match="is for another schedule"):
        images(pipe, 6)


def test_flow_pipelines_take_our_solvers_and_shifts():
    for make in (pipelines.sd3, pipelines.flux):
        pipe = make()
        pipe.scheduler = Seat.from_config(pipe.scheduler.config, solver="dpmpp-2m", grid="uniform_t")
        fine = images(pipe, 40)
        theirs = images(make(), 40)
        assert (fine - theirs).abs().mean() < 0.02  # one ODE, two solvers
        assert (images(pipe, 8) - fine).abs().mean() < 0.05


@pytest.mark.parametrize(
    "options",
    [{"solver": "unipc-3", "grid": "karras", "grid_options": {"rho": 5.0}}, {"solver": "ddim", "eta": 0.5},
     {"solver": "HeunDiscreteScheduler", "use_karras_sigmas": True}],
    ids=str,
)  # fmt: skip
def test_saved_and_loaded(options, tmp_path):
    pipe = pipelines.sd()
    pipe.scheduler = Seat.from_config(SD_CONFIG, **options)
    want = images(pipe, 5)
    pipe.scheduler.save_pretrained(tmp_path / "s")
    pipe.scheduler = Seat.from_pretrained(tmp_path / "s")
    torch.testing.assert_close(images(pipe, 5), want, rtol=0, atol=0)


def test_back_to_a_class_of_diffusers():
    ours = Seat.from_config(SD_CONFIG, solver="unipc-2").config
    back, own = (diffusers.EulerDiscreteScheduler.from_config(c) for c in (ours, SD_CONFIG))
    for scheduler in (back, own):
        scheduler.set_timesteps(7)
    assert back.timesteps.tolist() == own.timesteps.tolist() and back.sigmas.tolist() == own.sigmas.tolist()


@pytest.mark.parametrize("solver", ["DDIMScheduler", "TCDScheduler"])
def test_eta_of_the_pipeline_s_call(solver):
    theirs, ours = both(pipelines.sd, 4, SD_CONFIG, solver, eta=0.4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ALIKE)
    pipe = pipelines.sd()
    pipe.scheduler = Seat.from_config(SD_CONFIG, solver="unipc-2")
    with pytest.raises(FastdiffError, match="was given to the pipeline"):
        images(pipe, 4, eta=0.4)


def test_a_saved_plan_comes_back(tmp_path):
    plan = fd.plan("dpmpp-2m", Seat.from_config(SD_CONFIG).seat.schedule(), 4)
    Seat.from_config(SD_CONFIG, plan=plan).save_pretrained(tmp_path)
    assert Seat.from_pretrained(tmp_path).seat.plan == plan


def test_noise_is_added_at_the_level_of_the_call():
    scheduler = Seat.from_config(SD_CONFIG, solver="EulerDiscreteScheduler")  # fractional times, levels of its own
    scheduler.set_timesteps(7)
    x, noise = torch.randn(2, 3, 4, 4, 4).unbind(0)
    for t, (alpha, sigma) in zip(scheduler.timesteps, scheduler.run.levels, strict=True):
        got = scheduler.add_noise(x, noise, t.repeat(3))
        torch.testing.assert_close(got, alpha * x + sigma * noise, rtol=1e-5, atol=1e-5)
    elsewhere = scheduler.add_noise(x, noise, torch.tensor([500]))
    a = scheduler.alphas_cumprod[500]
    torch.testing.assert_close(elsewhere, a.sqrt() * x + (1 - a).sqrt() * noise, rtol=1e-5, atol=1e-5)


def test_a_wrong_timestep_is_named():
    scheduler = Seat.from_config(SD_CONFIG, solver="ddim")
    x = torch.randn(1, 4, 4, 4)
    with pytest.raises(FastdiffError, match="call set_timesteps first"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(4)
    with pytest.raises(FastdiffError, match="timestep 749 was given where call 0 of 4 is at 999"):
        scheduler.step(x, scheduler.timesteps[1], x)
    for t in scheduler.timesteps.tolist():  # numbers do as well
        scheduler.step(x, t, x)
    scheduler.step(x, scheduler.timesteps[0], x)  # and a finished run begins again
    assert scheduler.step_index == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"solver": "unipc-9"}, "unknown solver"), ({"solver": "unipc-2", "eta": 1.0}, "unknown option eta"),
        ({"solver": "unipc-2", "grid": "karas"}, "unknown grid"),
        ({"solver": "ddim", "prediction_type": "noise"}, "prediction_type 'noise'"),
        ({"solver": "DDPMScheduler", "variance_type": "learned"}, "has no equal here"),
        ({"solver": "DPMSolverMultistepScheduler", "euler_at_final": True}, "has no equal here"),
        ({"solver": "UnCLIPScheduler"}, "UnCLIPScheduler is not reproduced"),
        ({"solver": "unipc-2", "plan": fd.plan("ddim", fd.schedule.vp_linear(), 3)}, "give plan= alone"),
        ({"solver": "euler", "s_churn": 10.0, "grid": [800, 600, 400, 200, 50]}, "noise before its first call"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(options, match):
    with pytest.raises(FastdiffError, match=match):
        Seat.from_config(SD_CONFIG, **options).set_timesteps(5)


def test_bad_runs():
    for wrong, match in (({}, "entries are no class's: none"), ({"width": 3}, "entries are no class's: width"),
                         ({"sample_rate": 16000, "_class_name": "CosineDPMSolverMultistepScheduler"}, "torchsde|no noise"),
                         ({"_class_name": "AmusedScheduler"}, "AmusedScheduler cannot be made from this config: .*mask_token_id"),
                         ({"_class_name": "ScoreSdeVeScheduler"}, "describes no noise schedule"),
                         ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": 1, "use_beta_sigmas": 1}, "Only one"),
                         ({"_class_name": "UNet2DModel", "sample_size": 8}, "no scheduler class 'UNet2DModel'")):  # fmt: skip
        with pytest.raises(FastdiffError, match=match):
            Seat.from_config(wrong, solver="ddim").set_timesteps(5)
    pipe = pipelines.sd(diffusers.StableDiffusionImg2ImgPipeline)
    pipe.scheduler = Seat.from_config(SD_CONFIG, solver="unipc-2")
    with pytest.raises(FastdiffError, match="leaves no steps"):
        images(pipe, 5, strength=0.1)
    pipe.scheduler = Seat.from_config(SD_CONFIG, solver="plms")
    with pytest.raises(FastdiffError, match="cannot begin at call"):
        images(pipe, 5, strength=0.5)
    scheduler = Seat.from_config(SD_CONFIG, solver="unipc-2", grid="karras")
    for given, match in (({"timesteps": [900, 500]}, "leave one out"), ({"sigmas": [9.0, 1.0]}, "leave one out"),
                         ({"num_inference_steps": 0}, "at least 1"), ({}, "at least 1")):  # fmt: skip
        with pytest.raises(FastdiffError, match=match):
            scheduler.set_timesteps(**given)
    with pytest.raises(FastdiffError, match="strictly from noise to data"):
        Seat.from_config(SD_CONFIG, solver="ddim").set_timesteps(timesteps=[100, 500])


def test_a_whole_pipeline_is_saved_and_loaded(tmp_path):
    pipe = pipelines.ddpm()
    pipe.scheduler = Seat.from_config(pipe.scheduler.config, solver="unipc-2")
    want = images(pipe, 4)
    pipe.save_pretrained(tmp_path)
    loaded = pipelines.quiet(diffusers.DDPMPipeline.from_pretrained(tmp_path))
    assert isinstance(loaded.scheduler, Seat)
    torch.testing.assert_close(images(loaded, 4), want, rtol=0, atol=1e-6)
