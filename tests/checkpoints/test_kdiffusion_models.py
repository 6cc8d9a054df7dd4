"""k-diffusion's own models against the library's own forward, where it is installed: its packages are too many for every run.

pip install k-diffusion, or its modules config, layers and models on the path with torchvision and others left empty.
"""

import importlib
import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

import fastdiff as fd
from fastdiff.errors import CheckpointError

HERE = find_spec("k_diffusion") is not None
library = pytest.mark.skipif(not HERE, reason="k-diffusion is not installed (pip install k-diffusion)")
LEVELS = {"sigma_data": 0.6, "sigma_min": 0.01, "sigma_max": 90.0}
UNET = {"type": "image_v1", "input_channels": 3, "input_size": [8, 8], "mapping_out": 16, "depths": [1, 1], "channels": [32, 64],
        "self_attn_depths": [False, True], "cross_attn_depths": None, **LEVELS}  # fmt: skip
CONFIGS = {
    "U-Net": {"model": UNET},
    "U-Net with variance": {"model": {**UNET, "has_variance": True, "augment_wrapper": False, "patch_size": 2}},
    "U-Net of conditions": {"model": {**UNET, "mapping_cond_dim": 5, "unet_cond_dim": 2}},
    "transformer of classes": {
        "model": {"type": "image_transformer_v1", "input_channels": 3, "input_size": [8, 8], "patch_size": [2, 2], "depth": 1,
                  "width": 64, **LEVELS},
        "dataset": {"type": "imagefolder", "num_classes": 4},
    },
}  # fmt: skip
THEIRS = {
    "U-Net of conditions": {"mapping_cond": torch.randn(2, 5), "unet_cond": torch.randn(2, 2, 8, 8)},
    "transformer of classes": {"class_cond": torch.tensor([1, 4])},  # the last row is "no class"
}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def made(config):
    """The library's own inner model and denoiser, every weight drawn."""
    kd = importlib.import_module("k_diffusion.config")
    torch.manual_seed(0)
    whole = kd.load_config(config)
    model = kd.make_model(whole).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.05)
    return model, kd.make_denoiser_wrapper(whole)(model)


def saved(folder, model, config, form=".pth"):
    path = folder / f"model{form}"
    if form == ".pth":  # as train.py writes it, in short
        averaged = model.state_dict()
        other = {name: value + 1 for name, value in averaged.items()}
        torch.save({"config": config, "model": other, "model_ema": averaged, "epoch": 3, "demo_gen": torch.zeros(4)}, path)
    else:  # as convert_for_inference.py does
        save_file(model.state_dict(), path, metadata={"config": json.dumps(config)})
    return path


@library
@pytest.mark.parametrize("form", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_denoises_as_the_library_does(name, form, tmp_path):
    model, denoiser = made(CONFIGS[name])
    cond = THEIRS.get(name, {})
    den = fd.load(saved(tmp_path, model, CONFIGS[name], form))
    assert den.schedule == fd.schedule.edm(0.01, 90.0, 0.6) and den.shape == (3, 8, 8) and den.hash
    assert (den.num_classes, den.network.null_label) == ((4, 4) if "class" in name else (0, None))
    bound = den.bind(**{"class_labels" if k == "class_cond" else k: v for k, v in cond.items()})
    for sigma in (0.05, 1.0, 60.0):
        wanted = denoiser(X, torch.full((2,), sigma), **cond)
        assert (bound(X, sigma) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    if cond:
        with pytest.raises(fd.errors.FastdiffError, match="bind"):
            den(X, 1.0)


@library
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": [32, 96]}, "misshapen"),
        ({"depths": [1, 2]}, "missing"),
        ({"depths": [10**6, 1]}, "far more than the file has tensors"),
        ({"mapping_out": 10**15}, "mapping_out"),
        ({"type": "image_v9"}, "image_v9"),
        ({"sigma_min": 100.0}, "sigma_min < sigma_max"),
        ({"input_size": 8}, "disagree"),
        ({"channels": "many"}, "makes no network"),
    ],
)
def test_what_is_wrong_is_one_line(change, words, tmp_path):
    model, _ = made(CONFIGS["U-Net"])
    with pytest.raises(CheckpointError, match=words) as caught:
        fd.load(saved(tmp_path, model, {"model": {**UNET, **change}}))
    assert "\n" not in str(caught.value)


@library
def test_weights_alone_take_their_configuration_from_beside(tmp_path):
    model, _ = made(CONFIGS["U-Net"])
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.json"):
        fd.load(tmp_path / "model.pth")
    (tmp_path / "model.json").write_text(json.dumps(CONFIGS["U-Net"]))
    assert fd.load(tmp_path / "model.pth")(X, 1.0).shape == X.shape


@pytest.mark.skipif(HERE, reason="k-diffusion is installed")
@pytest.mark.parametrize("names", [("timestep_embed.weight", "mapping.0.weight"), ("time_emb.weight", "aug_emb.weight")])
def test_without_the_library_one_line_says_so(names, tmp_path):
    weights = {f"inner_model.{name}": torch.zeros(1) for name in names}
    torch.save({"config": {"model": UNET}, "model_ema": weights}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="pip install 'k-diffusion'"):
        fd.load(tmp_path / "model.pth")
