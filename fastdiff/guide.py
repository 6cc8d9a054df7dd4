"""Guidance: functions from Denoiser to Denoiser. scale 1 means no guidance (papers that write w mean scale - 1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import FastdiffError


class Guided(Denoiser):
    """A denoiser that combines the predictions of a conditional and a negative one: D_n + scale (D_c - D_n)."""

    def __init__(
        self, positive: Denoiser, negative: Denoiser, scale: float, interval: tuple[float, float], rescale: float
    ) -> None:
        self.__dict__.update(copy.copy(positive).__dict__)
        self.positive, self.negative = positive, negative
        self.scale, self.interval, self.rescale = scale, interval, rescale
        self.plan = None  # a plan tuned without guidance says nothing about this denoiser

    @property
    def guidance(self) -> float | None:
        return self.scale if self.interval == (0.0, math.inf) and not self.rescale else None

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Network calls an evaluation costs where guidance acts."""
        return self.positive.calls * (self.scale != 0.0) + self.negative.calls * (self.scale != 1.0)

    def calls_at(self, t: float) -> int:
        """Network calls of an evaluation at time t."""
        return self.calls if self._acts(t) else self.positive.calls

    def bind(self, **cond: Any) -> Denoiser:
        mine, others = self.positive.cond, self.negative.cond
        if contrast := [k for k in cond if mine.get(k) is not others.get(k)]:
            raise FastdiffError(f"guidance contrasts {', '.join(contrast)}: bind it before guide.cfg, or give it to cfg")
        return Guided(self.positive.bind(**cond), self.negative.bind(**cond), self.scale, self.interval, self.rescale)

    def _acts(self, t: float) -> bool:
        if self.interval == (0.0, math.inf):
            return True
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        low, high = self.interval
        return low * alpha < sigma <= high * alpha if math.isfinite(high) else low * alpha < sigma

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        if isinstance(t, Tensor):
            return self._guided_batch(x, t)
        if self.scale == 1.0 or not self._acts(t):
            return self.positive(x, t)
        if self.scale == 0.0:
            return self.negative(x, t)
        return self._combine(x, self.positive(x, t), self.negative(x, t))

    def with_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The guided prediction, and the conditional network's variance output (as diffusers' DiT pipeline takes it)."""
        if self.scale == 0.0 and self._acts(t):
            return self.negative.with_variance(x, t)
        d, v = self.positive.with_variance(x, t)
        return (d if self.scale == 1.0 or not self._acts(t) else self._combine(x, d, self.negative(x, t))), v

    def _combine(self, x: Tensor, d: Tensor, n: Tensor) -> Tensor:
        guided = torch.lerp(n, d, self.scale)
        if self.rescale:
            # Lin et al. 2023, eq. 15-16: towards the conditional prediction's own standard deviation
            dims = tuple(range(1, x.ndim))
            ratio = d.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
            guided = guided * (1 + self.rescale * (ratio - 1))
        return guided

    def _guided_batch(self, x: Tensor, t: Tensor) -> Tensor:
        """Times that differ between samples: guided where each sample's own level lies inside the interval."""
        everywhere = self.interval == (0.0, math.inf)
        if self.scale == 1.0:
            return self.positive(x, t)
        if self.scale == 0.0 and everywhere:
            return self.negative(x, t)
        d, n = self.positive(x, t), self.negative(x, t)
        guided = self._combine(x, d, n)
        if everywhere:
            return guided
        u = self.schedule.sigma(t.double()) / self.schedule.alpha(t.double())
        inside = ((u > self.interval[0]) & (u <= self.interval[1])).view(-1, *(1,) * (x.ndim - 1))
        return torch.where(inside, guided, d)


def cfg(
    denoiser: Denoiser,
    scale: float,
    cond: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    interval: tuple[float, float] = (0.0, math.inf),
    rescale: float = 0.0,
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022): D_negative + scale (D_cond - D_negative).

    Args:
        scale: a student that takes the scale as an input (Meng et al. 2023) gets it bound: one call, and its plan stays.
        cond, negative: conditioning bound to the two evaluations; a class-conditional network of our own needs no
            `negative`: its null class is used.
        interval: sigma/alpha range (low, high] where guidance acts; elsewhere one call (Kynkäänniemi et al. 2024).
        rescale: 0 to 1, how far the guided prediction is scaled back (Lin et al. 2023, section 3.4).

    Raises:
        FastdiffError: no negative condition where the network has no null class; scale or rescale not finite or negative.
    """
    if not (math.isfinite(scale) and scale >= 0 and 0 <= rescale <= 1 and interval[0] < interval[1]):
        given = f"{scale}, {rescale}, {interval}"
        raise FastdiffError(f"guidance needs scale >= 0, rescale in [0, 1] and a rising interval; given {given}")
    positive = denoiser.bind(**(cond or {}))
    if getattr(denoiser.network, "guidance_range", None) is not None:
        return _as_input(positive, scale, plain=negative is None and interval == (0.0, math.inf) and not rescale)
    if negative is None:
        null = getattr(denoiser.network, "null_label", None)
        labels = positive.cond.get("class_labels")
        if null is None or labels is None:
            raise FastdiffError("guidance needs negative={...}: this network has no null class, or no class_labels are bound")
        negative = {"class_labels": torch.full_like(labels, null)}
    return Guided(positive, denoiser.bind(**negative), float(scale), interval, float(rescale))


def _as_input(denoiser: Denoiser, scale: float, plain: bool) -> Denoiser:
    low, high = denoiser.network.guidance_range  # type: ignore[attr-defined]
    if not plain:
        raise FastdiffError("a student of guidance takes its scale as an input: no negative=, interval= or rescale=")
    if not low <= scale <= high:
        raise FastdiffError(f"this student knows guidance scales {low:g} to {high:g}; given {scale:g}")
    return denoiser.bind(guidance=float(scale))
