"""`fastdiff info`, `sample`, `bench` and `train --from` on the checkpoints of others."""

import json

import diffusers
import hub
import numpy as np
import peer_networks
import pytest
import tiny
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file

import fastdiff as fd
from fastdiff.bench import converged


def run(fastdiff, *args):
    code, out, err = fastdiff(*args)
    assert code == 0, err
    return out


def test_a_pixel_pipeline(fastdiff, tmp_path, monkeypatch):
    monkeypatch.setattr(converged, "FIRST_STEPS", 4)  # the reference itself is not what is tested here
    monkeypatch.setattr(converged, "MOST_STEPS", 8)
    folder = hub.ddpm(tmp_path / "p", **hub.VPS)
    info = json.loads(run(fastdiff, "info", folder, "--json"))["checkpoint"]
    assert info["format"] == "diffusers DDPMPipeline" and info["shape"] == [3, 8, 8] and info["prediction"] == "eps"
    assert info["schedule"]["name"] == "vp_from_alphas_cumprod" and info["schedule"]["alphas_cumprod"].startswith("1000 entries")
    assert info["parameters"] == sum(p.numel() for p in hub.unet().parameters()) and len(info["sha256"]) == 64
    run(fastdiff, "sample", folder, "--nfe", 3, "--seeds", "0-2", "--out", "o")
    assert (fastdiff.folder / "o" / "seed000002.png").exists()
    out = run(fastdiff, "bench", folder, "--solvers", "ddim,unipc-2", "--nfe", "3,4", "--n", 2, "--out", "b")
    assert "unipc-2" in out and (fastdiff.folder / "b" / "report.html").exists()


def test_a_latent_pipeline_of_classes(fastdiff, tmp_path):
    dit = hub.make("DiTTransformer2DModel", **hub.DIT)
    pipe = diffusers.DiTPipeline(dit, hub.make("AutoencoderKL", **hub.KL), DDPMScheduler(**hub.VPS))
    pipe.save_pretrained(tmp_path / "p")
    index = tmp_path / "p" / "model_index.json"  # published DiT folders have the names; save_pretrained leaves them out
    names = {"id2label": {str(i): f"thing {i}, or so" for i in range(5)}}
    index.write_text(json.dumps({**json.loads(index.read_text()), **names}))
    info = json.loads(run(fastdiff, "info", tmp_path / "p", "--json"))["checkpoint"]
    assert info["decoder"] == "AutoencoderKL" and info["classes"][3] == "thing 3" and len(info["classes"]) == 5
    run(fastdiff, "sample", tmp_path / "p", "--nfe", 2, "--seeds", "0", "--classes", "thing 3", "--guidance", 2, "--out", "o")
    assert (fastdiff.folder / "o" / "seed000000_class3-thing-3.png").exists()


