"""Guidance by gradients: a classifier on noisy samples, or any differentiable loss on the denoised prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from .wrapped import Wrapped

Level = Any  # a float, or a tensor that broadcasts against x


class ByGradient(Wrapped):
    """D plus scale times a gradient; `through` says where it is taken: at the noisy sample, or at the prediction alone."""

    def __init__(
        self, inner: Denoiser, function: Callable[..., Tensor], scale: float, targets: Mapping[str, Any], *,
        noisy: bool, through: bool,
    ) -> None:  # fmt: skip
        if not math.isfinite(scale):
            raise FastdiffError(f"guidance needs a finite scale; given {scale}")
        super().__init__(inner, dict(targets))
        self.function, self.scale, self.noisy, self.through = function, float(scale), noisy, through

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        alpha, sigma = levels(self.schedule, x, t)
        if self.scale == 0.0 or (isinstance(alpha, float) and alpha == 0.0 and (self.noisy or self.through)):
            return self.inner(x, t)  # at alpha = 0 the sample tells nothing: the gradient is 0
        if self.noisy:
            gradient = self._gradient(lambda y: self.function(y, t, **self.targets), x)
            return self.inner(x, t) + gradient * self._finite(sigma**2 / alpha, alpha)
        if self.through:
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                d = self.inner(y, t)
                (gradient,) = torch.autograd.grad(self._total(self.function(d, **self.targets), x), y)
            return d.detach() - gradient * self._finite(self.scale * sigma**2 / alpha, alpha)
        d = self.inner(x, t)
        gradient = self._gradient(lambda y: self.function(y, **self.targets), d)
        return d - gradient * (sigma**2 / (alpha**2 + sigma**2))

    def _gradient(self, function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
        with torch.enable_grad():
            y = at.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._total(function(y), at), y)
        return gradient * self.scale

    def _total(self, values: Tensor, x: Tensor) -> Tensor:
        """The sum over the batch, so that each sample's gradient is its own."""
        if values.shape != (len(x),):
            raise FastdiffError(f"a guiding function must return ({len(x)},), one number a sample; given {tuple(values.shape)}")
        if not values.requires_grad:
            raise FastdiffError("the guiding function does not depend on its input in a differentiable way: nothing to guide by")
        return values.sum()

    @staticmethod
    def _finite(weight: Level, alpha: Level) -> Level:
        return torch.where(alpha > 0, weight, 0.0) if isinstance(weight, Tensor) else weight


def levels(schedule: Any, x: Tensor, t: float | Tensor) -> tuple[Level, Level]:
    """alpha and sigma at t: floats, or tensors (B, 1, ...) in x's dtype."""
    if not isinstance(t, Tensor):
        return float(schedule.alpha(t)), float(schedule.sigma(t))
    ones = (1,) * (x.ndim - 1)
    a, s = (torch.as_tensor(v(t.double())).to(x.dtype).view(-1, *ones) for v in (schedule.alpha, schedule.sigma))
    return a, s


def classifier(denoiser: Denoiser, log_prob: Callable[..., Tensor], scale: float = 1.0, **targets: Any) -> ByGradient:
    """Classifier guidance (Dhariwal and Nichol 2021, eq. 13): D + scale sigma^2/alpha grad_x log p(c | x).

    Args:
        log_prob: `(x, t, **targets) -> (B,)`, a classifier trained on noisy samples x; t as the denoiser gets it.
        scale: 0 is no guidance, 1 Bayes' rule.
        targets: what it is asked for (labels=...), one a sample.

    Raises:
        FastdiffError: log_prob that returns no (B,) or has no gradient; scale not finite.
    """
    return ByGradient(denoiser, log_prob, scale, targets, noisy=True, through=False)


def loss(denoiser: Denoiser, function: Callable[..., Tensor], scale: float, through: bool = True, **targets: Any) -> ByGradient:
    """Guidance down a loss on the denoised prediction: an image-text score (CLIP), a classifier of clean images, a distance.

    Args:
        function: `(x0, **targets) -> (B,)`, differentiable, on predictions in the model's own data range.
        scale: 0 is no guidance; with loss = -log p(c | x0) 1 is Bayes' rule to first order.
        through: the gradient goes through the network, D - scale sigma^2/alpha grad_x loss(D(x)) (Bansal et al. 2023): exact
            for linear losses. Otherwise the network's derivative is taken to be that for unit-variance Gaussian data,
            D - scale sigma^2/(alpha^2 + sigma^2) grad loss(D): one pass, no activations kept, and rougher.

    Raises:
        FastdiffError: as `classifier`.
    """
    return ByGradient(denoiser, function, scale, targets, noisy=False, through=through)
