"""DDPM with learned variance: diffusers' learned_range step by step, under guidance, in files, and where there is none."""

import math

import numpy as np
import pytest
import torch
from analytic import BIMODAL
from diffusers import DDPMScheduler

import fastdiff as fd
from fastdiff.errors import FastdiffError, NonFiniteError
from fastdiff.export.table import compile_table

SHAPE = (2, 4)
TABLE = DDPMScheduler().alphas_cumprod.double()
SCHEDULE = fd.schedule.vp_from_alphas_cumprod(TABLE)


def two_outputs(x, t, shift=0.0):
    """eps of the mixture, and beside it a variance output in [-1, 1] that depends on the input and the time."""
    levels = [(float(SCHEDULE.alpha(v)), float(SCHEDULE.sigma(v))) for v in t.tolist()]
    alpha, sigma = (torch.tensor(v, dtype=x.dtype).view(-1, 1, 1) for v in zip(*levels, strict=True))
    eps = (x - alpha * BIMODAL.denoise_torch(x, alpha, sigma)) / sigma
    return torch.cat([eps, torch.tanh(x + t.to(x.dtype).view(-1, 1, 1) / 500 - 1 + shift)], dim=1)


def denoiser(network=two_outputs):
    return fd.Denoiser(network, SCHEDULE, "eps", shape=SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_it_is_diffusers_learned_range(steps, dtype):
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    plan = fd.plan("ddpm", SCHEDULE, grid=scheduler.timesteps.tolist(), steps=steps, variance="learned")
    noises = torch.randn(steps + 1, 3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    x = noises[0] * scheduler.init_noise_sigma
    # the noise of its last step is left out: it draws one there unless the last time is 0, and returns a noisy image
    for k, t in enumerate(scheduler.timesteps):
        x = step_of(scheduler, two_outputs(x, t.expand(3)), t, x, noises[k + 1] * (k + 1 < steps))
    ours = fd.sample(denoiser(), plan, fd.noise.recorded(list(noises)), start=noises[0], dtype=dtype)
    assert plan.draws == steps - 1
    # its tables are float32 whatever the state: 1e-5 in both; in one step eps, rounded to float32, is divided by alpha = 0.0064,
    # as is, in both, what rounding leaves of sigma = (1 - alpha^2)^0.5: up to 2^-25 for a noise of 1 (on one processor 1.2e-5)
    bound = 1e-4 if steps == 1 and dtype == torch.float32 else 1e-5
    if steps == 1:
        bound += 2**-25 / float(TABLE[-1].sqrt()) * float(noises[0].abs().max())
    torch.testing.assert_close(ours, x, rtol=0, atol=bound * max(1.0, float(x.abs().max())))


def step_of(scheduler, output, t, x, z):
    """One step of the scheduler with a given noise."""
    patch = pytest.MonkeyPatch()
    patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: z)
    try:
        return scheduler.step(output, t, x).prev_sample
    finally:
        patch.undo()


def test_the_factor_goes_from_the_small_to_the_large_variance():
    """v = -1 everywhere is variance="small", v = 1 "large", to rounding."""
    for v, name in ((-1.0, "small"), (1.0, "large")):
        den = denoiser(lambda x, t, v=v: torch.cat([two_outputs(x, t)[:, :2], torch.full_like(x, v)], dim=1))
        found, wanted = (fd.sample(den, fd.plan("ddpm", SCHEDULE, 12, variance=k), seeds=range(3), dtype=torch.float64)
                         for k in ("learned", name))  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_a_seed_is_itself_and_the_file_keeps_the_range(tmp_path):
    plan = fd.plan("ddpm", SCHEDULE, 6, variance="learned")
    assert plan.learned_variance and [row.var is not None for row in plan.rows] == [True] * 5 + [False]
    assert all(row.var[0] == 0.0 < row.var[1] for row in plan.rows[:-1])
    plan.save(tmp_path / "plan.json")
    assert fd.Plan.load(tmp_path / "plan.json") == plan
    whole = fd.sample(denoiser(), plan, seeds=range(4))
    assert torch.equal(fd.sample(denoiser(), plan, seeds=[2])[0], whole[2])


def test_guidance_takes_the_conditional_variance():
    plan = fd.plan("ddpm", SCHEDULE, 6, variance="learned")
    den = denoiser()
    guided = fd.guide.cfg(den, 3.0, {"shift": 0.5}, {"shift": -0.5})  # the shift moves the variance alone
    wanted = fd.sample(den.bind(shift=0.5), plan, seeds=range(2))
    torch.testing.assert_close(fd.sample(guided, plan, seeds=range(2)), wanted, rtol=0, atol=1e-5)
    none = fd.guide.cfg(den, 0.0, {"shift": 0.5}, {"shift": -0.5})
    assert torch.equal(fd.sample(none, plan, seeds=range(2)), fd.sample(den.bind(shift=-0.5), plan, seeds=range(2)))


def test_mistakes_are_named():
    plan = fd.plan("ddpm", SCHEDULE, 4, variance="learned")
    one = denoiser(lambda x, t: two_outputs(x, t)[:, :2])
    with pytest.raises(FastdiffError, match="twice the channels"):
        fd.sample(one, plan, seeds=[0])
    with pytest.raises(FastdiffError, match="needs learned variance: give an"):
        fd.sample(lambda x, t: x, plan, seeds=[0], noise=torch.zeros(1, *SHAPE))
    with pytest.raises(FastdiffError, match="an engine holds"):
        compile_table(plan)
    bad = denoiser(lambda x, t: two_outputs(x, t) * torch.tensor([1.0, math.nan])[:, None].repeat_interleave(2, 0))
    with pytest.raises(NonFiniteError, match="NaN or infinity at row 0"):
        fd.sample(bad, plan, seeds=[0])
    rows = (fd.Row(1.0, 0.6, 0.8, fd.Weights(0.0, (1.0,)), fd.Weights(1.0), var=(0.0, 1.0)),)
    with pytest.raises(FastdiffError, match="a network call and a drawn noise"):
        fd.Plan("wrong", rows, (0.6, 0.8), (1.0, 0.0))


def test_the_spread_lies_between_small_and_large():
    kinds = ("small", "large", "learned")
    small, large, learned = (np.array(fd.plan("ddpm", SCHEDULE, 9, variance=v).moments())[:, 1] for v in kinds)
    np.testing.assert_array_equal(learned, small)  # the table's own weights are the smallest
    assert (large[1:-1] > small[1:-1]).all()
