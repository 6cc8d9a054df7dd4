"""`fastdiff train --from`: networks of other libraries go on learning, and stay what they were."""

import json
import math

import diffusers
import hub
import numpy as np
import pytest
import torch
from checkpoints import test_edm, test_kdiffusion_models, test_ldm
from checkpoints.test_conditions import FLOW, POOLED, TEXT, XL, written
from safetensors.torch import load_file, save_file

import fastdiff as fd
from fastdiff.checkpoints.conditions import read_conditions
from fastdiff.denoiser import rows_of
from fastdiff.errors import FastdiffError
from fastdiff.parallel import World
from fastdiff.prediction import coefficients
from fastdiff.training.config import TrainConfig, continuing
from fastdiff.training.data import load_images
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside diffusers itself

DDPM = diffusers.DDPMScheduler(**hub.VPS, prediction_type="v_prediction")
COUNT = 6


def pixels(path, **more):
    np.savez(path, x=np.random.default_rng(0).integers(0, 255, (COUNT, 8, 8, 3), dtype=np.uint8), **more)
    return path


def flat_pixels(path, **more):
    """As `latents`."""
    flat = np.random.default_rng(0).integers(0, 255, (COUNT, 1, 1, 3), dtype=np.uint8)
    np.savez(path, x=flat.repeat(8, 1).repeat(8, 2), **more)
    return path


def latents(path, **more):
    """Flat ones: there is something to learn in few steps."""
    flat = np.random.default_rng(0).standard_normal((COUNT, 4, 1, 1), np.float32)
    np.savez(path, latents=flat.repeat(8, 2).repeat(8, 3), **more)
    return path


def pipeline(folder):
    return hub.ddpm(folder / "p", **hub.VPS), pixels(folder / "x.npz"), None, {}


def classes(folder):
    source = hub.save(folder / "m", hub.unet(num_class_embeds=4), DDPM)
    return source, pixels(folder / "x.npz", y=np.arange(COUNT) % 4), None, {"label_dropout": 0.0}


def text_unet(folder):
    """A row an image, a third of them dropped to the negative one."""
    written(folder / "c.safetensors", COUNT, TEXT)
    source = hub.save(folder / "m", hub.make("UNet2DConditionModel", **hub.TEXT_UNET), DDPM)
    return source, latents(folder / "z.npz"), folder / "c.safetensors", {"label_dropout": 0.3}


def dit(folder):
    source = hub.save(folder / "m", hub.make("DiTTransformer2DModel", **{**hub.DIT, "out_channels": 4}), DDPM)
    return source, latents(folder / "z.npz", y=np.arange(COUNT) % 5), None, {"label_dropout": 0.3}


def dit_as_published(folder):
    """It learned the variance of its steps, of which its scheduler's configuration says nothing."""
    source = hub.save(folder / "m", hub.make("DiTTransformer2DModel", **hub.DIT), diffusers.DDIMScheduler())
    return source, latents(folder / "z.npz", y=np.arange(COUNT) % 5), None, {"label_dropout": 0.3, "vlb": 0.05}


def pixart_as_published(folder):
    written(folder / "c.safetensors", COUNT, {"encoder_hidden_states": (5, 12)})
    scheduler = diffusers.DDPMScheduler(**hub.VPS, variance_type="learned_range")
    source = hub.save(folder / "m", hub.make("PixArtTransformer2DModel", **hub.PIXART), scheduler)
    return source, latents(folder / "z.npz"), folder / "c.safetensors", {"label_dropout": 0.3, "vlb": 0.05, "vlb_steps": 500}


def edm_of_iddpm(folder):
    data = pixels(folder / "x.npz", y=np.arange(COUNT) % 5)
    return test_edm.iddpm(folder)[0], data, None, {"label_dropout": 0.0, "vlb": 0.05}


def sd3(folder):
    written(folder / "c.safetensors", 1, {**TEXT, **POOLED})
    source = hub.save(folder / "m", hub.make("SD3Transformer2DModel", **hub.SD3), FLOW)
    return source, latents(folder / "z.npz"), folder / "c.safetensors", {"label_dropout": 0.0}


def flux(folder):
    """Its schedule depends on the size of a sample, which its configuration does not say."""
    written(folder / "c.safetensors", COUNT, {**TEXT, **POOLED})
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    source = hub.save(folder / "m", hub.make("FluxTransformer2DModel", **hub.FLUX), scheduler)
    return source, latents(folder / "z.npz"), folder / "c.safetensors", {"label_dropout": 0.3}


