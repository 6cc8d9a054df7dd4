"""The converged ODE: the endpoints that every solver of the probability flow approaches from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

SOLVER, GRID = "dpmpp-3m", "uniform_lambda"
FIRST_STEPS, MOST_STEPS = 40, 640
FRACTION = 0.1  # doubling the steps may move the endpoints by at most this fraction of the smallest error reported


@dataclass(frozen=True)
class Converged:
    """Endpoints (n, *shape), the steps that gave them, and how far the last doubling of the steps moved them (RMSE)."""

    x: Tensor
    steps: int
    movement: float
    ok: bool


def rmse(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).square().mean().sqrt())


def converge(endpoints: Callable[[int, int], Tensor], n: int, probe: int, solutions: list[Tensor]) -> Converged:
    """Doubles the steps until that moves the endpoints little enough for the smallest error among `solutions`.

    Args:
        endpoints: (steps, count) -> the reference solver's samples of the first `count` seeds.
        n: samples wanted.
        probe: samples on which the movement is measured; the others are computed once, with the steps found there.
        solutions: what the errors will be reported of, each (n, *shape).
    """
    probe, steps = min(probe, n), FIRST_STEPS
    x = endpoints(steps, probe)
    while True:
        steps *= 2
        finer = endpoints(steps, probe)
        movement = rmse(finer, x)
        x = finer
        smallest = min((rmse(s[:probe], x) for s in solutions), default=float("inf"))
        ok = movement <= FRACTION * smallest
        if ok or steps >= MOST_STEPS:
            return Converged(x if probe == n else endpoints(steps, n), steps, movement, ok)
