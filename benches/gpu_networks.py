"""The networks that the stages `unet` and `sampler` run, and how they run without our kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from gpu_timing import DEVICE
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


def shipped() -> nn.Module:
    return Labelled(fd.load("fashion-mnist").network)


def sd_shaped() -> nn.Module:
    return UNet(SD_SHAPED)


def sd_by_diffusers() -> nn.Module:
    """Stable Diffusion 1.5's own configuration, random weights."""
    import diffusers

    return WithText(diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64))


# Name -> what makes the network, one sample's shape; diffusers' own only where it is installed
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "sd-1.5-shaped, ours": (sd_shaped, (4, 64, 64)),
    "fashion-mnist": (shipped, (1, 28, 28)),
}
if importlib.util.find_spec("diffusers"):
    NETWORKS["sd-1.5, diffusers"] = (sd_by_diffusers, (4, 64, 64))


@lru_cache(1)
def prepared(name: str) -> nn.Module:
    """A network on the GPU in bfloat16."""
    torch.manual_seed(0)
    with DEVICE:
        network = NETWORKS[name][0]().to(DEVICE, torch.bfloat16).eval().requires_grad_(False)
    for p in network.parameters():
        if not p.any():  # layers that start at zero would hide what lies before them
            nn.init.normal_(p, std=0.02)
    return network


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
