"""CFG++ (Chung et al. 2024): the guided prediction, noised on with the unconditional noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..plans import Plan
from .classifier_free import EVERYWHERE, Guided, conditions


class GuidedByPlan(Guided):
    """Classifier-free guidance whose scale depends on the level that the row leads to."""

    scales: Mapping[float, float]

    @property
    def guidance(self) -> float | None:
        return None

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.positive.calls + self.negative.calls

    def choices(self, t: float) -> tuple[Any, ...]:
        return (self.scales.get(t), *super().choices(t))

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        scale = self.scales.get(float(t)) if not isinstance(t, Tensor) else None
        if scale is None:
            raise FastdiffError("guide.cfgpp is made for one plan and knows its times alone: sample with that plan")
        d, n = self._both(x, t)
        return torch.lerp(n, d, scale)

    def with_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        raise FastdiffError("guide.cfgpp does not go with learned variance: sample with a deterministic plan")


def cfgpp(
    denoiser: Denoiser, scale: float, plan: Plan, cond: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None, batched: bool | None = None,
) -> Guided:  # fmt: skip
    """CFG++ as classifier-free guidance with a scale a row: alpha' scale / (alpha' - alpha sigma'/sigma), the next level primed.

    That is Chung et al. 2024, algorithm 2 (x' = alpha' D_guided + sigma' eps_negative), for a first-order step; higher-order
    plans take the same predictions. scale lies in [0, 1], 0 the negative condition alone, 1 renoising the conditional prediction.

    Raises:
        FastdiffError: a scale outside [0, 1], no negative condition; at the call, a time that is not the plan's.
    """
    if not 0.0 <= scale <= 1.0:
        raise FastdiffError(f"cfgpp needs a scale in [0, 1]; given {scale}")
    positive, other = conditions(denoiser, cond, negative)
    made = GuidedByPlan(positive, other, float(scale), EVERYWHERE, batched=batched)
    made.scales = {t: factor * scale for t, factor in factors(plan).items()}
    return made


def factors(plan: Plan) -> dict[float, float]:
    """1 / (1 - e^-h) by a row's time, h to the next level below it in the plan: alpha' over the exact step's weight on D."""
    levels = [(row.alpha, row.sigma) for row in plan.rows] + [plan.end]
    found = {}
    for i, row in enumerate(plan.rows):
        # stages at the same level and restarts lead up or nowhere: what counts is the next level that is less noisy
        lower = next((b for b in levels[i + 1 :] if b[1] * row.alpha < row.sigma * b[0]), None)
        if lower is None or not math.isfinite(ratio := row.alpha * lower[1] / (row.sigma * lower[0])):
            raise FastdiffError(f"plan {plan.name} leads to no lower level from time {row.t:g}: cfgpp has no scale there")
        found[row.t] = 1 / (1 - ratio)
    return found
