"""Latent Diffusion and Stable Diffusion in one file (CompVis names): v1, v2 and SDXL U-Nets with their KL autoencoders.

The network is diffusers' class; its configuration is read off names and shapes, and every tensor renamed (Rombach et al. 2022).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import CheckpointError
from ..prediction import check_prediction
from . import rewrite
from .build import build
from .diffusers_networks import FAMILIES, Decoder, Network
from .options import Options, needed
from .process import betas, from_betas
from .weights import Weights, listed

UNET, VAE = "model.diffusion_model.", "first_stage_model."
KNOWN = (  # what else such a file holds: text encoders, a second (averaged) copy, tables of the schedule, losses
    "cond_stage_model.", "conditioner.", "model_ema.", "betas", "alphas_cumprod", "sqrt_", "log_one", "posterior_", "logvar",
    "scale_factor", "lvlb_weights", "denoiser.", "v_pred", "ztsnr", "first_stage_model.loss.",
)  # fmt: skip
HEADS, HEAD_CHANNELS = 8, 64  # v1 splits every level into 8 heads; v2 and SDXL into heads of 64 channels
SETTINGS = ("prediction", "num_heads", "num_head_channels", "scaling_factor")
FIXED = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out", "out.2": "conv_out", "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def recognise(weights: Weights) -> bool:
    return any(name.startswith(UNET) for name in weights.tensors)


def from_weights(weights: Weights, options: Options) -> Denoiser:
    """The denoiser of the file's U-Net, its autoencoder as decoder where the file has one; text conditions are bound.

    Raises:
        CheckpointError: tensors of other parts, a U-Net of another kind, a v2 file that does not say what it predicts.
    """
    path, said = weights.paths[0], options.described(weights.paths[0])
    needed("diffusers", "Stable Diffusion files")
    from diffusers import UNet2DConditionModel

    if lost := [k for k in weights.tensors if not k.startswith((UNET, VAE, *KNOWN))]:
        raise CheckpointError(f"{path} has {len(lost)} tensors of no part known here: {listed(lost)}")
    if unknown := sorted(set(said) - set(SETTINGS)):
        raise CheckpointError(f"{path}: settings {listed(unknown)} are not known here; {', '.join(SETTINGS)} are")
    tensors = weights.below(UNET)
    config = unet_config(tensors, said, path)
    renamed = {unet_name(name, config["layers_per_block"]): t for name, t in tensors.items()}
    if len(renamed) < len(tensors):
        raise CheckpointError(f"{path} has several tensors for one place of the U-Net")
    model = build(lambda: cast(nn.Module, UNet2DConditionModel(**config)), renamed, path, options.dtype)
    prediction = _prediction(weights, said, config, path)
    side = 128 if config.get("addition_embed_type") else 96 if prediction == "v" else 64
    schedule = from_betas(betas("scaled_linear", 0.00085, 0.012, 1000))
    denoiser = Denoiser(
        Network(model, FAMILIES["UNet2DConditionModel"].conditions(config)),
        schedule.zero_terminal_snr() if "ztsnr" in weights.tensors else schedule, prediction,
        options.shape or weights.trained_shape or (config["in_channels"], side, side),
    )  # fmt: skip
    denoiser.hash = weights.hash
    denoiser.info = {"format": "Stable Diffusion, one file", "network": config, **weights.training}
    names = {f"model.{unet_name(name, config['layers_per_block'])}": UNET + name for name in tensors}
    denoiser.write = partial(rewrite.in_file, path, names, said)
    encoded = {k: v for k, v in weights.below(VAE).items() if not k.startswith("loss.")}
    if encoded:
        denoiser.decoder = _decoder(encoded, _scaling(weights, said, config), options, path)
    return denoiser


def unet_config(tensors: Mapping[str, Tensor], said: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The configuration of UNet2DConditionModel, from the names and shapes of a CompVis U-Net."""
    try:
        levels = _levels(tensors)
        key = next(name for name in tensors if name.endswith("transformer_blocks.0.attn2.to_k.weight"))
        projection = next(t for name, t in tensors.items() if name.endswith(".proj_in.weight"))
        channels = [level[-1][0] for level in levels]
        counts = {len(level) for level in levels}
        into, out = tensors["input_blocks.0.0.weight"].shape[1], tensors["out.2.weight"].shape[0]
    except (KeyError, StopIteration, IndexError, ValueError) as e:
        raise CheckpointError(f"{path} is no text-conditioned U-Net of Latent Diffusion ({type(e).__name__} {e})") from e
    if len(counts) > 1 or into != out:
        raise CheckpointError(f"{path}: a U-Net from {into} to {out} channels with {counts} blocks a level is not read here")
    linear = projection.ndim == 2
    head_channels = said.get("num_head_channels", HEAD_CHANNELS if linear and "num_heads" not in said else None)
    heads = [c // head_channels for c in channels] if head_channels else said.get("num_heads", HEADS)
    depth = [max(d for _, d in level) for level in levels]
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth]
    wide = tensors.get("label_emb.0.0.weight")
    added = {} if wide is None else {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": wide.shape[1],
    }  # fmt: skip
    return {
        "sample_size": None, "in_channels": into, "out_channels": out, "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)], "block_out_channels": channels,
        "layers_per_block": counts.pop(), "cross_attention_dim": tensors[key].shape[1], "attention_head_dim": heads,
        "use_linear_projection": linear, "transformer_layers_per_block": [d or 1 for d in depth], **added,
    }  # fmt: skip


