"""The tables of diffusers' classes that are no solver on a grid: each written as the class steps, its quirks included.

They stand beside the registry, not in it: outside a pipeline the solvers that they are variants of do better.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from ..grid import Grid, Node, node_at
from ..plans import Plan, Weights
from ..schedule import NoiseSchedule
from ..solvers.first_order import build_ddim
from ..solvers.forms import ADAMS_BASHFORTH, Noise, Stored
from ..solvers.info import SolverInfo, entry
from ..solvers.shared import ends, eps_entry, row
from ..solvers.tape import STAY, Sum, Tape

OFF_LIST = "waived: the class steps to levels off its own list of times"


def build_ddim_strided(schedule: NoiseSchedule, grid: Grid, *, stride: int, eta: float = 0.0) -> Plan:
    """DDIMScheduler: from each of its times the state goes `stride` on, wherever its next time lies; below 0 is the end."""
    steps = [(a, _level(schedule, a.t - stride, grid.nodes[-1])) for a in grid.nodes[:-1]]
    plan = build_ddim(schedule, grid, eta=eta)
    if all(there.lam == node.lam for (_, there), node in zip(steps, grid.nodes[1:], strict=True)):
        return plan
    rows = tuple(build_ddim(schedule, Grid(step), eta=eta).rows[0] for step in steps)
    return replace(plan, rows=rows, mean=OFF_LIST, spread=OFF_LIST)


def build_pndm_by_calls(
    schedule: NoiseSchedule, grid: Grid, *, told: Sequence[float], stride: int, runge_kutta: bool, velocity: bool
) -> Plan:
    """PNDMScheduler on its list of calls (Liu et al. 2022): what it keeps goes into the formulas as it came, eps or v.

    The first calls are its start: twelve of three pseudo Runge-Kutta steps, or two of one step that is taken twice. It finds the
    level that a step starts from and goes to by the time that the call is told, so a list that begins later (image-to-image),
    or whose times are no `stride` apart, leaves the levels of the state behind; so does a combination of v of several levels.
    """
    tape, form = Tape(), Noise(schedule, "equal")
    kept: list[int] = []  # the calls that the multistep formula weighs, newest first
    shares: tuple[tuple[int, float], ...]
    for i, t in enumerate(told):
        node, begin, last = node_at(schedule, t), t, True
        if runge_kutta and i < 12:
            begin, after, last = told[i // 4 * 4], t - (0 if i % 2 else stride // 2), i % 4 == 3
            shares = ((i - 3, 1 / 6), (i - 2, 1 / 3), (i - 1, 1 / 3), (i, 1 / 6)) if last else ((i, 1.0),)
            kept = [i, *kept] if i % 4 == 0 else kept
        elif not runge_kutta and i == 1:
            begin, after, shares = t + stride, t, ((0, 1 / 2), (1, 1 / 2))
        else:
            after, kept, last = t - stride, [i, *kept][:4], runge_kutta or i > 0
            shares = tuple(zip(kept, ADAMS_BASHFORTH[len(kept)], strict=True))
        a, b = (_level(schedule, u, grid.nodes[-1]) for u in (begin, after))
        x, (size,) = form.weights([a], a, b)
        if velocity:  # eps = alpha v + sigma x, with the state that the step starts from
            x, size = x + size * a.sigma, size * a.alpha
        move = Sum(x, tuple((call, size * share) for call, share in shares))
        stored = ((node.alpha / node.sigma, -1 / node.sigma),) if velocity else form.store(node)
        tape.add(node, i, move, None if last else STAY, store=stored)
    kept_levels = not velocity and _in_step(grid, told, stride, runge_kutta)
    moments = "exact" if kept_levels else OFF_LIST
    first = node_at(schedule, told[0])
    return Plan("pndm", tuple(tape.rows), (first.alpha, first.sigma), ends(grid)["end"], order=2, mean=moments, spread=moments)


def _in_step(grid: Grid, told: Sequence[float], stride: int, runge_kutta: bool) -> bool:
    """Whether every step of the whole list ends where the next begins."""
    times = [node.t for node in grid.nodes[:-1]]
    even = all(a - b == stride for a, b in itertools.pairwise(times))
    return even and len(times) > 1 and told[0] == times[0] and not (runge_kutta and stride % 2)


def build_ipndm_from_noise(schedule: NoiseSchedule, grid: Grid) -> Plan:
    """IPNDMScheduler: the weights of equal steps on eps. At alpha = 0, where it divides 0 by 1e-8, what it keeps as eps is the
    state itself, and its first prediction goes nowhere."""
    rows = []
    for i, (a, b) in enumerate(itertools.pairwise(grid.nodes)):
        if a.alpha == 0.0:
            rows.append(row(a, Weights(b.sigma / a.sigma), store=((0.0, 1.0), (1 / a.sigma, 0.0))))
            continue
        size = b.sigma - b.alpha * a.u
        shares = ADAMS_BASHFORTH[min(i + 1, 4)]
        rows.append(row(a, Weights(b.alpha / a.alpha, tuple(size * s for s in shares)), store=eps_entry(a)))
    lost = "waived: IPNDMScheduler's first prediction goes nowhere"
    mean = lost if grid.nodes[0].alpha == 0.0 else "exact"
    return Plan("ipndm", tuple(rows), **ends(grid), order=2, mean=mean)


def build_heun_velocity(schedule: NoiseSchedule, grid: Grid) -> Plan:
    """FlowMatchHeunDiscreteScheduler: the trapezoidal rule on the velocity eps - x0 against sigma, Euler to the end."""
    tape = Tape()
    for i, (a, b) in enumerate(itertools.pairwise(grid.nodes)):
        step, last = b.sigma - a.sigma, b.sigma == 0.0
        tape.add(a, i, Sum(1.0, ((i, step),)), None if last else STAY, store=_velocity(a))
        if not last:
            again = (i, 1)
            tape.add(b, again, Sum(1.0, ((i, step / 2), (again, step / 2))), store=_velocity(b))
    return Plan("heun-velocity", tuple(tape.rows), **ends(grid), order=2)


def _velocity(node: Node) -> Stored:
    return ((1 / node.sigma, -(node.alpha + node.sigma) / node.sigma),)


def _level(schedule: NoiseSchedule, t: float, end: Node) -> Node:
    return end if t < 0 else node_at(schedule, t)


TABLES: dict[str, SolverInfo] = {
    info.name: info for info in (
        entry("ddim-strided", build_ddim_strided, 1, "diffusers"),
        entry("pndm-by-calls", build_pndm_by_calls, 2, "diffusers"),
        entry("ipndm-from-noise", build_ipndm_from_noise, 2, "diffusers"),
        entry("heun-velocity", build_heun_velocity, 2, "diffusers", nfe_per_step=2),
    )
}  # fmt: skip
