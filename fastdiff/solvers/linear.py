"""Linear multistep methods on eps in sigma/alpha: exact variable-step LMS, and iPNDM's fixed Adams-Bashforth weights."""

from __future__ import annotations

from ..coeffs import lagrange_integrals
from ..grid import Grid
from ..plans import Plan
from ..schedule import NoiseSchedule
from .shared import ddim, ends, eps_entry, eps_step, row, usable

# Adams-Bashforth for equal steps, by order (Liu et al. 2022, PNDM, eq. 12; Zhang and Chen 2022, DEIS, appendix B)
ADAMS_BASHFORTH = {
    1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}  # fmt: skip


def build_lms(schedule: NoiseSchedule, grid: Grid, *, order: int) -> Plan:
    """Adams-Bashforth with the weights of the actual steps (k-diffusion's LMS): eps interpolated in sigma/alpha."""
    return _build(grid, order, True, f"lms-{order}")


def build_ipndm(schedule: NoiseSchedule, grid: Grid, *, order: int) -> Plan:
    """The weights of equal steps on any grid (iPNDM): order 2 at best there, and strong at few calls."""
    return _build(grid, order, False, f"ipndm-{order}")


def _build(grid: Grid, order: int, exact: bool, name: str) -> Plan:
    rows = []
    for i in range(grid.steps):
        a, b = grid.nodes[i], grid.nodes[i + 1]
        k = min(order, usable(grid, i))
        if k == 0:  # alpha = 0: the step for a constant prediction
            rows.append(row(a, ddim(a, b)))
            continue
        if exact:
            us = [n.u for n in grid.nodes[i::-1][:k]]
            shares = [w / (b.u - a.u) for w in lagrange_integrals(us, a.u, b.u)]
        else:
            shares = list(ADAMS_BASHFORTH[k])
        rows.append(row(a, eps_step(a, b, shares), store=eps_entry(a)))
    reached = min(order, 2) if exact else 1 if order == 1 else 2
    return Plan(name, tuple(rows), **ends(grid), order=reached)
