"""Noise schedules: the levels (alpha, sigma) of x = alpha*x0 + sigma*eps as functions of a time t that grows with the noise.

Every formula is written once for numpy (float64 on the host, where grids and plans are made) and torch (a batch of times,
where training and adaptive steps need it): both namespaces share the few functions used here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .base import FAMILIES, NoiseSchedule, from_config, namespace
from .derived import Shifted, ZeroTerminalSNR
from .discrete import VPFromAlphasCumprod
from .other import EDM, VE, Flow, TrigFlow
from .vp import SubVP, VPCosine, VPLinear, VPScaledLinear, VPSigmoid

__all__ = [
    "EDM", "FAMILIES", "VE", "Flow", "NoiseSchedule", "Shifted", "SubVP", "TrigFlow", "VPCosine", "VPFromAlphasCumprod",
    "VPLinear", "VPScaledLinear", "VPSigmoid", "ZeroTerminalSNR", "edm", "flow", "from_config", "namespace", "sub_vp",
    "trigflow", "ve", "vp_cosine", "vp_from_alphas_cumprod", "vp_linear", "vp_scaled_linear", "vp_sigmoid",
]  # fmt: skip


def vp_from_alphas_cumprod(alphas_cumprod: Sequence[float] | torch.Tensor | np.ndarray) -> VPFromAlphasCumprod:
    """The schedule of a discrete-time model from its table of cumulative products of (1 - beta), least noisy first."""
    values = alphas_cumprod.tolist() if isinstance(alphas_cumprod, torch.Tensor | np.ndarray) else alphas_cumprod
    return VPFromAlphasCumprod(tuple(float(a) for a in values))


vp_linear: Callable[..., VPLinear] = VPLinear
vp_scaled_linear: Callable[..., VPScaledLinear] = VPScaledLinear
vp_cosine: Callable[..., VPCosine] = VPCosine
vp_sigmoid: Callable[..., VPSigmoid] = VPSigmoid
sub_vp: Callable[..., SubVP] = SubVP
ve: Callable[..., VE] = VE
edm: Callable[..., EDM] = EDM
flow: Callable[..., Flow] = Flow
trigflow: Callable[..., TrigFlow] = TrigFlow