def edm(folder):
    return test_edm.saved(folder, "ddpm++"), pixels(folder / "x.npz"), None, {"times": "lognormal"}


def edm_of_ve(folder):
    """The network's sign is turned and its time a logarithm; the file says so in its metadata."""
    path = test_edm.saved(folder, "ncsn++")
    save_file(load_file(path), path, metadata={"class_name": "VEPrecond"})
    return path, pixels(folder / "x.npz"), None, {"times": "lognormal", "weighting": "edm"}


def stable_diffusion(folder):
    written(folder / "c.safetensors", COUNT, TEXT)
    _, path = test_ldm.written(folder, "v1", hub.make("AutoencoderKL", **test_ldm.KL))
    return path, latents(folder / "z.npz"), folder / "c.safetensors", {"label_dropout": 0.3}


def stable_diffusion_2(folder):
    """A pickle, and what it predicts is said beside it."""
    written(folder / "c.safetensors", 1, TEXT)
    _, path = test_ldm.written(folder, "v2", hub.make("AutoencoderKL", **test_ldm.KL), ".ckpt", prediction="v")
    return path, latents(folder / "z.npz"), folder / "c.safetensors", {"label_dropout": 0.0}


def sdxl_file(folder):
    """Conditions in a mapping."""
    written(folder / "c.safetensors", COUNT, {**TEXT, **XL})
    _, path = test_ldm.written(folder, "sdxl", hub.make("AutoencoderKL", **test_ldm.KL))
    return path, latents(folder / "z.npz"), folder / "c.safetensors", {"label_dropout": 0.3}


def of_k_diffusion(folder, kind, form):
    if not test_kdiffusion_models.HERE:
        pytest.skip("k-diffusion is not installed (see tests/checkpoints/test_kdiffusion_models.py)")
    config = test_kdiffusion_models.CONFIGS[kind]
    return test_kdiffusion_models.saved(folder, test_kdiffusion_models.made(config)[0], config, form)


def kdiffusion_unet(folder):
    return of_k_diffusion(folder, "U-Net", ".safetensors"), flat_pixels(folder / "x.npz"), None, {"times": "lognormal"}


def kdiffusion_classes(folder):
    """Of a .pth, whose averaged weights are gone on from."""
    data = flat_pixels(folder / "x.npz", y=np.arange(COUNT) % 4)
    return of_k_diffusion(folder, "transformer of classes", ".pth"), data, None, {"times": "lognormal", "label_dropout": 0.3}


FEW = [pipeline, edm, text_unet, dit_as_published]
MORE = [classes, dit, pixart_as_published, sd3, flux, edm_of_ve, edm_of_iddpm, stable_diffusion, stable_diffusion_2, sdxl_file,
        kdiffusion_unet, kdiffusion_classes]  # fmt: skip
EVERY = [*FEW, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)]
RESUMED = [pytest.param(pipeline, marks=pytest.mark.slow), *EVERY[1:]]  # its command below is fast


def trainer(case, out, steps=4, lr=2e-3, **changes):
    source, data, file, how = case
    images = load_images(data, latents=True)
    start = fd.load(source, shape=images.x.shape[1:])
    conditions = None if file is None else read_conditions(file, start, COUNT, "image")
    config = TrainConfig(**{"steps": steps, "batch": 4, "lr": lr, "warmup": 0, "ema": 0.5, **how, **changes})
    return Trainer(continuing(config, start, conditions), images, out, start, conditions)


