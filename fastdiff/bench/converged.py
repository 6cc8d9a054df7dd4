"""The converged ODE: the endpoints that every solver of the probability flow approaches from the same noise.

Converged means that doubling the steps moves the endpoints by less than a tenth of the smallest error reported beside them.
A small model's field is rough in t, so this takes hundreds of steps; the shipped model comes with its own endpoints, made by
`make artefacts`, and any other model pays for them once.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import CheckpointError
from ..shipped import FASHION_MNIST, read_verified

SOLVER, GRID = "dpmpp-2m", "beta"  # of four pairs tried on the shipped model the one that settled with the fewest steps
FIRST_STEPS, MOST_STEPS = 40, 640
FRACTION = 0.1  # of the smallest error: what doubling the steps may move
PROBE = 32  # samples on which the steps are found, before all samples confirm them
SHIPPED_FILE = "converged.npz"


@dataclass(frozen=True)
class Converged:
    """Endpoints (n, *shape), the steps that gave them, and how far the last doubling of the steps moved them (RMSE)."""

    x: Tensor
    steps: int
    movement: float

    def ok_for(self, smallest: float) -> bool:
        """Whether they are fine enough to measure an error of that size against."""
        return self.movement <= FRACTION * smallest


def rmse(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).square().mean().sqrt())


def converge(endpoints: Callable[[int, int], Tensor], n: int, solutions: Sequence[Tensor]) -> Converged:
    """Doubles the steps until the endpoints are fine enough for the smallest error among the solutions, each (n, *shape).

    `endpoints(steps, count)` gives the reference solver's samples of the first `count` seeds.
    """
    found, steps = None, FIRST_STEPS
    for count in (min(PROBE, n), n):  # the few say where to begin with all
        found = _double(endpoints, count, steps, solutions)
        steps = found.steps // 2
    assert found is not None
    return found


def _double(endpoints: Callable[[int, int], Tensor], count: int, steps: int, solutions: Sequence[Tensor]) -> Converged:
    """Doubles the steps, beginning with `steps`, until the endpoints of `count` seeds settle."""
    x = endpoints(steps, count)
    while True:
        steps *= 2
        finer = endpoints(steps, count)
        found = Converged(finer, steps, rmse(finer, x))
        smallest = min((rmse(s[:count], finer) for s in solutions), default=1.0)
        if found.ok_for(smallest) or steps >= MOST_STEPS:
            return found
        x = finer


def shipped(denoiser: Denoiser, n: int) -> Converged | None:
    """The stored endpoints of seeds 0..n-1, classes in turn, no guidance, where `denoiser` is the shipped model."""
    try:
        data = read_verified(FASHION_MNIST / SHIPPED_FILE)
    except CheckpointError:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as f:
        about, x = json.loads(str(f["about"])), f["x"]
    if about["checkpoint"] != denoiser.hash or n > len(x):
        return None
    return Converged(torch.from_numpy(x[:n]), about["steps"], about["movement"])
