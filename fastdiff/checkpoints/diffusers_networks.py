"""diffusers' networks behind one call, (x, t, **conditions) -> prediction; and its autoencoders as decoders."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, FastdiffError
from ..models.labelled import Labelled

Config = Mapping[str, Any]
Classes = tuple[int, bool] | None  # rows of the class embedding, and whether the last stands for "no class"
Shape = tuple[int, ...]
Row = tuple[int | None, ...]  # the shape of what one sample is conditioned on; None = any length
Rows = dict[str, Row]  # by the name that the network takes it under; a part of a mapping as mapping.part
MASK = "encoder_attention_mask"


class Network(nn.Module):
    """One of diffusers' denoisers. Conditions of batch 1 serve every sample of a batch.

    `takes` names every condition that it must be given and the shape of a row, `may_take` those it does without.
    """

    def __init__(self, model: nn.Module, takes: Rows | None = None, classes: Classes = None) -> None:
        super().__init__()
        self.model, self.takes = model, takes or {}
        self.may_take: Rows = {MASK: (None,)} if MASK in inspect.signature(model.forward).parameters else {}
        self.conditions = tuple(dict.fromkeys(name.partition(".")[0] for name in self.takes))
        rows, has_null = classes or (None, False)
        self.config = Labelled(rows)
        self.null_label = rows - 1 if rows and has_null else None
        self.whole_times = getattr(model, "config", {}).get("time_embedding_type") == "learned"  # a table, one row a step

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        if missing := [name for name in self.conditions if name not in cond]:
            raise FastdiffError(
                f"this network is conditioned on {', '.join(self.conditions)}: bind {', '.join(missing)} first "
                "(den.bind(...), or --condition FILE on the command line; den.encode([prompt]) makes text conditions where the "
                "checkpoint has its encoders)"
            )
        cond = {name: _for_batch(value, len(x), x) for name, value in cond.items()}
        return self.call(x, t.round().long() if self.whole_times else t, cond)

    def call(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        return self.model(x, timestep=t, return_dict=False, **cond)[0]


class FluxNetwork(Network):
    """Flux sees 2x2 patches of the latents as tokens and is told their rows and columns; its time is sigma in [0, 1]."""

    def call(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3).to(x)
        text = cond["encoder_hidden_states"]
        own = {"img_ids": places, "txt_ids": text.new_zeros(text.shape[1], 3)}
        out = self.model(tokens, timestep=t / 1000, return_dict=False, **{**own, **cond})[0]
        return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def _for_batch(value: Any, count: int, like: Tensor) -> Any:
    if isinstance(value, Mapping):
        return {k: _for_batch(v, count, like) for k, v in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = value.to(device=like.device, dtype=like.dtype if value.is_floating_point() else None)
    return value.expand(count, *value.shape[1:]) if value.ndim and len(value) == 1 < count else value


class Decoder(nn.Module):
    """Latents (B, C, h, w) of a pipeline -> images (B, 3, H, W) in [-1, 1], by its autoencoder."""

    autoencoder: Any
    scale: float | Tensor
    shift: float | Tensor

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder, self.name = autoencoder, type(autoencoder).__name__
        config = autoencoder.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)  # pixels a latent, on each side
        factor = float(config.get("scaling_factor") or 1.0)
        self.scale, self.shift = 1 / factor, float(config.get("shift_factor") or 0.0)
        if mean is not None and std is not None:
            self.scale, self.shift = torch.tensor(std).view(1, -1, 1, 1) / factor, torch.tensor(mean).view(1, -1, 1, 1)

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:
        scale, shift = (v.to(z) if isinstance(v, Tensor) else v for v in (self.scale, self.shift))
        dtype = next(self.autoencoder.parameters()).dtype
        return self.autoencoder.decode((z * scale + shift).to(dtype), return_dict=False)[0]


@dataclass(frozen=True)
class Family:
    """What is particular about one of diffusers' classes, as functions of its configuration."""

    shape: Callable[[Config], Shape | None]
    conditions: Callable[[Config], Rows]
    classes: Callable[[Config], Classes] = lambda config: None
    network: type[Network] = Network
    patch: int = 1

    def tokens(self, config: Config, shape: Shape | None) -> int | None:
        """Image tokens of one sample, which a flow's dynamic shift depends on."""
        patch = self.patch if self.network is FluxNetwork else int(config.get("patch_size") or self.patch)
        return None if shape is None else shape[-1] * shape[-2] // patch**2


