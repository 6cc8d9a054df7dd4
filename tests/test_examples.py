"""Every example runs, on a small checkpoint of its family, and gives images."""

import importlib
from pathlib import Path

import diffusers
import hub
import peer_networks
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "examples"
SEATS = {"a1111_script", "accelerate_pipeline", "comfyui_node", "diffusers_scheduler"}  # run in tests/compat


def example(name):
    return importlib.import_module(f"examples.{name}").main


def images(x, shape):
    assert x.shape == shape and x.isfinite().all() and x.min() >= 0 and x.max() <= 1
    assert x.flatten(1).std(dim=1).min() > 0


def test_fastdiff_model(tmp_path):
    images(example("fastdiff_model")(tiny.checkpoint(tmp_path / "own.safetensors")), (4, 1, 8, 8))


def test_diffusers_pipeline(tmp_path):
    images(example("diffusers_pipeline")(hub.ddpm(tmp_path / "p")), (4, 3, 8, 8))


def test_class_labels(tmp_path):
    dit = hub.make("DiTTransformer2DModel", **hub.DIT)
    pipe = diffusers.DiTPipeline(dit, hub.make("AutoencoderKL", **hub.KL), DDPMScheduler(**hub.VPS))
    pipe.save_pretrained(tmp_path / "p")
    images(example("class_labels")(tmp_path / "p"), (3, 3, 16, 16))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_text_to_image(tmp_path):
    text, tokenizer = hub.clip()
    parts = hub.make("AutoencoderKL", **hub.KL), text, tokenizer, hub.make("UNet2DConditionModel", **hub.TEXT_UNET)
    scheduler = DDIMScheduler(**hub.VPS, clip_sample=False, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(*parts, scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "p")
    images(example("text_to_image")(tmp_path / "p"), (2, 3, 16, 16))


def test_guided_diffusion(tmp_path):
    case = peer_networks.cases()["adm guided"]
    torch.save(peer_networks.weights(case["weights"]), tmp_path / "model.pt")
    images(example("guided_diffusion")(tmp_path / "model.pt", case["config"]["flags"]), (2, 3, 16, 16))


def test_stable_diffusion_file(tmp_path):
    from checkpoints import test_ldm

    vae = hub.make("AutoencoderKL", **test_ldm.KL)
    _, path = test_ldm.written(tmp_path, "v1", vae)
    images(example("stable_diffusion_file")(path, test_ldm.TEXT, (4, 8, 8)), (2, 3, 16, 16))


def test_edm(tmp_path):
    case = peer_networks.cases()["edm ddpm++"]
    weights = {f"model.{k}": v for k, v in peer_networks.weights(case["weights"]).items()}
    save_file(weights, tmp_path / "edm.safetensors")
    images(example("edm")(tmp_path / "edm.safetensors"), (2, 3, 8, 8))


def test_k_diffusion(tmp_path):
    pytest.importorskip("k_diffusion.config", reason="k-diffusion is not installed", exc_type=ImportError)
    from checkpoints import test_kdiffusion_models as models

    config = models.CONFIGS["transformer of classes"]
    model, _ = models.made(config)
    images(example("k_diffusion")(models.saved(tmp_path, model, config)), (2, 3, 8, 8))


def test_onnx_network(tmp_path):
    from checkpoints import test_onnx

    path = test_onnx.saved(tmp_path, test_onnx.PLAIN)
    path.with_suffix(".json").unlink()  # the example says it all
    images(example("onnx_network")(path), (2, 2, 4, 4))


def test_any_network():
    """Its data are one flat grey, so the answer is known."""
    assert (example("any_network")() - 0.7).abs().max() < 1e-5


def test_every_example_is_run():
    names = {path.stem for path in FOLDER.glob("*.py")} - SEATS
    assert names == {name.removeprefix("test_") for name in globals() if name.startswith("test_")} - {"every_example_is_run"}
