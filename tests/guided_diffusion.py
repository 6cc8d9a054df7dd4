"""Small stand-ins for guided-diffusion's network, written from its interface: the names, parts and arithmetic that fd.patch knows
its blocks by, as improved-diffusion and latent-diffusion have them too."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class SiLU(nn.Module):  # improved-diffusion's
    def forward(self, x):
        return x * torch.sigmoid(x)


class Resample(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return F.interpolate(x, scale_factor=2) if self.factor == 2 else F.avg_pool2d(x, 2)


class ResBlock(nn.Module):
    def __init__(self, channels, emb_channels, dropout=0.0, out_channels=None, use_scale_shift_norm=False, factor=1, act=nn.SiLU):
        super().__init__()
        self.channels, self.emb_channels, self.dropout = channels, emb_channels, dropout
        self.out_channels = out = out_channels or channels
        self.use_conv = self.use_checkpoint = False
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(GroupNorm32(8, channels), act(), nn.Conv2d(channels, out, 3, padding=1))
        self.updown = factor != 1
        self.h_upd = self.x_upd = nn.Identity()
        if self.updown:
            self.h_upd, self.x_upd = Resample(factor), Resample(factor)
        self.emb_layers = nn.Sequential(act(), nn.Linear(emb_channels, (1 + use_scale_shift_norm) * out))
        last = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(GroupNorm32(8, out), act(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x, emb):
        return checkpoint(self._forward, x, emb, use_reentrant=False) if self.use_checkpoint else self._forward(x, emb)

    def _forward(self, x, emb):
        if self.updown:
            h = self.h_upd(self.in_layers[:-1](x))
            x = self.x_upd(x)
            h = self.in_layers[-1](h)
        else:
            h = self.in_layers(x)
        e = self.emb_layers(emb).type(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h


def attend(q, k, v):
    """Attention of (N, C, T), the scale's root on q and on k."""
    scale = q.shape[1] ** -0.25
    weight = torch.einsum("nct,ncs->nts", q * scale, k * scale)
    return torch.einsum("nts,ncs->nct", weight.float().softmax(-1).type(weight.dtype), v)


class QKVAttentionLegacy(nn.Module):
    """The heads before q, k and v."""

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        n, width, length = qkv.shape
        q, k, v = qkv.reshape(n * self.n_heads, -1, length).chunk(3, dim=1)
        return attend(q, k, v).reshape(n, width // 3, length)


class QKVAttention(nn.Module):
    """q, k and v before the heads."""

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        n, width, length = qkv.shape
        q, k, v = (part.reshape(n * self.n_heads, -1, length) for part in qkv.chunk(3, dim=1))
        return attend(q, k, v).reshape(n, width // 3, length)


class AttentionBlock(nn.Module):
    def __init__(self, channels, num_heads, legacy):
        super().__init__()
        self.norm, self.qkv = GroupNorm32(8, channels), nn.Conv1d(channels, 3 * channels, 1)
        self.attention = (QKVAttentionLegacy if legacy else QKVAttention)(num_heads)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        flat = x.flatten(2)
        return (flat + self.proj_out(self.attention(self.qkv(self.norm(flat))))).reshape(x.shape)


class UNetModel(nn.Module):
    """A way down, attention and a way up: every form of a block once."""

    def __init__(self, scale_shift=True, legacy=True, dropout=0.0, act=nn.SiLU):
        super().__init__()
        self.time_embed = nn.Linear(16, 24)  # first, and float32 in a float16 network, as theirs

        def block(channels, **options):
            return ResBlock(channels, 24, dropout, use_scale_shift_norm=scale_shift, act=act, **options)

        self.input_blocks = nn.ModuleList([block(16), block(16, factor=0.5), block(16, out_channels=32)])
        self.middle_block = AttentionBlock(32, 4, legacy)
        self.output_blocks = nn.ModuleList([block(32, factor=2)])
        self.out = nn.Sequential(GroupNorm32(8, 32), act(), nn.Conv2d(32, 3, 3, padding=1))

    def forward(self, x, t):
        emb = self.time_embed(torch.cos(t[:, None] * torch.arange(16, device=t.device) / math.pi))
        for block in self.input_blocks:
            x = block(x, emb)
        x = self.middle_block(x)
        for block in self.output_blocks:
            x = block(x, emb)
        return self.out(x)
