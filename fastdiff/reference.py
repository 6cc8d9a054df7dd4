"""The reference executor: a plan's rows read literally, in float64 numpy, with growing lists and no registers.

It shares nothing with the compiled program and knows no torch: what every other executor is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .plans import Plan, Row, Weights


def run(
    plan: Plan, denoise: Callable[[np.ndarray, Row], Any], start: np.ndarray, noises: Sequence[np.ndarray] = ()
) -> list[np.ndarray]:
    """Every point that a row evaluates, in order, and last the sample; all of the start's shape.

    Args:
        denoise: (point, row) -> the denoised prediction at the row's time and level; where `row.var` is given a pair of it and
            the network's variance output.
        start: the state at the plan's start level.
        noises: the plan's draws in order, of the start's shape.
    """
    draws = iter(noises)
    base = np.asarray(start, np.float64)
    history: list[np.ndarray] = []  # newest first, as the weights are
    drawn = [np.asarray(next(draws), np.float64) for _ in plan.first.z]

    def total(w: Weights, x: np.ndarray) -> np.ndarray:
        terms = [(w.x, x), *zip(w.h, history, strict=False), *zip(w.z, drawn, strict=False)]
        return sum((weight * v for weight, v in terms if weight != 0.0), np.zeros_like(x))

    y = base = total(plan.first, base)
    points = []
    for row in plan.rows:
        points.append(y)
        d: Any = denoise(y, row) if row.calls else np.zeros_like(y)
        d, v = d if row.var is not None else (d, None)
        for p, q in row.store:
            history.insert(0, p * y + q * np.asarray(d, np.float64))
        if row.draw is not None:
            drawn.insert(0, np.asarray(next(draws), np.float64) * _factor(row, v))
        y, base = total(row.next, base), total(row.base, base)
    return [*points, y]


def _factor(row: Row, v: Any) -> Any:
    """What learned variance multiplies a noise by: its log is linear in v, row.var at v = -1 and 1."""
    if row.var is None:
        return 1.0
    low, high = row.var
    share = (np.asarray(v, np.float64) + 1) / 2
    return np.exp(share * high + (1 - share) * low)
