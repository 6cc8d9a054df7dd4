"""diffusers folders: our denoiser against the library's own classes, made at small size and saved by the library itself."""

import json
import re

import diffusers
import hub
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

import fastdiff as fd
from fastdiff.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside diffusers itself

TEXT = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
POOLED = torch.randn(2, 12, generator=torch.Generator().manual_seed(2))
CAPTION = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))
XL = {"text_embeds": POOLED, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
LABELS = {"class_labels": torch.tensor([0, 3])}

# class, its configuration, the conditions of a call
DISCRETE = {
    "UNet2DModel": (hub.UNET, {}),
    "UNet2DModel of classes": ({**hub.UNET, "num_class_embeds": 4}, LABELS),
    "UNet2DConditionModel": (hub.TEXT_UNET, {"encoder_hidden_states": TEXT}),
    "UNet2DConditionModel of SDXL": ({**hub.TEXT_UNET, **hub.XL}, {"encoder_hidden_states": TEXT, "added_cond_kwargs": XL}),
    "DiTTransformer2DModel": (hub.DIT, LABELS),
    "PixArtTransformer2DModel": (hub.PIXART, {"encoder_hidden_states": CAPTION, "added_cond_kwargs": {}}),
}
FLOWS = {
    "SD3Transformer2DModel": (hub.SD3, {"encoder_hidden_states": TEXT, "pooled_projections": POOLED}),
    "FluxTransformer2DModel": (hub.FLUX, {"encoder_hidden_states": TEXT, "pooled_projections": POOLED}),
}


def noisy(shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def close(found, wanted, scale=1e-5):
    assert (found.double() - wanted.double()).abs().max() <= scale * wanted.double().abs().max()


def expected(scheduler, x, t, f):
    """x0 by the formulas of the papers, from the scheduler's own table."""
    a = scheduler.alphas_cumprod[t].double()
    alpha, sigma = a.sqrt(), (1 - a).sqrt()
    kinds = {"epsilon": (x.double() - sigma * f) / alpha, "v_prediction": alpha * x.double() - sigma * f, "sample": f.double()}
    return kinds[scheduler.config.prediction_type]


@pytest.mark.parametrize("name", DISCRETE)
def test_a_model_folder_predicts_what_the_library_predicts(name, tmp_path):
    config, cond = DISCRETE[name]
    model = hub.make(name.split(" of ")[0], **config)
    scheduler = DDPMScheduler(**hub.VPS)
    den = fd.load(hub.save(tmp_path / "m", model, scheduler))
    shape = (config["in_channels"], 8, 8)
    assert den.shape == shape and den.prediction == "eps" and den.hash
    x = noisy(shape)
    for t in (3, 250, 700):
        with torch.no_grad():
            f = model(x, timestep=torch.tensor([t, t]), **cond, return_dict=False)[0][:, : shape[0]]
        close(den.bind(**cond)(x, float(t)), expected(scheduler, x, t, f))


def test_a_pipeline_that_was_trained(tmp_path):
    """A short training run of the library's own loss, saved by its pipeline: the loss falls, and what is loaded is the result."""
    model, scheduler = hub.unet().train().requires_grad_(True), DDPMScheduler(**hub.VPS)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    clean, losses = noisy((3, 8, 8)).sign(), []
    for _ in range(25):
        noise, t = torch.randn(2, 3, 8, 8, generator=generator), torch.randint(1000, (2,), generator=generator)
        loss = (model(scheduler.add_noise(clean, noise, t), t).sample - noise).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    den = fd.load(hub.ddpm(tmp_path / "p", model.eval(), **hub.VPS))
    x = noisy(den.shape, 1)
    with torch.no_grad():
        close(den(x, 400.0), expected(scheduler, x, 400, model(x, 400).sample))


def test_sd3_predicts_what_the_library_predicts(tmp_path):
    config, cond = FLOWS["SD3Transformer2DModel"]
    model = hub.make("SD3Transformer2DModel", **config)
    den = fd.load(hub.save(tmp_path / "m", model, FlowMatchEulerDiscreteScheduler(shift=3.0)))
    assert den.shape == (4, 8, 8) and den.prediction == "flow" and den.schedule == fd.schedule.flow(shift=3.0)
    x = noisy(den.shape)
    for t in (0.05, 0.5, 1.0):
        v = model(x, timestep=torch.full((2,), 1000 * t), **cond).sample
        close(den.bind(**cond)(x, t), x - t * v)


@pytest.mark.parametrize("guided", [False, True])
def test_flux_predicts_what_its_pipeline_asks_for(guided, tmp_path):
    """Packing and positions as FluxPipeline makes them."""
    config, cond = FLOWS["FluxTransformer2DModel"]
    model = hub.make("FluxTransformer2DModel", **config, guidance_embeds=guided)
    cond = {**cond, **({"guidance": torch.tensor([3.5, 3.5])} if guided else {})}
    pipe = diffusers.FluxPipeline
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    folder = hub.save(tmp_path / "m", model, scheduler)
    den = fd.load(folder, shape=(4, 8, 6))
    assert fd.load(folder).shape == (4, 128, 128)  # a pipeline's default, 1024 pixels
    x = noisy((4, 8, 6))
    own = {"img_ids": pipe._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32), "txt_ids": torch.zeros(5, 3)}
    v = model(pipe._pack_latents(x, 2, 4, 8, 6), timestep=torch.tensor([0.3, 0.3]), **cond, **own).sample
    close(den.bind(**cond)(x, 0.3), x - 0.3 * pipe._unpack_latents(v, 64, 48, 8))


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_dynamic_shift_is_the_schedulers(tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    from fastdiff.checkpoints.process import from_scheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.2], mu=calculate_shift(tokens))
    schedule = from_scheduler({**scheduler.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}, "here", tokens).schedule
    close(torch.tensor([schedule.time_of_uniform(u) for u in (1.0, 0.7, 0.2)]), scheduler.sigmas[:3], 1e-6)


