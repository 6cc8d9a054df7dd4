"""Whole text-to-image pipelines: prompts, guidance, solver and autoencoder against the library's own call, to 1e-5.

Stable Diffusion, with a prediction of eps, is in test_diffusers.py."""

import diffusers
import hub
import pytest
import torch

import fastdiff as fd

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside diffusers itself

PROMPTS, SCALE = ["a cat", "dog"], 3.0
STEPS = 4  # divides 1,000: else DDIMScheduler steps to times beside its own list
Z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def vae(**config):
    return hub.make("AutoencoderKL", **hub.KL, **config)


def ddim():
    """Predicting v: eps would multiply the rounding of the scheduler's float32 table by 1 / alpha, 15 at its last time."""
    how = {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    return diffusers.DDIMScheduler(**hub.VPS, **how)


def sdxl(**config):
    wide = {**hub.TEXT_UNET, **hub.XL, "cross_attention_dim": 32, "projection_class_embeddings_input_dim": 40}
    (text, tokenizer), (text_2, tokenizer_2) = hub.clip(), hub.clip("CLIPTextModelWithProjection")
    unet = hub.make("UNet2DConditionModel", **wide)
    return diffusers.StableDiffusionXLPipeline(vae(), text, text_2, tokenizer, tokenizer_2, unet, ddim(), **config)


def sd3(with_t5=True):
    net = hub.make("SD3Transformer2DModel", **{**hub.SD3, "joint_attention_dim": 32, "pooled_projection_dim": 32})
    (text, tokenizer), (text_2, tokenizer_2) = (hub.clip("CLIPTextModelWithProjection") for _ in range(2))
    text_3, tokenizer_3 = hub.t5(32) if with_t5 else (None, None)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(
        net, scheduler, vae(shift_factor=0.1), text, tokenizer, text_2, tokenizer_2, text_3, tokenizer_3
    )


def flux(guided=False):
    net = hub.make("FluxTransformer2DModel", **{**hub.FLUX, "pooled_projection_dim": 16}, guidance_embeds=guided)
    (text, tokenizer), (text_2, tokenizer_2) = hub.clip(), hub.t5()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.FluxPipeline(scheduler, vae(shift_factor=0.1), text, tokenizer, text_2, tokenizer_2, net)


def pixart(name="PixArtAlphaPipeline", **config):
    text, tokenizer = hub.t5(12)
    net = hub.make("PixArtTransformer2DModel", **{**hub.PIXART, **config})
    return getattr(diffusers, name)(tokenizer, text, vae(), net, ddim())


def theirs(pipe, z, **how):
    """(B, 3, 16, 16): the pipeline's own images of these latents."""
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": STEPS, "latents": z, "output_type": "pt", "height": 16, "width": 16, **how}
    return pipe(PROMPTS, **given).images


def mine(pipe, folder, z, scale=SCALE, shape=None):
    """The same by fastdiff from the pipeline's folder, at the times that its scheduler took; DDIM is Euler for a flow."""
    pipe.save_pretrained(folder)
    den = fd.load(folder, shape=shape)
    times = [float(t) for t in pipe.scheduler.timesteps]
    if den.prediction == "flow":
        times = [float(s) for s in pipe.scheduler.sigmas[:-1]]
    cond = den.encode(PROMPTS)
    guided = fd.guide.cfg(den, scale, cond=cond, negative=den.encode([""])) if scale != 1 else den.bind(**cond)
    return den.images(fd.sample(guided, fd.plan("ddim", den, grid=times, steps=STEPS), start=z))


def same(found, wanted):
    assert wanted[0].std() > 0.01 and (wanted[0] - wanted[1]).abs().max() > 0.01  # a picture, and the prompts matter
    assert (found - wanted).abs().max() < 1e-5


def agree(pipe, tmp_path, **how):
    wanted = theirs(pipe, Z, guidance_scale=SCALE, **how)
    same(mine(pipe, tmp_path / "p", Z), wanted)


def test_sdxl_with_an_empty_prompt_of_zeros(tmp_path):
    agree(sdxl(force_zeros_for_empty_prompt=True), tmp_path)


def test_sdxl_with_an_encoded_empty_prompt(tmp_path):
    agree(sdxl(force_zeros_for_empty_prompt=False), tmp_path)


@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3(with_t5, tmp_path):
    """Without its largest text encoder, as it is often run on small machines, T5's features are zeros."""
    agree(sd3(with_t5), tmp_path)


@pytest.mark.parametrize("name", ["PixArtAlphaPipeline", "PixArtSigmaPipeline"])
def test_pixart(name, tmp_path):
    agree(pixart(name), tmp_path, use_resolution_binning=False, clean_caption=False)


@pytest.mark.parametrize("guided", [False, True])
def test_flux(guided, tmp_path):
    """Guidance against the empty prompt ("true CFG" there); a distilled network is told its scale, 3.5 unless bound anew."""
    contrast = {} if guided else {"true_cfg_scale": SCALE, "negative_prompt": ["", ""]}
    pipe = flux(guided)
    wanted = theirs(pipe, pipe._pack_latents(Z, 2, 4, 8, 8), guidance_scale=3.5, **contrast)
    same(mine(pipe, tmp_path / "p", Z, 1.0 if guided else SCALE, shape=(4, 8, 8)), wanted)


@pytest.mark.parametrize("made", [sd3, sdxl], ids=["sd3", "sdxl"])
def test_the_command_draws_what_is_asked_for(made, fastdiff, tmp_path):
    made().save_pretrained(tmp_path / "p")
    for prompt in PROMPTS:
        asked = ("--prompt", prompt, "--guidance", 3, "--nfe", 2, "--seeds", 0, "--out", prompt)
        code, _, err = fastdiff("sample", tmp_path / "p", *asked)
        assert code == 0, err
    cat, dog = ((fastdiff.folder / prompt / "grid.png").read_bytes() for prompt in PROMPTS)
    assert cat != dog
