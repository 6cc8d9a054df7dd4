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
PROBE = 32  # samples on which the steps are found; the others are computed once, with those
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
    probe, steps = min(PROBE, n), FIRST_STEPS
    x = endpoints(steps, probe)
    while True:
        steps *= 2
        finer = endpoints(steps, probe)
        movement = rmse(finer, x)
        x = finer
        smallest = min((rmse(s[:probe], x) for s in solutions), default=1.0)
        if movement <= FRACTION * smallest or steps >= MOST_STEPS:
            return Converged(x if probe == n else endpoints(steps, n), steps, movement)


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
