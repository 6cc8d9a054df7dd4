"""Inputs of the GroupNorm ops: far from zero mean, every parameter of its own."""

import torch


def tensor(shape, dtype=torch.float32, seed=0, channels_last=False):
    x = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3).to(dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.to(memory_format=formats[len(shape)]) if channels_last else x


def arguments(x, groups, affine="weight bias scale", silu=True):
    """(groups, weight, bias, eps, scale, shift, silu); scale and shift are halves of one tensor, as networks have them."""
    batch, channels = x.shape[:2]
    weight, bias = (tensor((channels,), x.dtype, seed=s) for s in (10, 11))
    scale, shift = tensor((batch, 2 * channels), x.dtype, seed=12).chunk(2, 1)
    return [
        groups, weight if "weight" in affine else None, bias if "bias" in affine else None, 1e-5,
        *((scale, shift) if "scale" in affine else (None, None)), silu,
    ]  # fmt: skip


def embedding(x):
    """What is added to every position, (B, C)."""
    return tensor(x.shape[:2], x.dtype, seed=13)
