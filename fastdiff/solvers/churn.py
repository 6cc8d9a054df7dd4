"""Churn: noise added before a step, up to a higher level (Karras et al. 2022, algorithm 2), folded into the rows of a plan."""

from __future__ import annotations

import math
from typing import Any

from ..errors import FastdiffError
from ..grid import Grid, Node, node_at_lam
from ..plans import IDENTITY, Weights
from ..schedule import NoiseSchedule


def lift_between(low: Node, high: Node) -> tuple[float, float]:
    """What a state at `low` is scaled by, and the noise added, to reach the noisier level `high` (with alpha above 0)."""
    return high.alpha / low.alpha, high.alpha * math.sqrt((high.u - low.u) * (high.u + low.u))


class Churn:
    """The raised levels of a grid and the weights that reach them. Without churn every method returns what it was given.

    A step i starts at `level(i)` instead of the grid's node. The noise that lifts the state there belongs to the row before
    (`land`), or to the plan's `first` for step 0.
    """

    def __init__(
        self, schedule: NoiseSchedule, grid: Grid, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
    ) -> None:
        if s_churn < 0 or s_noise < 0 or s_tmin > s_tmax:
            raise FastdiffError(f"churn needs s_churn >= 0, s_noise >= 0 and s_tmin <= s_tmax; given {s_churn}, {s_noise}, "
                                f"{s_tmin}, {s_tmax}")  # fmt: skip
        self.s_noise = s_noise
        self.nodes = grid.nodes
        self.raised = list(grid.nodes)
        gamma = min(s_churn / grid.steps, math.sqrt(2) - 1)
        ceiling = math.exp(-float(schedule.lam(schedule.t_max))) if float(schedule.alpha(schedule.t_max)) else math.inf
        for i, node in enumerate(grid.nodes[:-1]):
            u = min(node.u * (1 + gamma), ceiling)  # never above what the network was trained at
            if s_tmin <= node.u <= s_tmax and node.u * (1 + 1e-9) < u < math.inf:  # less is the rounding of the ceiling
                self.raised[i] = node_at_lam(schedule, -math.log(u))

    def level(self, i: int) -> Node:
        return self.raised[i]

    def lifts(self, i: int) -> bool:
        return self.raised[i] is not self.nodes[i]

    def lift(self, i: int) -> tuple[float, float]:
        """What the state at node i is scaled by, and the noise added, to reach the level where step i starts."""
        scale, noise = lift_between(self.nodes[i], self.raised[i])
        return scale, noise * self.s_noise

    @property
    def first(self) -> Weights:
        if not self.lifts(0):
            return IDENTITY
        scale, noise = self.lift(0)
        return Weights(scale, (), (noise,))

    def land(self, w: Weights, i: int) -> tuple[Weights, Weights]:
        """(next, base) of the row that arrives at node i: both lifted to the level where step i starts."""
        if self.lifts(i):
            scale, noise = self.lift(i)
            w = Weights(w.x * scale, tuple(h * scale for h in w.h), (noise,))
        return w, w

    def draw(self, i: int) -> str | None:
        """The noise to draw on the way to step i: none where nothing is lifted."""
        return "free" if self.lifts(i) else None

    @property
    def declarations(self) -> dict[str, Any]:
        churned = any(self.lifts(i) for i in range(len(self.nodes)))
        waived = churned and self.s_noise != 1.0
        return {"stochastic": churned, "spread": f"waived: s_noise = {self.s_noise:g}" if waived else "exact"}
