"""What a diffusion network is trained on: times, noise, target and weight, as functions of (batch, generator)."""

from __future__ import annotations

import math
from typing import Literal as L
from typing import get_args

import torch
from torch import Tensor

from ..errors import FastdiffError
from ..prediction import coefficients, joined, target
from ..schedule import NoiseSchedule

Weighting = L["simple", "edm", "min_snr"]
TimeSampling = L["uniform", "lognormal", "logit_normal"]


def check_names(weighting: str, times: str) -> None:
    """
    Raises:
        FastdiffError: an unknown weighting or time sampling.
    """
    for what, value, allowed in (("weighting", weighting, Weighting), ("time sampling", times, TimeSampling)):
        if value not in get_args(allowed):
            raise FastdiffError(f"unknown {what} {value!r}; allowed: {', '.join(get_args(allowed))}")


def sample_times(schedule: NoiseSchedule, n: int, how: str, generator: torch.Generator) -> Tensor:
    """(n,) float64 times, stratified: one draw in each n-th of the distribution (Kingma et al. 2021, I.1).

    uniform: in the schedule's own uniform time; lognormal: log(sigma/alpha) ~ N(-1.2, 1.2^2) (Karras et al. 2022,
    table 1); logit_normal: a standard normal through the logistic function (Esser et al. 2024, section 3.1). An integer
    time of a discrete model is drawn as one.
    """
    where = generator.device
    drawn = torch.rand(n, generator=generator, dtype=torch.float64, device=where)
    u = (torch.arange(n, dtype=torch.float64, device=where) + drawn) / n
    if how == "uniform":
        t = schedule.time_of_uniform(u).clamp(schedule.t_min, schedule.t_max)
    elif how == "lognormal":
        t = schedule.t_of_lam(1.2 - 1.2 * math.sqrt(2) * torch.erfinv(2 * u - 1)).clamp(schedule.t_min, schedule.t_max)
    elif how == "logit_normal":
        t = schedule.time_of_uniform(torch.special.ndtri(u).sigmoid()).clamp(schedule.t_min, schedule.t_max)
    else:
        raise FastdiffError(f"unknown time sampling {how!r}; allowed: {', '.join(get_args(TimeSampling))}")
    return t.round() if schedule.name == "vp_from_alphas_cumprod" else t


def weights(weighting: str, prediction: str, alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """The weight of |F - target|^2 for each level.

    simple: 1, the network's own output scaled as it is. edm: 1 as well, for EDM's c_out^2 cancels its weight
    (Karras et al. 2022, eq. 8), and otherwise the same x0 weight, 1/c_out_edm^2. min_snr: min(SNR, gamma) on x0
    (Hang et al. 2023, eq. 8), carried over to the output by c_out^2.
    """
    if weighting == "simple":
        return torch.ones_like(alpha)
    c_out2 = coefficients(prediction, alpha, sigma).c_out ** 2 if prediction != "x0" else torch.ones_like(alpha)
    if weighting == "edm":
        return c_out2 / coefficients("edm", alpha, sigma).c_out ** 2
    if weighting == "min_snr":
        return c_out2 * ((alpha / sigma) ** 2).clamp(max=gamma)
    raise FastdiffError(f"unknown weighting {weighting!r}; allowed: {', '.join(get_args(Weighting))}")


def noised(
    x0: Tensor, t: Tensor, schedule: NoiseSchedule, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_t, eps, alpha, sigma) for clean images (B, C, H, W) at times (B,); the levels shaped to broadcast, float32."""
    eps = torch.randn(x0.shape, generator=generator, device=x0.device)
    alpha = schedule.alpha(t).float().view(-1, 1, 1, 1)
    sigma = schedule.sigma(t).float().view(-1, 1, 1, 1)
    return alpha * x0 + sigma * eps, eps, alpha, sigma


__all__ = ["TimeSampling", "Weighting", "coefficients", "joined", "noised", "sample_times", "target", "weights"]
