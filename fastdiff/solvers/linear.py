"""Methods on eps with d(sigma/alpha): linear multistep (LMS, iPNDM, PLMS, PNDM, gradient estimation), DEIS and DPM-Solver."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from ..errors import FastdiffError
from ..grid import Grid, Node, node_at
from ..plans import Plan
from ..schedule import NoiseSchedule
from .forms import Noise
from .loops import Stage, begun, multistep, single_step, stages, step
from .shared import check_counts, ends, usable
from .tape import Sum, Tape


def build_lms(schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], order: int, start: str = "ramp") -> Plan:
    """Adams-Bashforth with the weights of the actual steps (k-diffusion's LMS): eps interpolated in sigma/alpha."""
    tape = multistep(schedule, grid, Noise(schedule, "u"), order, counts=counts)
    return Plan(f"lms-{order}", tuple(tape.rows), **ends(grid), **begun(start, counts, min(order, 2), order))


def build_ipndm(schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], order: int, start: str = "ramp") -> Plan:
    """The weights of equal steps on any grid (iPNDM): order 2 at best there, and strong at few calls."""
    begin = functools.partial(stages, Noise(schedule, "u"), schedule)
    tape = multistep(schedule, grid, Noise(schedule, "equal"), order, counts=counts, begin=begin)
    return Plan(f"ipndm-{order}", tuple(tape.rows), **ends(grid), **begun(start, counts, min(order, 2), min(order, 2)))


def build_exponential(
    schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], order: int, coordinate: str = "lam",
    second: str = "exact", name: str = "", start: str = "ramp", lower_final: bool | None = None,
) -> Plan:  # fmt: skip
    """Multistep methods of exponential integrators on eps: DEIS interpolates it in time (tAB) or in log(sigma/alpha) (log-rho;
    Zhang and Chen 2022, eq. 15 and appendix B); DPM-Solver in the log-SNR, which is the same, but for its own second-order step
    (Lu et al. 2022a, appendix D). `lower_final`: below 15 steps by default, as diffusers has it."""
    lower = grid.steps < 15 if lower_final is None else lower_final
    begin = functools.partial(stages, Noise(schedule, coordinate), schedule)
    form = Noise(schedule, coordinate, second)
    tape = multistep(schedule, grid, form, order, counts=counts, lower_final=lower, begin=begin)
    reached = begun(start, counts, min(order, 2), min(order, 2) if lower else order)
    return Plan(name.format(order), tuple(tape.rows), **ends(grid), **reached)


class _HalfTime(Noise):
    """Runge-Kutta steps through the middle in time, as PNDM takes them."""

    def middle(self, schedule: NoiseSchedule, a: Node, b: Node) -> Node:
        return node_at(schedule, (a.t + b.t) / 2)


def build_pndm(schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int]) -> Plan:
    """PNDM (Liu et al. 2022, algorithm 2): three pseudo Runge-Kutta steps of four calls, then the weights of equal steps."""
    begin = functools.partial(stages, _HalfTime(schedule, "u"), schedule)
    tape = multistep(schedule, grid, Noise(schedule, "equal"), 4, counts=counts, begin=begin)
    return Plan("pndm", tuple(tape.rows), **ends(grid), order=2, provenance={"start_calls": sum(counts) - len(counts)})


def build_plms(schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int]) -> Plan:
    """PLMS (Liu et al. 2022, with the start of latent diffusion and Stable Diffusion): the first step is taken twice, the second
    time with the mean of eps at both ends; then the weights of equal steps."""
    form = Noise(schedule, "equal")

    def heun(a: Node, b: Node, calls: int, i: int) -> list[Stage]:
        x, (total,) = form.weights([a], a, b)
        again = (i, 1)
        return [(a, i, step(form, [(i, a)], a, b)), (b, again, Sum(x, ((i, total / 2), (again, total / 2))))]

    tape = multistep(schedule, grid, form, 4, counts=counts, begin=heun)
    return Plan("plms", tuple(tape.rows), **ends(grid), order=2, provenance={"start_calls": sum(counts) - len(counts)})


def build_gradient_estimation(schedule: NoiseSchedule, grid: Grid, *, gamma: float = 2.0) -> Plan:
    """eps replaced by gamma eps + (1 - gamma) eps of the node before (Permenter and Yuan 2024, algorithm 2)."""
    if not math.isfinite(gamma):
        raise FastdiffError(f"gamma must be finite; given {gamma}")
    tape, form = Tape(), Noise(schedule, "u")
    for i in range(grid.steps):
        a, b = grid.nodes[i], grid.nodes[i + 1]
        point = step(form, [(i, a)], a, b)
        if usable(grid, i) > 1 and b.sigma > 0.0:
            (_, total), = point.h
            point = Sum(point.x, ((i, gamma * total), (i - 1, (1 - gamma) * total)))
        tape.add(a, i, point, store=form.store(a))
    return Plan("gradient-estimation", tuple(tape.rows), **ends(grid))


def build_dpm_singlestep(schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], order: int, name: str) -> Plan:
    """DPM-Solver-k (Lu et al. 2022a, algorithms 1, 2 and 5.2): DPM-Solver++(kS) on eps."""
    check_counts(counts, grid, order)
    tape = single_step(schedule, grid, Noise(schedule, "lam"), counts)
    return Plan(name, tuple(tape.rows), **ends(grid), order=order)