BETAS = [
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"beta_schedule": "sigmoid", "num_train_timesteps": 200}),
    ("DDIMScheduler", hub.VPS),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {"trained_betas": [0.01, 0.02, 0.2]}),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}),
    *((f"{name}Scheduler", {}) for name in ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "HeunDiscrete",
      "KDPM2Discrete", "LMSDiscrete", "EulerAncestralDiscrete", "DPMSolverSinglestep", "LCM", "TCD", "SASolver")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config"), BETAS)
def test_betas_prediction_and_terminal_snr_are_the_schedulers(name, config, tmp_path):
    from fastdiff.checkpoints.process import from_scheduler

    scheduler = getattr(diffusers, name)(**config)
    scheduler.save_pretrained(tmp_path)
    process = from_scheduler(json.loads((tmp_path / "scheduler_config.json").read_text()), tmp_path)
    t = torch.arange(len(scheduler.alphas_cumprod), dtype=torch.float64)
    found, table = process.schedule.alpha(t) ** 2, scheduler.alphas_cumprod.double()
    # the library's table is a float32 product of up to 1,000 factors
    assert ((found - table).abs() <= 2e-5 * table + 1e-8).all(), (found - table).abs().max()
    kinds = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    assert process.prediction == kinds[scheduler.config.prediction_type] and process.time is None


@pytest.mark.parametrize(("theirs", "ours"), [("fixed_small", "small"), ("fixed_large", "large"), ("learned_range", "learned")])
def test_the_variance_type_is_ddpms(theirs, ours, tmp_path):
    """What ddpm does with it is held against diffusers in tests/solvers/test_ddpm.py."""
    scheduler = DDPMScheduler(**hub.VPS, variance_type=theirs)
    den = fd.load(hub.save(tmp_path / "m", hub.make("DiTTransformer2DModel", **hub.DIT), scheduler)).bind(**LABELS)
    plan = fd.plan("ddpm", den, nfe=3, variance=den.info["variance"])
    assert den.info["variance"] == ours and plan.learned_variance == (ours == "learned")
    assert fd.sample(den, plan, seeds=[0, 1]).isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_edm_scheduler_preconditions_as_ours(prediction, tmp_path):
    model = hub.unet()
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7, prediction_type=prediction)
    den = fd.load(hub.save(tmp_path / "m", model, scheduler))
    assert den.schedule == fd.schedule.edm(sigma_min=0.002, sigma_max=80.0, sigma_data=0.7)
    x = noisy(den.shape)
    for sigma in (0.01, 1.3, 60.0):
        c_noise = scheduler.precondition_noise(torch.tensor(sigma))
        f = model(scheduler.precondition_inputs(x, sigma), c_noise.expand(2)).sample
        close(den(x, sigma), scheduler.precondition_outputs(x, f, sigma))


