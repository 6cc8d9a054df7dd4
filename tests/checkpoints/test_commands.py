"""`fastdiff info`, `sample` and `bench` on the checkpoints of others."""

import json

import diffusers
import hub
import pytest
from diffusers import DDPMScheduler

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
    text, tokenizer = hub.clip(tmp_path)
    parts = hub.make("AutoencoderKL", **hub.KL), text, tokenizer, hub.make("UNet2DConditionModel", **hub.TEXT_UNET)
    scheduler = diffusers.DDIMScheduler(**hub.VPS, clip_sample=False, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(*parts, scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "p")
    common = ("sample", tmp_path / "p", "--nfe", 2, "--seeds", "0", "--guidance", 3)
    run(fastdiff, *common, "--prompt", "a cat", "--out", "cat")
    run(fastdiff, *common, "--prompt", "dog", "--out", "dog")
    pictures = [(fastdiff.folder / name / "seed000000.png").read_bytes() for name in ("cat", "dog")]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("command", ["info", "sample", "bench"])
def test_what_is_wrong_is_one_line_and_exit_2(fastdiff, command, tmp_path):
    folder = hub.ddpm(tmp_path / "p")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
    code, _, err = fastdiff(command, folder)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "diffusion_pytorch_model" in err


def test_a_prompt_for_a_checkpoint_without_text(fastdiff, tmp_path):
    code, _, err = fastdiff("sample", hub.ddpm(tmp_path / "p"), "--prompt", "a cat")
    assert code == 2 and "--prompt" in err
