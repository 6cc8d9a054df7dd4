"""The noisy classifier of ADM (Dhariwal and Nichol 2021, section 4) under guided-diffusion's state-dict names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import FastdiffError
from .unet import Norm, UNetConfig, encoder, time_embedding, timestep_embedding

POOLS = ("attention", "adaptive")


class AttentionPool(nn.Module):
    """(B, C, H, W) -> (B, out): one query, the mean, attends over all positions (Radford et al. 2021)."""

    def __init__(self, positions: int, channels: int, head_channels: int, out_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.empty(channels, positions + 1).normal_(std=channels**-0.5))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        flat = torch.cat([flat.mean(dim=-1, keepdim=True), flat], dim=-1) + self.positional_embedding
        b, c, length = flat.shape
        q, k, v = self.qkv_proj(flat).view(b, 3, self.heads, c // self.heads, length).transpose(-1, -2).unbind(1)
        h = ops.attention(q[:, :, :1], k, v)  # the mean's answer is the only one read
        return self.c_proj(h.transpose(-1, -2).reshape(b, c, 1))[:, :, 0]


class NoisyClassifier(nn.Module):
    """(x, t) -> logits of a noisy image: the U-Net's way down, and a pooling. `config.out_channels` counts the classes.

    Shapes: x (B, in_channels, side, side); t (B,) float, in the steps it was trained on; logits (B, classes).
    """

    def __init__(self, config: UNetConfig, side: int, pool: str = "attention") -> None:
        super().__init__()
        if pool not in POOLS:
            raise FastdiffError(f"a classifier's pooling is {' or '.join(POOLS)}; given {pool!r}")
        self.config = c = config
        self.time_embed = time_embedding(c)
        self.input_blocks, self.middle_block, skips = encoder(c)
        ch = skips[-1]
        last = side // 2 ** (len(c.channel_mult) - 1)
        if pool == "attention":
            self.out = nn.Sequential(Norm(ch), nn.SiLU(), AttentionPool(last**2, ch, c.head_channels, c.out_channels))
        else:
            average, linear = nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(ch, c.out_channels, 1)
            self.out = nn.Sequential(Norm(ch), nn.SiLU(), average, linear, nn.Flatten())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        h = x
        for block in (*self.input_blocks, self.middle_block):
            h = block(h, emb)
        return self.out(h)
