"""DPM-Solver++ (Lu et al. 2022b): exponential integrators of the denoised prediction in the log-SNR."""

from __future__ import annotations

from collections.abc import Sequence

from ..coeffs import exponential_integrals
from ..errors import FastdiffError
from ..grid import Grid, Node, node_at_lam
from ..plans import IDENTITY, Plan, Row, Weights
from ..schedule import NoiseSchedule
from .shared import carry, check_counts, ddim, ends, gain, multistep_order, row


def exponential_step(nodes: Sequence[Node], a: Node, b: Node) -> Weights:
    """The exact step for D interpolated in lam through `nodes` (newest first), which need not lie between a and b."""
    if len(nodes) == 1 or b.sigma == 0.0:
        return ddim(a, b)
    integrals = exponential_integrals([n.lam for n in nodes], a.lam, b.lam)
    return Weights(carry(a, b), tuple(b.alpha * w for w in integrals))


def midpoint_step(newer: float, older: float, a: Node, b: Node) -> Weights:
    """The second-order step of the papers: the slope of D between the log-SNRs `newer` and `older` enters with
    gain*h/2, its weight for small h, in place of the exact integral (Lu et al. 2022b, eq. 13)."""
    g = gain(a, b)
    slope = g * (b.lam - a.lam) / 2 / (newer - older)
    return Weights(carry(a, b), (g + slope, -slope))


def published_third_order(nodes: Sequence[Node], a: Node, b: Node) -> Weights:
    """The published third-order multistep update: the exact one with half the weight on the second difference.

    The single-step solver of the same paper has the factor 2 that this lacks; it measures order 2.
    """
    exact = exponential_step(nodes, a, b)
    second = [w / 2 for w in _second_difference(nodes, a, b)]
    return Weights(exact.x, tuple(w - s for w, s in zip(exact.h, second, strict=True)))


def _second_difference(nodes: Sequence[Node], a: Node, b: Node) -> list[float]:
    """The part of the exact weights that multiplies the second divided difference D[0,1,2] h^2, as weights on D."""
    l0, l1, l2 = (n.lam for n in nodes)
    h = b.lam - a.lam
    # moments of (lam - l0)^k e^(lam - b.lam): Lagrange through (0, h, 2h) holds polynomials up to degree 2 exactly
    at = exponential_integrals([0.0, h, 2 * h], 0.0, h)
    phi = b.alpha * sum(w * x * x for w, x in zip(at, (0.0, h, 2 * h), strict=True))
    return [phi / ((l0 - l1) * (l0 - l2)), phi / ((l1 - l0) * (l1 - l2)), phi / ((l2 - l0) * (l2 - l1))]


def build_multistep(
    schedule: NoiseSchedule, grid: Grid, *, order: int, published: bool = False, lower_final: bool | None = None
) -> Plan:
    """DPM-Solver++(kM): order 1 is DDIM, 2 the papers' midpoint form, 3 the exact interpolation.

    `lower_final` lowers the order over the last steps; by default below 15 steps, where it helps (Lu et al. 2022b, 5.3).
    """
    lower = grid.steps < 15 if lower_final is None else lower_final
    rows = []
    for i in range(grid.steps):
        a, b = grid.nodes[i], grid.nodes[i + 1]
        k = multistep_order(grid, i, order, lower)
        nodes = grid.nodes[i::-1][:k]
        if k == 2:
            w = midpoint_step(nodes[0].lam, nodes[1].lam, a, b)
        elif k == 3 and published:
            w = published_third_order(nodes, a, b)
        else:
            w = exponential_step(nodes, a, b)
        rows.append(row(a, w))
    name = f"dpmpp-{order}m" + ("-compat" if published else "")
    return Plan(name, tuple(rows), **ends(grid), order=min(order, 2))  # a first-order start caps it at 2


def build_singlestep(schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], order: int) -> Plan:
    """DPM-Solver++(kS): a step of c calls evaluates c - 1 points inside it, at lam + h/2 (c = 2), h/3 and 2h/3 (c = 3)."""
    check_counts(counts, grid, order)
    rows: list[Row] = []
    for i, count in enumerate(counts):
        a, b = grid.nodes[i], grid.nodes[i + 1]
        if count > 1 and (b.sigma == 0.0 or a.alpha == 0.0):
            raise FastdiffError(f"step {i} of {order}S has no finite log-SNR at an end: no inner points; give it 1 call")
        rows += STEPS[count](schedule, a, b)
    return Plan(f"dpmpp-{order}s", tuple(rows), **ends(grid), order=order)


def _one(schedule: NoiseSchedule, a: Node, b: Node) -> list[Row]:
    return [row(a, ddim(a, b))]


def _two(schedule: NoiseSchedule, a: Node, b: Node) -> list[Row]:
    mid = node_at_lam(schedule, (a.lam + b.lam) / 2)
    return [row(a, ddim(a, mid), IDENTITY), row(mid, ddim(a, b))]  # the whole step on the midpoint's prediction


def _three(schedule: NoiseSchedule, a: Node, b: Node) -> list[Row]:
    """Two-point interpolation is enough: with the second point at 2h/3 the third-order term cancels (Lu et al. 2022a, B.2)."""
    one, two = (node_at_lam(schedule, a.lam + r * (b.lam - a.lam)) for r in (1 / 3, 2 / 3))
    last = exponential_step((two, a), a, b)
    return [
        row(a, ddim(a, one), IDENTITY),
        row(one, exponential_step((one, a), a, two), IDENTITY),
        row(two, Weights(last.x, (last.h[0], 0.0, last.h[1]))),
    ]


STEPS = {1: _one, 2: _two, 3: _three}