def state(out):
    saved = torch.load(out / "state.pt", weights_only=True)
    moments = {f"{i}.{k}": v for i, s in saved["optimiser"]["state"].items() for k, v in s.items()}
    parts = {f"{part}.{k}": v for part in ("network", "ema") for k, v in saved[part].items()}
    return {**parts, **moments, "losses": saved["losses"]}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_resumes_to_the_same_bits_and_is_a_checkpoint_of_its_kind(case, tmp_path):
    made = case(tmp_path)
    before = fd.load(made[0], shape=load_images(made[1], latents=True).x.shape[1:])

    def stop(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(made, tmp_path / "a").run(stop)
    resumed = trainer(made, tmp_path / "a")
    assert resumed.step == 2
    resumed.run()
    trainer(made, tmp_path / "b").run()
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    after = fd.load(tmp_path / "a")
    assert after.hash == fd.load(tmp_path / "b").hash != before.hash
    ema = {name.removeprefix("ema."): value for name, value in a.items() if name.startswith("ema.")}
    now, old = after.network.state_dict(), before.network.state_dict()
    assert now.keys() == ema.keys() and all(torch.equal(now[name], ema[name]) for name in now)
    assert max(float((now[name] - old[name]).abs().max()) for name in now) > 1e-3  # it learned
    assert (after.schedule, after.prediction, after.shape) == (before.schedule, before.prediction, before.shape)
    assert after.info["format"] == before.info["format"] and after.info["training"]["step"] == 4
    assert (after.decoder is None) == (before.decoder is None)
    assert after.info.get("variance_type") == before.info.get("variance_type")


@pytest.mark.parametrize("case", EVERY)
def test_the_loss_is_that_of_the_denoised_prediction(case, tmp_path):
    """What is learned is what is sampled: the error of D over c_out is that of the network, by the checkpoint's own denoiser;
    beside it the bound of the variance that the solver ddpm samples with."""
    made = case(tmp_path)
    run = trainer(made, tmp_path / "a", weighting="simple")
    den = fd.load(made[0], shape=run.data.x.shape[1:])
    m = run._material(torch.Generator().manual_seed(5))
    with torch.no_grad():
        d = den.bind(**m.cond)(m.x, m.t)
        found = float(run.loss(torch.Generator().manual_seed(5)))
    c_out = coefficients(den.prediction, den.schedule.alpha(m.t), den.schedule.sigma(m.t), den.sigma_data).c_out
    error = (d.double() - m.x0.double()) / c_out.view(-1, 1, 1, 1)
    want = float(error.square().mean())
    if run.config.vlb:
        want += (added := bound_by_hand(run.config, den, m))
        assert added > 0.05 * want
    assert found == pytest.approx(want, rel=2e-3)
    assert set(m.cond) == ({"class_labels"} if run.data.y is not None else set()) | set(getattr(den.network, "conditions", ()))


def bound_by_hand(config, den, m):
    """Nichol and Dhariwal 2021, eqs. 15 and 16: q(x_s | x_t, x0) by Bayes' rule, the divergence of Gaussians by torch."""
    step = (den.schedule.t_max - den.schedule.t_min) / config.vlb_steps
    bits = []
    for i, t in enumerate(m.t.tolist()):
        with torch.no_grad():
            d, v = den.bind(**rows_of(m.cond, torch.tensor([i]), len(m.t))).with_variance(m.x[i : i + 1], t)
        if t < den.schedule.t_min + step:
            bits.append(0.0)
            continue
        a, s, b, r = (float(f(u)) for u in (t, t - step) for f in (den.schedule.alpha, den.schedule.sigma))
        forward = s * s - (a / b * r) ** 2
        posterior = 1 / (1 / (r * r) + (a / b) ** 2 / forward)
        x, x0, d, v = (part.double() for part in (m.x[i], m.x0[i], d[0], v[0]))
        q, p = (posterior * (a / b / forward * x + b / (r * r) * clean) for clean in (x0, d))
        width = torch.exp(((1 + v) * math.log(forward) + (1 - v) * math.log(posterior)) / 4)
        theirs = torch.distributions.Normal(q, math.sqrt(posterior))
        kl = torch.distributions.kl_divergence(theirs, torch.distributions.Normal(p, width))
        bits.append(float(kl.mean()) / math.log(2))
    return config.vlb * config.vlb_steps * sum(bits) / len(bits)


def test_conditions_follow_their_images_and_are_dropped_to_the_negative_ones(tmp_path):
    run = trainer(text_unet(tmp_path), tmp_path / "a")
    file = load_file(tmp_path / "c.safetensors")
    index = torch.arange(COUNT).repeat(200)
    told = run._cond(index, torch.Generator().manual_seed(0))["encoder_hidden_states"]
    negative = (told == file["negative.encoder_hidden_states"]).all(dim=(1, 2))
    own = (told == file["encoder_hidden_states"][index]).all(dim=(1, 2))
    assert bool((negative ^ own).all()) and abs(float(negative.float().mean()) - 0.3) < 0.04


def test_the_parts_of_a_batch_have_its_gradient(tmp_path):
    """In one process: what two under torchrun would compute. Conditions and their dropping follow the image."""
    run = trainer(text_unet(tmp_path), tmp_path / "a")

    def gradient(world):
        run.world = world
        run.network.zero_grad()
        run.loss(torch.Generator().manual_seed(4)).backward()
        return torch.cat([p.grad.flatten() for p in run.network.parameters()])

    whole, first, second = (gradient(world) for world in (World(), World(0, 2), World(1, 2)))
    scale = float(whole.abs().max())
    assert float(((first + second) / 2 - whole).abs().max()) < 1e-5 * scale
    assert float((first - whole).abs().max()) > 0.05 * scale


@pytest.mark.slow
@pytest.mark.parametrize("case", [*FEW, *MORE])
def test_the_loss_falls(case, tmp_path):
    """On one fixed set of times and noises."""
    run = trainer(case(tmp_path), tmp_path / "a", steps=60, lr=4e-3)

    @torch.no_grad()
    def loss():
        return sum(float(run.loss(torch.Generator().manual_seed(i))) for i in range(3))

    before = loss()
    for _ in range(40):
        run.train_step()
    assert loss() < 0.8 * before and not run.skipped


def test_the_command_and_the_library_that_the_folder_belongs_to(fastdiff, tmp_path):
    """A pipeline stays a pipeline, which diffusers opens; after next to no step it is still the same."""
    source, data, _, _ = pipeline(tmp_path)
    how = ("train", "--data", data, "--from", source, "--batch", 2, "--out", "run")
    code, out, err = fastdiff(*how, "--steps", 1, "--lr", 1e-12)
    assert code == 0, err
    theirs = diffusers.DDPMPipeline.from_pretrained(fastdiff.folder / "run")
    before, after = fd.load(source), fd.load(fastdiff.folder / "run")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (after(x, 300.0) - before(x, 300.0)).abs().max() < 1e-5
    assert (theirs.unet(x, 300).sample - after.network(x, torch.full((2,), 300.0))).abs().max() < 1e-5
    code, out, _ = fastdiff("info", "run", "--json")
    training = json.loads(out)["checkpoint"]["training"]
    assert code == 0 and training["start"] == before.hash and training["prediction"] == "eps"
    code, _, err = fastdiff(*how, "--steps", 1, "--lr", 1e-3)
    assert code == 2 and "other settings: lr" in err


@pytest.mark.slow
def test_all_else_of_a_stable_diffusion_file_stays(tmp_path):
    made = stable_diffusion(tmp_path)
    file = load_file(made[0])
    save_file({**file, "model_ema.input_blocks00weight": torch.zeros(1)}, made[0])
    trainer(made, tmp_path / "a", steps=2).run()
    trained = load_file(tmp_path / "a" / "model.safetensors")
    assert trained.keys() == file.keys()  # the averages of before are gone
    for name, value in file.items():
        same = torch.equal(trained[name], value)
        assert same or name.startswith(test_ldm.ldm.UNET), name
    assert not torch.equal(trained["model.diffusion_model.out.2.weight"], file["model.diffusion_model.out.2.weight"])


@pytest.mark.slow
def test_a_text_pipeline_stays_one(tmp_path):
    text, tokenizer = hub.clip()
    parts = hub.make("AutoencoderKL", **hub.KL), text, tokenizer, hub.make("UNet2DConditionModel", **hub.TEXT_UNET)
    scheduler = diffusers.DDIMScheduler(**hub.VPS)
    pipe = diffusers.StableDiffusionPipeline(*parts, scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "p")
    before = fd.load(tmp_path / "p")
    save_file({"encoder_hidden_states": before.encode(["a cat"])["encoder_hidden_states"]}, tmp_path / "c.safetensors")
    made = tmp_path / "p", latents(tmp_path / "z.npz"), tmp_path / "c.safetensors", {"label_dropout": 0.0}
    trainer(made, tmp_path / "a", steps=2).run()
    after = fd.load(tmp_path / "a")
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    now, then = (den.encode(["dog"])["encoder_hidden_states"] for den in (after, before))
    assert torch.equal(now, then) and torch.equal(after.images(z), before.images(z))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "a")
    found = theirs.unet(z, 300, encoder_hidden_states=now).sample
    assert (found - after.bind(encoder_hidden_states=now).raw(z, torch.tensor([300.0]))).abs().max() < 1e-5


