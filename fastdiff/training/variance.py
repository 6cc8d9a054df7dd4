"""The variational bound that trains a learned variance (Nichol and Dhariwal 2021, improved DDPM, section 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..schedule import NoiseSchedule


def bound(schedule: NoiseSchedule, x0: Tensor, x: Tensor, d: Tensor, v: Tensor, t: Tensor, steps: int) -> Tensor:
    """KL(q(x_s | x_t, x_0) | p(x_s | x_t)) of each sample (B,), in bits a dimension, for steps of 1/`steps` of the time range.

    x is the noisy sample at t (B,), d the denoised prediction, v in [-1, 1] the network's second output: log of the variance runs
    from the posterior's at -1 to that of the forward step at 1 (eq. 15). Only v gets gradients, as in the hybrid objective
    (eq. 16). The chain ends at t_min, where the noise left is below a grey level, so there is no decoder term; times less than
    one step above t_min count 0.
    """
    step = (schedule.t_max - schedule.t_min) / steps
    inside = t >= schedule.t_min + step
    t = t.clamp_min(schedule.t_min + step)
    shape = (-1, *(1,) * (x.ndim - 1))
    a_t, s_t, a_s, s_s = (f(time).view(shape) for time in (t, t - step) for f in (schedule.alpha, schedule.sigma))
    forward = s_t.square() - (a_t / a_s * s_s).square()  # the variance that one forward step adds
    posterior = forward * (s_s / s_t).square()
    shift = a_s * forward / s_t.square() * (x0 - d.detach()).double()  # between the two means, which share their x_t part
    share = (v.double() + 1) / 2
    log_var = share * forward.log() + (1 - share) * posterior.log()
    excess = posterior.log() - log_var
    kl = 0.5 * (excess.exp() - 1 - excess + shift.square() * torch.exp(-log_var))
    return torch.where(inside, kl.flatten(1).mean(dim=1) / math.log(2), 0.0).float()
