"""What keeps a denoised prediction inside the range of the data: clipping, and Imagen's dynamic thresholding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from .wrapped import Wrapped


class Limited(Wrapped):
    """A denoiser whose prediction is changed by a function of it alone."""

    def __init__(self, inner: Denoiser, limit: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inner)
        self.limit = limit

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        return self.limit(self.inner(x, t))

    def choices(self, t: float) -> tuple[Any, ...]:
        return self.inner.choices(t)

    def with_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        d, v = self.inner.with_variance(x, t)
        return self.limit(d), v


def clip(denoiser: Denoiser, low: float | None = None, high: float | None = None) -> Limited:
    """Static thresholding: predictions cut to [low, high], by default the data's own range."""
    low, high = (denoiser.data_range[0] if low is None else low), (denoiser.data_range[1] if high is None else high)
    if not low < high:
        raise FastdiffError(f"clip needs low < high; given {low}, {high}")
    return Limited(denoiser, lambda d: d.clamp(low, high))


def threshold(denoiser: Denoiser, quantile: float = 0.995, largest: float = math.inf) -> Limited:
    """Dynamic thresholding of every prediction (Saharia et al. 2022, Imagen, section 2.3), in the data's own range.

    Raises:
        FastdiffError: a quantile outside (0, 1], or `largest` below 1.
    """
    if not (0 < quantile <= 1 and largest >= 1):
        raise FastdiffError(f"threshold needs a quantile in (0, 1] and largest >= 1; given {quantile}, {largest}")
    low, high = denoiser.data_range
    middle, half = (low + high) / 2, (high - low) / 2
    return Limited(denoiser, lambda d: dynamic_threshold((d - middle) / half, quantile, largest) * half + middle)


def dynamic_threshold(d: Tensor, quantile: float, largest: float = math.inf) -> Tensor:
    """Each sample of d (B, ...) cut to [-s, s] and divided by s, where s is that quantile of its |d|, at least 1 and at most
    `largest`. A sample that stays inside [-1, 1] comes back as it was."""
    ordered = d.flatten(1).abs().sort(dim=1).values
    # the two order statistics around the quantile, which torch.quantile interpolates for up to 2^24 elements only
    place = quantile * (ordered.shape[1] - 1)
    below = math.floor(place)
    s = torch.lerp(ordered[:, below], ordered[:, min(below + 1, ordered.shape[1] - 1)], place - below)
    s = s.clamp(1.0, largest).view(-1, *(1,) * (d.ndim - 1))
    return d.clamp(-s, s) / s