def _levels(tensors: Mapping[str, Tensor]) -> list[list[tuple[int, int]]]:
    """Of each level its residual blocks: channels, and how many transformer blocks follow."""
    levels: list[list[tuple[int, int]]] = [[]]
    for i in range(1, 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks."))):
        if f"input_blocks.{i}.0.op.weight" in tensors:
            levels.append([])
            continue
        channels = tensors[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0]
        blocks = {name.split(".")[4] for name in tensors if name.startswith(f"input_blocks.{i}.1.transformer_blocks.")}
        levels[-1].append((channels, len(blocks)))
    return levels


def unet_name(name: str, layers: int) -> str:
    """A CompVis U-Net's parameter under diffusers' name; `layers`: residual blocks a level."""
    stem, _, last = name.rpartition(".")
    if stem in FIXED:
        return f"{FIXED[stem]}.{last}"
    match = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)|(middle_block)\.(\d+)\.(.+)", name)
    if match is None:
        return name
    if match[5]:
        part = int(match[6])
        return f"mid_block.attentions.0.{match[7]}" if part == 1 else f"mid_block.resnets.{part // 2}.{_resnet(match[7])}"
    down, index, rest = match[1] == "input_blocks", int(match[2]), match[4]
    block, layer = divmod(index - 1 if down else index, layers + 1)
    place = f"{'down' if down else 'up'}_blocks.{block}"
    if layer == layers and (stem.endswith(".0.op") if down else rest.startswith("conv.")):
        return f"{place}.{'down' if down else 'up'}samplers.0.conv.{last}"
    if match[3] == "0":
        return f"{place}.resnets.{layer}.{_resnet(rest)}"
    return f"{place}.attentions.{layer}.{rest}" if match[3] == "1" else name


def _resnet(rest: str) -> str:
    stem, dot, last = rest.rpartition(".")
    return f"{RESNET.get(stem, stem)}{dot}{last}"


def vae_name(name: str, levels: int) -> str:
    """A CompVis autoencoder's parameter under diffusers' name; the decoder counts its levels the other way."""
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    rest = re.sub(r"^norm_out\.", "conv_norm_out.", rest.replace("nin_shortcut", "conv_shortcut"))
    rest = re.sub(r"^mid\.block_(\d)\.", lambda m: f"mid_block.resnets.{int(m[1]) - 1}.", rest)
    rest = re.sub(r"^mid\.attn_1\.(\w+)\.", lambda m: f"mid_block.attentions.0.{ATTENTION.get(m[1], m[1])}.", rest)
    rest = re.sub(r"^down\.(\d+)\.block\.", r"down_blocks.\1.resnets.", rest)
    rest = re.sub(r"^down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0.", rest)
    rest = re.sub(r"^up\.(\d+)\.block\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.resnets.", rest)
    rest = re.sub(r"^up\.(\d+)\.upsample\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.upsamplers.0.", rest)
    return f"{half}.{rest}"


def vae_config(tensors: Mapping[str, Tensor], scaling: float, path: Path) -> dict[str, Any]:
    """The configuration of AutoencoderKL, from the names and shapes of a CompVis autoencoder."""
    blocks = [re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.weight", name) for name in tensors]
    found = {(int(m[1]), int(m[2])) for m in blocks if m}
    try:
        levels = range(1 + max(level for level, _ in found))
        channels = [tensors[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in levels]
        into, latent = tensors["encoder.conv_in.weight"].shape[1], tensors["decoder.conv_in.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as e:
        raise CheckpointError(f"{path}: its first_stage_model is no KL autoencoder that is read here ({e})") from e
    return {
        "in_channels": into, "out_channels": into, "latent_channels": latent, "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels), "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": 1 + max(block for _, block in found), "scaling_factor": scaling,
    }  # fmt: skip


def _decoder(tensors: Mapping[str, Tensor], scaling: float, options: Options, path: Path) -> Decoder:
    from diffusers import AutoencoderKL

    config = vae_config(tensors, scaling, path)
    renamed = {}
    for name, t in tensors.items():
        flat = ".mid.attn_1." in name and t.ndim == 4 and t.shape[2:] == (1, 1)  # 1x1 convolutions there, linear layers here
        renamed[vae_name(name, len(config["block_out_channels"]))] = t[:, :, 0, 0] if flat else t
    return Decoder(build(lambda: cast(nn.Module, AutoencoderKL(**config)), renamed, path, options.dtype))


def _scaling(weights: Weights, said: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    if "scaling_factor" in said:
        return float(said["scaling_factor"])
    given = weights.tensors.get("scale_factor")
    if given is not None and given.numel() == 1:
        return float(given)
    return 0.13025 if config.get("addition_embed_type") else 0.18215


def _prediction(weights: Weights, said: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> str:
    """What the file says, or what every file of its kind predicts; v2 was released both ways with the same shapes."""
    stated = said.get("prediction") or weights.metadata.get("modelspec.predict_key")
    stated = {"epsilon": "eps", "v_prediction": "v"}.get(str(stated), stated)
    if stated is not None:
        check_prediction(str(stated))
        return str(stated)
    if "v_pred" in weights.tensors:
        return "v"
    if config["use_linear_projection"] and not config.get("addition_embed_type"):
        raise CheckpointError(
            f'{path} is Stable Diffusion 2, which predicts v (768) or eps (512-base) and does not say which: put '
            f'{{"prediction": "v"}} into {path.with_suffix(".json").name}'
        )
    return "eps"
