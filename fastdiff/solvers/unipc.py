"""UniPC (Zhao et al. 2023) with B(h) = e^h - 1 ("bh2"), on the denoised prediction.

Solving the order conditions makes the predictor of order p an exponential Adams-Bashforth step through p points and the
corrector an Adams-Moulton step through p + 1, whatever B(h) is. B(h) acts only where the authors fix the one unknown to 1/2:
in the predictor of order 2 and the corrector of order 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..grid import Grid, Node
from ..plans import IDENTITY, Plan, Weights
from ..schedule import NoiseSchedule
from .dpmpp import exponential_step, midpoint_step
from .shared import carry, ends, gain, multistep_order, row


def predictor(past: Sequence[Node], a: Node, b: Node) -> Weights:
    """UniP from a to b through the evaluations at `past`, newest first."""
    return midpoint_step(past[0].lam, past[1].lam, a, b) if len(past) == 2 else exponential_step(past, a, b)


def corrector(past: Sequence[Node], a: Node, b: Node) -> Weights:
    """UniC from a to b with the evaluation at b too: the history is b's, then `past`, newest first."""
    if len(past) == 1:
        half = gain(a, b) / 2
        return Weights(carry(a, b), (half, half))
    return exponential_step((b, *past), a, b)


def build_unipc(
    schedule: NoiseSchedule, grid: Grid, *, order: int, correct: bool = True, lower_final: bool | None = None
) -> Plan:
    """UniPC-p: each evaluation corrects the step that led to it, then predicts the next; no extra calls.

    The corrected state is the base; the order ramps up from 1 and, with `lower_final`, down to 1 (Zhao et al. 2023,
    algorithm 1): by default below 15 steps, since the last steps' lower order caps the whole at 2.
    """
    lower = grid.steps < 15 if lower_final is None else lower_final
    rows = []
    before = 0  # the order of the step that led to this node; 0 at the start, which needs no correction
    for i in range(grid.steps):
        a, b = grid.nodes[i], grid.nodes[i + 1]
        k = multistep_order(grid, i, order, lower)
        nxt = predictor(grid.nodes[i::-1][:k], a, b)
        if not correct:
            rows.append(row(a, nxt))
            continue
        base = corrector(grid.nodes[i - 1 :: -1][:before], grid.nodes[i - 1], a) if before else IDENTITY
        rows.append(row(a, _after(base, nxt), base))
        before = k
    # the corrector adds an order; the first step's (2, over one step) caps it at 3, a last step of order 1 at 2
    reached = min(order + correct, 3 if correct and not lower_final else 2)
    return Plan(f"unipc-{order}", tuple(rows), **ends(grid), order=reached)


def _after(first: Weights, then: Weights) -> Weights:
    """`then` applied to the result of `first`, both on the same history."""
    size = max(len(first.h), len(then.h))
    pad = [(*w.h, *(0.0,) * (size - len(w.h))) for w in (first, then)]
    return Weights(then.x * first.x, tuple(then.x * f + t for f, t in zip(*pad, strict=True)))