def _square(config: Config) -> Shape | None:
    size, channels = config.get("sample_size"), config.get("in_channels")
    sides: list[Any] = size if isinstance(size, list) and len(size) == 2 else [size, size]
    if not (isinstance(channels, int) and channels > 0):
        raise CheckpointError(f"in_channels must be a positive whole number; given {str(channels)[:60]!r}")
    out = config.get("out_channels")
    if out not in (None, channels, 2 * channels):
        raise CheckpointError(
            f"this network turns {channels} channels into {out}: an inpainting, editing or super-resolution model, which needs "
            "an image beside the noise; wrap it in fd.Denoiser with a function that adds it"
        )
    if size is None:
        return None
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise CheckpointError(f"sample_size must be a positive whole number, or two; given {str(size)[:60]!r}")
    return channels, sides[0], sides[1]


def _flux_shape(config: Config) -> Shape:
    return int(config.get("in_channels", 64)) // 4, 128, 128  # 1024 x 1024 pixels: the pipeline's default size


ADDED: dict[str, dict[str, Row]] = {  # what each addition_embed_type is told beside the text
    "text_time": {"text_embeds": (None,), "time_ids": (None,)}, "image": {"image_embeds": (None,)},
    "text_image": {"text_embeds": (None,), "image_embeds": (None,)},
    "image_hint": {"image_embeds": (None,), "hint": (None, None, None)},
}  # fmt: skip


def _width(value: Any) -> int | None:
    """Of a configuration's number; None where blocks differ in it."""
    return value if isinstance(value, int) else None


def _added(parts: Mapping[str, Row]) -> Rows:
    return {f"added_cond_kwargs.{name}": row for name, row in parts.items()}


def _unet_conditions(config: Config) -> Rows:
    kind = config.get("class_embed_type")
    if not kind or kind == "timestep":  # a number
        return {"class_labels": ()} if kind or config.get("num_class_embeds") else {}
    return {"class_labels": (_width(config.get("projection_class_embeddings_input_dim")),)}


def _text_unet_conditions(config: Config) -> Rows:
    text = {"encoder_hidden_states": (None, _width(config.get("encoder_hid_dim") or config.get("cross_attention_dim")))}
    return {**text, **_unet_conditions(config), **_added(ADDED.get(str(config.get("addition_embed_type")), {}))}


def _rows(config: Config) -> Classes:
    count = config.get("num_class_embeds")
    return (int(count), False) if isinstance(count, int) and count and not config.get("class_embed_type") else None


def _pixart_conditions(config: Config) -> Rows:
    given = config.get("use_additional_conditions")
    added = config.get("sample_size") == 128 if given is None else given
    text = {"encoder_hidden_states": (None, _width(config.get("caption_channels") or config.get("cross_attention_dim")))}
    return {**text, **(_added({"resolution": (2,), "aspect_ratio": (1,)}) if added else {})}


def _sd3_conditions(config: Config) -> Rows:
    return {
        "encoder_hidden_states": (None, _width(config.get("joint_attention_dim"))),
        "pooled_projections": (_width(config.get("pooled_projection_dim")),),
    }


def _flux_conditions(config: Config) -> Rows:
    return {**_sd3_conditions(config), **({"guidance": ()} if config.get("guidance_embeds") else {})}


def _dit_rows(config: Config) -> Classes:
    return int(config.get("num_embeds_ada_norm") or 1000) + 1, True  # its embedding has a row more, for "no class"


DIT = Family(_square, lambda config: {"class_labels": ()}, _dit_rows)
PIXART = Family(_square, _pixart_conditions)
FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(_square, _unet_conditions, _rows),
    "UNet2DConditionModel": Family(_square, _text_unet_conditions, _rows),
    "DiTTransformer2DModel": DIT,
    "PixArtTransformer2DModel": PIXART,
    "SD3Transformer2DModel": Family(_square, _sd3_conditions),
    "FluxTransformer2DModel": Family(_flux_shape, _flux_conditions, network=FluxNetwork, patch=2),
}
