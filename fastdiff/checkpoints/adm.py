"""guided-diffusion and improved-diffusion: `.pt` state dicts of the ADM U-Net, and of its noisy classifiers, with their flags.

The flags (JSON beside the file under the same name, or `config=`) are those of the repositories' own scripts, by name and by
default: {"attention_resolutions": "32,16,8", "class_cond": true, ...}, or {"flags": "--attention_resolutions 32,16,8 ..."}.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..denoiser import Denoiser
from ..errors import CheckpointError
from ..models import UNet, UNetConfig
from ..models.classifier import NoisyClassifier
from . import native
from .build import build
from .options import Options
from .process import betas, from_betas
from .weights import Weights, listed, read

CLASSES = 1000  # of the repositories' scripts: ImageNet's
MODEL: dict[str, Any] = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0, "class_cond": False,
    "use_scale_shift_norm": True, "resblock_updown": False, "use_new_attention_order": False,
}  # fmt: skip
CLASSIFIER: dict[str, Any] = {
    "image_size": 64, "classifier_width": 128, "classifier_depth": 2, "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True, "classifier_resblock_updown": True, "classifier_pool": "attention",
}  # fmt: skip
DIFFUSION: dict[str, Any] = {
    "learn_sigma": False, "sigma_small": False, "diffusion_steps": 1000, "noise_schedule": "linear", "predict_xstart": False,
    "rescale_timesteps": None,
}  # fmt: skip
IDLE = (  # flags of the same command lines that say how to train or sample, not what the network is
    "use_fp16", "classifier_use_fp16", "use_checkpoint", "timestep_respacing", "use_kl", "rescale_learned_sigmas",
    "batch_size", "num_samples", "use_ddim", "model_path", "classifier_path", "classifier_scale", "clip_denoised", "lr",
    "save_interval", "weight_decay", "ema_rate", "anneal_lr", "iterations", "data_dir", "microbatch",
)  # fmt: skip
LEVELS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}
EXAMPLE = '{"flags": "--image_size 256 --num_channels 256 --attention_resolutions 32,16,8 ..."}'


def recognise(weights: Weights) -> bool:
    names = weights.tensors
    text = any(".transformer_blocks." in name for name in names)
    return not text and {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"} <= set(names)


def from_weights(weights: Weights, options: Options) -> Denoiser:
    """The denoiser of a model's `.pt`.

    Raises:
        CheckpointError: no flags, unknown ones, flags that the weights disagree with, a classifier, a super-resolution model.
    """
    path, tensors = weights.paths[0], weights.tensors
    if "out.2.bias" not in tensors:
        raise CheckpointError(f"{path} is a noisy classifier: fastdiff.checkpoints.load_classifier reads it, for guidance")
    flags = _flags(options.described(path), MODEL | DIFFUSION, path)
    config = _unet(flags, tensors, path)
    if config.in_channels != config.out_channels:
        raise CheckpointError(f"{path} takes {config.in_channels} channels: super-resolution needs an image beside the noise")
    steps, rescale = _steps(flags, path), flags["rescale_timesteps"]
    if rescale is None and steps != 1000:
        raise CheckpointError(f"{path} has {steps} steps: say rescale_timesteps (true is improved-diffusion's default)")
    side = options.shape or (config.in_channels, flags["image_size"], flags["image_size"])
    description = {
        "network": config.asdict(), "schedule": _schedule(flags, steps, path).config(),
        "prediction": "x0" if flags["predict_xstart"] else "eps", "time_scale": 1000 / steps if rescale else None,
        "data_range": [-1, 1], "shape": list(side),
    }  # fmt: skip
    denoiser = native.describe(path, description, lambda config: build(lambda: UNet(config), tensors, path, options.dtype))
    denoiser.hash = weights.hash
    fixed = "small" if flags["sigma_small"] else "large"
    denoiser.info |= {"format": "guided-diffusion", "variance": "learned" if flags["learn_sigma"] else fixed}
    return denoiser


def load_classifier(path: str | Path, config: Mapping[str, Any] | None = None) -> NoisyClassifier:
    """The noisy classifier of a `.pt` of guided-diffusion, in eval mode: (x, t) -> logits, for classifier guidance.

    Args:
        config: its flags (classifier_width, classifier_depth, ...); over the .json of the same name beside the file.
    """
    path = Path(path)
    options = Options(config=config or {})
    weights = read(path)
    if not recognise(weights) or "out.2.bias" in weights.tensors:
        raise CheckpointError(f"{path} is no classifier of guided-diffusion; fastdiff.load reads denoisers")
    flags = _flags(options.described(path), CLASSIFIER | DIFFUSION, path)
    renamed = {
        **MODEL, "image_size": flags["image_size"], "num_channels": flags["classifier_width"],
        "num_res_blocks": flags["classifier_depth"], "num_head_channels": 64,
        **{name: flags[f"classifier_{name}"] for name in ("attention_resolutions", "use_scale_shift_norm", "resblock_updown")},
    }  # fmt: skip
    unet = _unet({**flags, **renamed}, weights.tensors, path)
    side, pool = flags["image_size"], flags["classifier_pool"]
    made = build(lambda: NoisyClassifier(unet, side, pool), weights.tensors, path)
    assert isinstance(made, NoisyClassifier)
    return made


def _flags(given: dict[str, Any], known: dict[str, Any], path: Path) -> dict[str, Any]:
    """The flags with the repository's defaults, each of its default's type."""
    if not given:
        raise CheckpointError(
            f"{path} is of guided-diffusion, which keeps a network's flags beside it: put them into "
            f"{path.with_suffix('.json').name}, such as {EXAMPLE}"
        )
    words = str(given.pop("flags", "")).split()
    if len(words) % 2 or any(not w.startswith("--") for w in words[::2]):
        raise CheckpointError(f"{path}: flags must be pairs of --name value; given {' '.join(words)[:120]!r}")
    said = {**{name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}, **given}
    if unknown := sorted(set(said) - set(known) - set(IDLE)):
        raise CheckpointError(f"{path}: flags {listed(unknown)} are not known here; {', '.join(known)} are")
    return {name: _typed(name, said.get(name, default), default, path) for name, default in known.items()}


def _typed(name: str, value: Any, default: Any, path: Path) -> Any:
    text = str(value).lower()
    if isinstance(default, bool) or (default is None and value is not None):
        if text in ("true", "yes", "1", "false", "no", "0"):
            return text in ("true", "yes", "1")
    elif isinstance(default, int):
        if text.lstrip("-").isdigit() and len(text) < 10:
            return int(text)
    elif isinstance(default, str):
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    else:
        return value
    kind = "bool" if default is None else type(default).__name__
    raise CheckpointError(f"{path}: flag {name} is a {kind}; given {text[:60]!r}")


def _unet(flags: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> UNetConfig:
    size = flags["image_size"]
    first = tensors["input_blocks.0.0.weight"]
    if first.ndim != 4:
        raise CheckpointError(f"{path}: its first convolution has shape {tuple(first.shape)}; only models of images are read")
    levels = _numbers(flags["channel_mult"], path) or LEVELS.get(size)
    sides = _numbers(flags["attention_resolutions"], path)
    if levels is None or any(not side or size % side for side in sides):
        raise CheckpointError(f"{path}: image_size {size} needs channel_mult, and attention_resolutions that divide it")
    if flags["num_heads_upsample"] not in (-1, flags["num_heads"]):
        raise CheckpointError(f"{path}: num_heads_upsample other than num_heads is not read")
    out = tensors["out.2.bias"].shape[0] // (2 if flags["learn_sigma"] else 1) if "out.2.bias" in tensors else CLASSES
    heads = flags["num_head_channels"]
    return UNetConfig(
        in_channels=first.shape[1], out_channels=out, model_channels=flags["num_channels"],
        channel_mult=tuple(levels), num_res_blocks=flags["num_res_blocks"], attention=tuple(size // int(s) for s in sides),
        head_channels=heads if heads > 0 else 64, num_heads=None if heads > 0 else flags["num_heads"],
        num_classes=tensors["label_emb.weight"].shape[0] if flags["class_cond"] and "label_emb.weight" in tensors else None,
        resblock_updown=flags["resblock_updown"], use_scale_shift_norm=flags["use_scale_shift_norm"],
        new_attention_order=flags["use_new_attention_order"], learned_variance=flags["learn_sigma"],
    )  # fmt: skip


def _numbers(text: str, path: Path) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as e:
        raise CheckpointError(f"{path}: {text[:60]!r} is no list of numbers such as 32,16,8") from e


def _steps(flags: Mapping[str, Any], path: Path) -> int:
    if not 2 <= flags["diffusion_steps"] <= 100_000:
        raise CheckpointError(f"{path}: diffusion_steps must be 2 to 100,000; given {flags['diffusion_steps']}")
    return int(flags["diffusion_steps"])


def _schedule(flags: Mapping[str, Any], steps: int, path: Path) -> Any:
    """Ho et al.'s linear betas of 1,000 steps stretched to this many, or the cosine (Nichol and Dhariwal 2021, eq. 17)."""
    name = flags["noise_schedule"]
    if name == "linear":
        return from_betas(betas("linear", 0.1 / steps, 20 / steps, steps))
    if name == "cosine":
        return from_betas(betas("squaredcos_cap_v2", 0.0, 0.0, steps))
    raise CheckpointError(f"{path}: noise_schedule is linear or cosine; given {name[:60]!r}")