def test_a_record_of_training_that_is_damaged(tmp_path):
    path = test_edm.saved(tmp_path, "ddpm++")
    for shape in ("3", "[3, 8]", "[3, 8, -8]", "[3, 8, 8.5]", "[3, 8, 999999999]", '"3x8"', "["):
        text = f'{{"shape": {shape}}}'
        save_file(load_file(path), path, metadata={"fastdiff_training": text})
        with pytest.raises(FastdiffError, match=r"edm\.safetensors") as caught:
            fd.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arrays",
    [
        {"latents": np.zeros((2, 4, 8, 8), np.uint8)}, {"latents": np.zeros((2, 8, 8), np.float32)},
        {"latents": np.full((2, 4, 8, 8), np.nan, np.float32)}, {"latents": np.zeros((0, 4, 8, 8), np.float32)},
        {"latents": np.zeros((2, 4, 8, 8), np.float32), "x": np.zeros((2, 8, 8), np.uint8)},
    ],
)  # fmt: skip
def test_latents_that_are_none(arrays, tmp_path):
    np.savez(tmp_path / "z.npz", **arrays)
    with pytest.raises(FastdiffError, match="latents") as caught:
        load_images(tmp_path / "z.npz", latents=True)
    assert "\n" not in str(caught.value)


def learned_variance(folder):
    source = hub.save(folder / "m", hub.make("DiTTransformer2DModel", **hub.DIT), DDPM)
    return source, latents(folder / "z.npz", y=np.arange(COUNT) % 5), None


