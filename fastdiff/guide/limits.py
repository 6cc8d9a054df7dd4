"""What keeps a denoised prediction inside the range of the data: clipping, and Imagen's dynamic thresholding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clip_to(d: Tensor, limit: float) -> Tensor:
    """d with every element cut to [-limit, limit]."""
    return d.clamp(-limit, limit)


def dynamic_threshold(d: Tensor, quantile: float, largest: float = math.inf) -> Tensor:
    """Each sample of d (B, ...) cut to [-s, s] and divided by s, where s is that quantile of its |d|, at least 1 and at most
    `largest` (Saharia et al. 2022, Imagen, section 2.3). A sample that stays inside [-1, 1] comes back as it was."""
    flat = d.flatten(1).abs()
    # torch.quantile refuses more than 2^24 elements; the two order statistics around the quantile are what it interpolates
    place = quantile * (flat.shape[1] - 1)
    below = math.floor(place)
    ordered = flat.sort(dim=1).values
    s = torch.lerp(ordered[:, below], ordered[:, min(below + 1, flat.shape[1] - 1)], place - below)
    s = s.clamp(1.0, largest).view(-1, *(1,) * (d.ndim - 1))
    return d.clamp(-s, s) / s