def test_a_score_of_ve_with_a_fourier_embedding(tmp_path):
    """NCSN++ of Song et al.: the network divides by sigma itself and returns the score."""
    model = hub.unet(time_embedding_type="fourier")
    den = fd.load(hub.save(tmp_path / "m", model, diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)))
    x = noisy(den.shape)
    close(den(x, 2.0), x + 4.0 * model(x, torch.full((2,), 2.0)).sample)


def test_flow_sigmas_of_a_discrete_scheduler(tmp_path):
    model = hub.unet()
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    den = fd.load(hub.save(tmp_path / "m", model, scheduler))
    assert den.schedule == fd.schedule.flow(shift=5.0) and den.prediction == "flow"
    x = noisy(den.shape)
    close(den(x, 0.4), x - 0.4 * model(x, torch.full((2,), 400.0)).sample)


def text_unet_pipeline(folder, vae):
    """What a StableDiffusionPipeline saves, without its text encoder."""
    unet = hub.make("UNet2DConditionModel", **hub.TEXT_UNET)
    pipe = diffusers.StableDiffusionPipeline(
        vae, None, None, unet, diffusers.PNDMScheduler(skip_prk_steps=True, **hub.VPS), None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
    return unet


def test_the_autoencoder_of_a_pipeline_decodes(tmp_path):
    vae = hub.make("AutoencoderKL", **hub.KL, scaling_factor=0.3, shift_factor=0.1)
    text_unet_pipeline(tmp_path / "p", vae)
    den = fd.load(tmp_path / "p")
    z = noisy((4, 8, 8))
    close(den.images(z), (vae.decode(z / 0.3 + 0.1).sample / 2 + 0.5).clamp(0, 1))
    x = fd.sample(den.bind(encoder_hidden_states=TEXT), fd.plan("unipc-2", den, nfe=4), seeds=[0, 1])
    assert x.shape == (2, 4, 8, 8) and den.images(x).shape == (2, 3, 16, 16)


def test_a_vq_autoencoder_decodes(tmp_path):
    """LDMPipeline: unconditional, VQ-regularised latents."""
    vq, unet = hub.make("VQModel", **hub.VQ), hub.unet()
    diffusers.LDMPipeline(vq, unet, diffusers.DDIMScheduler(**hub.VPS)).save_pretrained(tmp_path / "p")
    den = fd.load(tmp_path / "p")
    z = noisy((3, 8, 8))
    close(den.images(z), (vq.decode(z / vq.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("name", ["UNet2DModel", "DiTTransformer2DModel"])
def test_ddim_of_a_pipeline_from_the_same_noise(name, tmp_path):
    """Ours is the library's own sampler, trailing times, to float32 rounding: schedule, prediction, shape and decoder at once."""
    scheduler = diffusers.DDIMScheduler(**hub.VPS, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    model = hub.make(name, **(hub.UNET if name == "UNet2DModel" else {**hub.DIT, "out_channels": 4}))
    cond = {} if name == "UNet2DModel" else LABELS
    den = fd.load(hub.save(tmp_path / "m", model, scheduler)).bind(**cond)
    start = noisy(den.shape)
    plan = fd.plan("ddim", den, nfe=5, grid="uniform_t", grid_options={"spacing": "trailing"})
    x = start.double()
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        f = model(x.float(), timestep=t.expand(2), **cond, return_dict=False)[0]
        x = scheduler.step(f.double(), t, x).prev_sample
    close(fd.sample(den, plan, start=start), x, 1e-4)


def test_sharded_half_and_pickled_weights(tmp_path):
    model, scheduler = hub.unet(), DDPMScheduler()
    whole = fd.load(hub.save(tmp_path / "whole", model, scheduler))
    sharded = hub.save(tmp_path / "sharded", model, scheduler, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    pickled = hub.save(tmp_path / "pickled", model, scheduler, safe_serialization=False)
    half = hub.save(tmp_path / "half", hub.unet().half(), scheduler, variant="fp16")
    x = noisy(whole.shape)
    assert torch.equal(fd.load(sharded)(x, 9.0), whole(x, 9.0)) and torch.equal(fd.load(pickled)(x, 9.0), whole(x, 9.0))
    close(fd.load(half)(x, 9.0), whole(x, 9.0), 1e-2)
    assert fd.load(half).dtype == torch.float32 and fd.load(half, dtype=None).dtype == torch.float16
    assert len({fd.load(path).hash for path in (tmp_path / "whole", sharded, pickled)}) == 3


def test_names_of_old_attention(tmp_path):
    """Folders of before diffusers 0.12 call to_q `query` and to_out.0 `proj_attn`; the library itself converts them."""
    from safetensors.torch import load_file, save_file

    folder = hub.save(tmp_path / "m", hub.unet(), DDPMScheduler())
    x = noisy((3, 8, 8))
    wanted = fd.load(folder)(x, 9.0)
    file = folder / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile("|".join(map(re.escape, old)))
    weights = {pattern.sub(lambda m: old[m[0]], name): value for name, value in load_file(file).items()}
    assert any("proj_attn" in name for name in weights)
    save_file(weights, file)
    theirs = diffusers.UNet2DModel.from_pretrained(folder)
    close(fd.load(folder)(x, 9.0), wanted, 1e-6)
    close(fd.load(folder).network(x, torch.full((2,), 9.0)), theirs(x, 9.0).sample)


def test_the_legacy_class_of_dit(tmp_path):
    folder = hub.save(tmp_path / "m", hub.make("DiTTransformer2DModel", **hub.DIT), DDPMScheduler())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel", "num_vector_embeds": None}))
    den = fd.load(folder)
    assert den.network.null_label == 5 and den.bind(**LABELS)(noisy(den.shape), 5.0).shape == (2, 4, 8, 8)


def test_guidance_by_dits_null_class(tmp_path):
    den = fd.load(hub.save(tmp_path / "m", hub.make("DiTTransformer2DModel", **hub.DIT), DDPMScheduler())).bind(**LABELS)
    x, null = noisy(den.shape), den.bind(class_labels=torch.tensor([5, 5]))
    close(fd.guide.cfg(den, 3.0)(x, 400.0), null(x, 400.0) + 3 * (den(x, 400.0) - null(x, 400.0)))


def test_the_scheduler_may_lie_beside_the_model(tmp_path):
    pipe = hub.ddpm(tmp_path / "p", prediction_type="v_prediction")
    assert fd.load(pipe / "unet").prediction == "v"
    for path in (pipe / "scheduler").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        fd.load(pipe / "unet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"in_channels": 9, "out_channels": 4}, "inpainting"),
        ({"num_class_embeds": 4}, "class_labels"),
    ],
)
def test_networks_that_need_more_say_so(change, words, tmp_path):
    folder = hub.save(tmp_path / "m", hub.unet(**change), DDPMScheduler())
    with pytest.raises(fd.errors.FastdiffError, match=words):
        fd.load(folder)(noisy((3, 8, 8)), 5.0)




def test_a_whole_text_to_image_pipeline_gives_the_librarys_images(tmp_path):
    """Prompts, guidance against the empty prompt, DDIM, the autoencoder: every part against StableDiffusionPipeline's call."""
    text, tokenizer = hub.clip()
    vae, unet = hub.make("AutoencoderKL", **hub.KL), hub.make("UNet2DConditionModel", **hub.TEXT_UNET)
    scheduler = diffusers.DDIMScheduler(**hub.VPS, clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(tmp_path / "p")
    prompts, z = ["a cat", "dog"], noisy((4, 8, 8))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompts, num_inference_steps=4, guidance_scale=3.0, latents=z, output_type="pt", height=16, width=16).images

    den = fd.load(tmp_path / "p")
    guided = fd.guide.cfg(den, 3.0, cond=den.encode(prompts), negative=den.encode([""]))
    plan = fd.plan("ddim", den, nfe=4, grid="uniform_t", grid_options={"spacing": "trailing"})
    mine = den.images(fd.sample(guided, plan, start=z))
    assert not torch.allclose(mine[0], mine[1]) and (mine - theirs).abs().max() < 1e-4
