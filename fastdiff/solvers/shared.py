"""The moves that solvers share: the exact step for a constant prediction, with or without fresh noise, and its corrections.

Weights are written in (alpha, sigma), never through a division by alpha, so that alpha = 0 and sigma = 0 need no special case.
A step from level a to level b with D constant is x_b = (sigma_b/sigma_a) x_a + (alpha_b - alpha_a sigma_b/sigma_a) D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import FastdiffError
from ..grid import Grid, Node
from ..plans import X0_ENTRY, Row, Weights


def carry(a: Node, b: Node) -> float:
    """sigma_b/sigma_a: what the exact step keeps of the state."""
    return b.sigma / a.sigma


def gain(a: Node, b: Node) -> float:
    """alpha_b - alpha_a sigma_b/sigma_a = alpha_b (1 - e^-h): the exact step's weight on a constant prediction."""
    return b.alpha - a.alpha * b.sigma / a.sigma


def ddim(a: Node, b: Node) -> Weights:
    """The exact step for constant D, on (base, newest D): DDIM, Euler in sigma/alpha and first-order DPM-Solver++ alike."""
    return Weights(carry(a, b), (gain(a, b),))


def quiet(a: Node, b: Node, eta: float = 1.0) -> tuple[Node, float]:
    """A node below b, and the fresh noise that lifts it to b's level (Song et al. 2020, DDIM, eq. 16).

    The fresh part eta sigma_b sqrt(1 - e^-2h) is at once DDIM's sigma(eta), k-diffusion's sigma_up and, at eta = 1, the
    standard deviation of the DDPM posterior.
    """
    if not eta:
        return b, 0.0
    ratio = a.alpha * b.sigma / (a.sigma * b.alpha)  # e^-h
    up = eta * b.sigma * math.sqrt(max((1 - ratio) * (1 + ratio), 0.0))
    return Node(b.t, b.alpha, math.sqrt(max((b.sigma - up) * (b.sigma + up), 0.0))), up


def ancestral(a: Node, b: Node, eta: float = 1.0) -> Weights:
    """`ddim` to a lower noise level, with fresh noise up to b's."""
    below, up = quiet(a, b, eta)
    w = ddim(a, below)
    return Weights(w.x, w.h, (up,) if up else ())


def eps_entry(node: Node) -> tuple[tuple[float, float], ...]:
    """The store that keeps eps = (x - alpha D)/sigma; at alpha = 0, where eps holds no prediction, D itself."""
    return X0_ENTRY if node.alpha == 0.0 else ((1 / node.sigma, -node.alpha / node.sigma),)


def row(node: Node, nxt: Weights, base: Weights | None = None, **fields: object) -> Row:
    """A row at a node; without `base`, later rows build on the next point itself (a multistep method)."""
    return Row(node.t, node.alpha, node.sigma, nxt, nxt if base is None else base, **fields)  # type: ignore[arg-type]


def ends(grid: Grid) -> dict[str, Any]:
    """The plan's start and end levels."""
    first, last = grid.nodes[0], grid.nodes[-1]
    return {"start": (first.alpha, first.sigma), "end": (last.alpha, last.sigma)}


def usable(grid: Grid, i: int) -> int:
    """How many evaluations, of those at nodes 0..i, a stencil in log-SNR or sigma/alpha may hold: not one at alpha = 0."""
    return i + (grid.nodes[0].alpha > 0.0)


def multistep_order(grid: Grid, i: int, order: int, lower_final: bool, to_clean: bool = False) -> int:
    """The order of step i: a ramp at the start, 1 on the way to sigma = 0 (but `to_clean`), and a ramp down to the end where
    asked for."""
    remaining = grid.steps - i
    if grid.nodes[i + 1].sigma == 0.0 and not to_clean:
        return 1
    return max(1, min(order, usable(grid, i), remaining if lower_final else order))


def call_counts(order: int, calls: int | None, steps: int | None, first: bool, last: bool) -> tuple[int, ...]:
    """Calls of each step of a single-step method: `order` each, but 1 in the first step and the last where the flags say so.

    Given a number of calls, a remainder that fills no whole step becomes one lower-order step, before the last.
    """
    if calls is None:
        assert steps is not None
        first, last = first and steps > last, last
        return (1,) * first + (order,) * (steps - first - last) + (1,) * last
    first = first and calls > last
    whole, rest = divmod(calls - first - last, order)
    return (1,) * first + (order,) * whole + ((rest,) if rest else ()) + (1,) * last


def start_counts(
    first: Sequence[int], calls: int | None, steps: int | None, from_zero: bool, to_zero: bool
) -> tuple[int, ...]:
    """Calls of each step of a multistep method whose first steps take `first` calls and all others one.

    From alpha = 0 the start comes after the first step; a step to sigma = 0 is never part of it. Given a number of calls, the
    steps are as few as can hold them, and the latest steps of the start give up what is too much.
    """
    pattern = (1,) * from_zero + tuple(first)

    def full(n: int) -> list[int]:
        return [*pattern[: n - to_zero], *(1,) * (n - len(pattern[: n - to_zero]))]

    if calls is None:
        assert steps is not None
        return tuple(full(steps))
    n = next(n for n in range(1, calls + 1) if sum(full(n)) >= calls)
    counts = full(n)
    for i in reversed(range(n)):
        counts[i] -= min(counts[i] - 1, sum(counts) - calls)
    return tuple(counts)


def check_counts(counts: Sequence[int], grid: Grid, order: int) -> None:
    """One count a step, each from 1 to `order`."""
    if len(counts) != grid.steps or not all(1 <= c <= order for c in counts):
        raise FastdiffError(f"{grid.steps} steps need {grid.steps} call counts from 1 to {order}; given {tuple(counts)}")