def log_variance(folder):
    scheduler = diffusers.DDPMScheduler(**hub.VPS, variance_type="learned")
    source = hub.save(folder / "m", hub.make("DiTTransformer2DModel", **hub.DIT), scheduler)
    return source, latents(folder / "z.npz", y=np.arange(COUNT) % 5), None, "--vlb", 0.001


def no_variance(folder):
    return *pipeline(folder)[:3], "--vlb", 0.001


def no_conditions(folder):
    return text_unet(folder)[0], folder / "z.npz", None


def other_rows(folder):
    source, data, file, _ = text_unet(folder)
    written(file, COUNT - 1, TEXT)
    return source, data, file


def nothing_to_drop_to(folder):
    source, data, file, _ = text_unet(folder)
    save_file({"encoder_hidden_states": torch.ones(1, 5, 16)}, file)
    return source, data, file


def two_lengths(folder):
    source, data, file, _ = text_unet(folder)
    save_file({"encoder_hidden_states": torch.ones(1, 5, 16), "negative.encoder_hidden_states": torch.ones(1, 1, 16)}, file)
    return source, data, file


def images_for_latents(folder):
    source, _, file, _ = text_unet(folder)
    return source, pixels(folder / "x.npz"), file


def no_labels(folder):
    return classes(folder)[0], pixels(folder / "plain.npz"), None


def labels_without_null(folder):
    return classes(folder)[:3]


def more_classes(folder):
    return classes(folder)[0], pixels(folder / "many.npz", y=np.arange(COUNT)), None


def onnx_network(folder):
    from checkpoints import test_onnx

    path = test_onnx.saved(folder, test_onnx.PLAIN.replace(", 2, 4, 4]", ", 3, 8, 8]"))
    return path, pixels(folder / "x.npz"), None


def itself(folder):
    source = hub.save(folder / "work" / "run", hub.unet(), DDPM)
    return source, pixels(folder / "x.npz"), None


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (learned_variance, "8 channels for 4: it learned the variance of its steps too; give --vlb"),
        (log_variance, 'only "learned_range"'),
        (no_variance, "this one predicts none: leave it out"),
        (no_conditions, "conditioned on encoder_hidden_states: give --condition"),
        (other_rows, "has 5 rows; give 1 for all, or one for each image (6)"),
        (nothing_to_drop_to, "set --label-dropout 0"),
        (two_lengths, "pad them to one shape"),
        (images_for_latents, "does not run on samples of (3, 8, 8)"),
        (no_labels, "4 classes, the data no labels"),
        (labels_without_null, "set --label-dropout 0"),
        (more_classes, "6 classes, the network has 4"),
        (onnx_network, "this is a network of ONNX"),
        (itself, "choose another folder"),
    ],
)
def test_what_cannot_be_trained_is_one_line(case, words, fastdiff, tmp_path):
    source, data, file, *how = case(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    how += [] if file is None else ["--condition", file]
    code, _, err = fastdiff("train", "--data", data, "--from", source, *how, "--steps", 1, "--out", "run")
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err
    assert sorted(tmp_path.rglob("*")) == files
