"""The networks that the stages `unet` and `sampler` run, and how they run without our kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff import ops
from fastdiff.kernels import attention, group_norm
from fastdiff.models.unet import UNet, UNetConfig

# Stable Diffusion 1.5's widths and depth in our own U-Net: self-attention at the first three levels, no text
SD_SHAPED = UNetConfig(
    in_channels=4, out_channels=4, model_channels=320, channel_mult=(1, 2, 4, 4), attention=(1, 2, 4), num_heads=8,
    use_scale_shift_norm=False,
)  # fmt: skip


class WithText(nn.Module):
    """diffusers' text-conditional U-Net as (x, t) -> prediction, under one fixed text of 77 tokens."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("text", torch.randn(1, 77, 768))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, self.text.expand(len(x), -1, -1), return_dict=False)[0]


class Labelled(nn.Module):
    """The shipped class-conditional U-Net as (x, t) -> prediction."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, torch.zeros(len(x), dtype=torch.int64, device=x.device))


def shipped() -> tuple[nn.Module, tuple[int, ...]]:
    den = fd.load("fashion-mnist")
    assert den.shape is not None
    return Labelled(den.network), den.shape


def sd_shaped() -> tuple[nn.Module, tuple[int, ...]]:
    return UNet(SD_SHAPED), (4, 64, 64)


def sd_by_diffusers() -> tuple[nn.Module, tuple[int, ...]]:
    """Stable Diffusion 1.5's own configuration, random weights."""
    import diffusers

    return WithText(diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)), (4, 64, 64)


def networks() -> dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]]:
    """Name -> network and one sample's shape; diffusers' own only where it is installed."""
    found = {"fashion-mnist": shipped, "sd-1.5-shaped, ours": sd_shaped}
    if importlib.util.find_spec("diffusers"):
        found["sd-1.5, diffusers"] = sd_by_diffusers
    else:
        print("diffusers is not installed: Stable Diffusion 1.5's widths in our own U-Net stand for it")
    return found


@contextmanager
def plain() -> Iterator[None]:
    """fastdiff's own modules with torch's operations, as if there were no kernels."""
    norm_silu, attend = ops.group_norm_silu, ops.attention

    def torchs(x, groups, weight, bias, eps=1e-5, scale=None, shift=None, silu=True, residual=None):
        return group_norm.reference(
            x if residual is None else x + residual, group_norm.Norm(groups, weight, bias, eps, scale, shift, silu)
        )

    ops.group_norm_silu, ops.attention = torchs, attention.reference
    try:
        yield
    finally:
        ops.group_norm_silu, ops.attention = norm_silu, attend