def test_prompts(fastdiff, tmp_path):
    text, tokenizer = hub.clip()
    parts = hub.make("AutoencoderKL", **hub.KL), text, tokenizer, hub.make("UNet2DConditionModel", **hub.TEXT_UNET)
    scheduler = diffusers.DDIMScheduler(**hub.VPS, clip_sample=False, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(*parts, scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "p")
    common = ("sample", tmp_path / "p", "--nfe", 2, "--seeds", "0", "--guidance", 3)
    run(fastdiff, *common, "--prompt", "a cat", "--out", "cat")
    run(fastdiff, *common, "--prompt", "dog", "--out", "dog")
    pictures = [(fastdiff.folder / name / "seed000000.png").read_bytes() for name in ("cat", "dog")]
    assert pictures[0] != pictures[1]


def guided_diffusion(folder):
    case = peer_networks.cases()["adm guided"]
    torch.save(peer_networks.weights(case["weights"]), folder / "model.pt")
    (folder / "model.json").write_text(json.dumps(case["config"]))
    return folder / "model.pt", "guided-diffusion"


def edm(folder):
    weights = {f"model.{k}": v for k, v in peer_networks.weights(peer_networks.cases()["edm ddpm++"]["weights"]).items()}
    save_file(weights, folder / "edm.safetensors", metadata={"class_name": "VPPrecond"})
    return folder / "edm.safetensors", "EDM, DDPM++, VPPrecond"


def own(folder):
    return tiny.checkpoint(folder / "own.safetensors"), "fastdiff"


def k_diffusion(folder):
    import test_kdiffusion_models as models

    pytest.importorskip("k_diffusion.config", reason="k-diffusion is not installed", exc_type=ImportError)
    config = models.CONFIGS["transformer of classes"]
    return models.saved(folder, models.made(config)[0], config), "k-diffusion, image_transformer_v1"


@pytest.mark.parametrize("family", [own, edm, guided_diffusion, k_diffusion], ids=lambda f: f.__name__)
def test_files_of_every_family(family, fastdiff, tmp_path, monkeypatch):
    """.onnx files: test_onnx.py; diffusers folders: above; engines: tests/export."""
    monkeypatch.setattr(converged, "FIRST_STEPS", 2)
    monkeypatch.setattr(converged, "MOST_STEPS", 4)
    path, form = family(tmp_path)
    info = json.loads(run(fastdiff, "info", path, "--json"))["checkpoint"]
    assert info["format"] == form and info["parameters"] > 1000 and len(info["sha256"]) == 64
    assert info["schedule"]["name"] and info["prediction"] and len(info["shape"]) == 3
    run(fastdiff, "sample", path, "--nfe", 2, "--seeds", "0", "--out", "o")
    assert (fastdiff.folder / "o" / "grid.png").exists()
    run(fastdiff, "bench", path, "--solvers", "ddim", "--nfe", "2", "--n", 2, "--out", "b")
    assert (fastdiff.folder / "b" / "report.html").exists()


def test_a_stable_diffusion_file_says_what_it_wants(fastdiff, tmp_path):
    """Its text encoder is not read: what it is can be asked, and a picture needs --condition (test_conditions.py)."""
    import test_ldm

    _, path = test_ldm.written(tmp_path, "v1", hub.make("AutoencoderKL", **test_ldm.KL))
    info = json.loads(run(fastdiff, "info", path, "--json"))["checkpoint"]
    assert info["format"] == "Stable Diffusion, one file" and info["decoder"] == "AutoencoderKL" and info["shape"] == [4, 64, 64]
    for command in ("sample", "bench"):
        code, _, err = fastdiff(command, path, "--nfe", 2)
        assert code == 2 and len(err.strip().splitlines()) == 1 and "bind encoder_hidden_states" in err, err


@pytest.mark.parametrize("command", ["info", "sample", "bench"])
def test_what_is_wrong_is_one_line_and_exit_2(fastdiff, command, tmp_path):
    folder = hub.ddpm(tmp_path / "p")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
    code, _, err = fastdiff(command, folder)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "diffusion_pytorch_model" in err


def test_a_prompt_for_a_checkpoint_without_text(fastdiff, tmp_path):
    code, _, err = fastdiff("sample", hub.ddpm(tmp_path / "p"), "--prompt", "a cat")
    assert code == 2 and "--prompt" in err


def test_training_goes_on_from_a_checkpoint(fastdiff, tmp_path):
    """Our own file and guided-diffusion's: after next to no step the weights are still theirs, and all that is said of them."""
    tiny.npz(tmp_path / "own.npz")
    source = tiny.checkpoint(tmp_path / "own.safetensors")
    adm = tmp_path / "improved.pt"
    case = peer_networks.cases()["adm improved"]
    torch.save(peer_networks.weights(case["weights"]), adm)
    adm.with_suffix(".json").write_text(json.dumps(case["config"]))
    np.savez(tmp_path / "improved.npz", x=np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8))
    for path in (source, adm):
        out = tmp_path / f"run-{path.stem}"
        data = tmp_path / f"{path.stem}.npz"
        run(fastdiff, "train", "--data", data, "--from", path, "--steps", 1, "--batch", 2, "--lr", 1e-12, "--out", out)
        before, after = fd.load(path), fd.load(out)
        theirs, ours = before.network.state_dict(), after.network.state_dict()
        assert all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in theirs)
        assert (after.schedule, after.prediction, after.shape) == (before.schedule, before.prediction, before.shape)
        assert after.info["time_scale"] == before.info["time_scale"] and after.info["training"]["start"] == before.hash


def test_training_on_images_that_a_network_does_not_take(fastdiff, tmp_path):
    """What goes on learning of other libraries: training/test_taken_over.py."""
    tiny.npz(tmp_path / "x.npz")
    code, _, err = fastdiff("train", "--data", tmp_path / "x.npz", "--from", hub.ddpm(tmp_path / "p"), "--out", tmp_path / "run")
    assert code == 2 and "DDPMPipeline" in err and not (tmp_path / "run").exists()
