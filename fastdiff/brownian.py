"""One Brownian path a seed, the same whatever the steps: N and 2N steps of an SDE solver see increments of one path.

The path runs in the signal-to-noise ratio c = alpha^2/sigma^2: there the noise of the reverse-time SDE is a Brownian increment
(x alpha/sigma^2 gains B(c_b) - B(c_a) in an ancestral step), so that for a constant prediction the sample does not change with
the number of steps at all, and for any other it converges. It is a Lévy bridge over a fixed tree of log-SNRs (Li et al. 2020,
torchsde's virtual Brownian tree; k-diffusion's samplers use one in sigma): a value depends on its seed and its place alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import FastdiffError
from .noise import NoiseSource, check_seeds, normal
from .plans import Plan

LOWEST, HIGHEST = -16.0, 16.0  # log-SNRs that the tree spans
DEPTH = 14  # bisections: its leaves are 0.002 wide; steps far below that see a smooth path
FIRST_DRAW = 2**32  # its normals come after all that plans draw by number


class Path:
    """The paths of a batch, (B, count) float64 each, at any log-SNR."""

    def __init__(self, seeds: Sequence[int], count: int, device: torch.device) -> None:
        self.seeds, self.count, self.device = seeds, count, device
        low, high = self._clock(LOWEST), self._clock(HIGHEST)
        self.low = self._normal(0) * math.sqrt(low)
        self.high = self.low + self._normal(1) * math.sqrt(high - low)
        self.kept: dict[int, Tensor] = {}  # values at the bisections of the last descent: the next one shares most of them
        self.last: tuple[float, Tensor] | None = None  # the last value: a step begins where the one before ended

    @staticmethod
    def _clock(lam: float) -> float:
        return math.exp(2 * lam)

    def _normal(self, place: int) -> Tensor:
        return normal(self.seeds, FIRST_DRAW + place, self.count, self.device).double()

    def at(self, lam: float) -> Tensor:
        """B(e^(2 lam)); 0 at alpha = 0."""
        if lam > HIGHEST:
            raise FastdiffError(f"a Brownian path reaches log-SNR {HIGHEST:g}; asked at {lam:g}")
        if lam == -math.inf:
            return torch.zeros_like(self.low)
        c = self._clock(lam)
        if lam < LOWEST:
            return _bridge(c, 0.0, self._clock(LOWEST), torch.zeros_like(self.low), self.low, self._normal(2 ** (DEPTH + 1) + 2))
        left, right, b_left, b_right = LOWEST, HIGHEST, self.low, self.high
        if self.last is not None and self.last[0] == lam:
            return self.last[1]
        place, seen = 1, {}
        for _ in range(DEPTH):
            middle = (left + right) / 2
            kept = self.kept.get(place)
            if kept is None:
                kept = self._between(middle, left, right, b_left, b_right, place)
            seen[place] = kept
            upper = lam >= middle
            left, right = (middle, right) if upper else (left, middle)
            b_left, b_right = (kept, b_right) if upper else (b_left, kept)
            place = 2 * place + upper
        self.kept, self.last = seen, (lam, self._between(lam, left, right, b_left, b_right, place))
        return self.last[1]

    def _between(self, lam: float, left: float, right: float, b_left: Tensor, b_right: Tensor, place: int) -> Tensor:
        clock = self._clock
        return _bridge(clock(lam), clock(left), clock(right), b_left, b_right, self._normal(place + 1))


def _bridge(c: float, low: float, high: float, b_low: Tensor, b_high: Tensor, z: Tensor) -> Tensor:
    """A Brownian motion at c, given its values at low and high."""
    part = (c - low) / (high - low)
    return b_low + part * (b_high - b_low) + math.sqrt((c - low) * (1 - part)) * z


def shared_path(seeds: Sequence[int], plan: Plan) -> NoiseSource:
    """The noise of a plan from one path a seed: a draw with an interval is the path's increment over it, scaled to unit variance;
    the start and "free" draws (churn, restart, Langevin) are the seed's own, as without a path."""
    seeds = check_seeds(seeds)
    levels = {row.t: (row.alpha, row.sigma) for row in plan.rows}
    intervals = ["free"] * len(plan.first.z) + [row.draw for row in plan.rows if row.draw is not None]
    path: Path | None = None

    def lam(t: float) -> float:
        alpha, sigma = levels.get(t, plan.end)
        return math.log(alpha / sigma) if alpha else -math.inf

    def source(draw: int, shape: Sequence[int], device: torch.device) -> Tensor:
        nonlocal path
        count = math.prod(shape[1:])
        interval = intervals[draw - 1] if draw else "free"
        if isinstance(interval, str):
            return normal(seeds, draw, count, device).view(*shape)
        if path is None:
            path = Path(seeds, count, device)
        start, end = (lam(t) for t in interval)
        size = math.sqrt(math.exp(2 * end) - math.exp(2 * start))
        before = path.at(start)
        return ((path.at(end) - before) / size).float().view(*shape)

    return source
