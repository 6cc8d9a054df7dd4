"""DPM-Solver++ (Lu et al. 2022b) and its relatives: exponential integrators of the denoised prediction in the log-SNR."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence

from ..errors import FastdiffError
from ..grid import Grid, Node
from ..plans import Plan
from ..schedule import NoiseSchedule
from .forms import Denoised
from .loops import add_stages, begun, check_inner, multistep, single_step, stages, step
from .shared import check_counts, ends, quiet
from .tape import STAY, Sum, Tape


def build_multistep(
    schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], order: int, second: str = "midpoint",
    published: bool = False, name: str = "dpmpp", start: str = "ramp", lower_final: bool | None = None,
) -> Plan:  # fmt: skip
    """DPM-Solver++(kM): order 1 is DDIM, 2 the papers' midpoint form, 3 the exact interpolation; with `second` "exact" the
    exponential Adams-Bashforth methods that RES calls multistep (Zhang et al. 2023, RES, eq. 20).

    `lower_final` lowers the order over the last steps; by default below 15 steps, where it helps (Lu et al. 2022b, 5.3).
    """
    lower = grid.steps < 15 if lower_final is None else lower_final
    form = Denoised(second=second, published=published)
    begin = functools.partial(stages, Denoised(), schedule)
    tape = multistep(schedule, grid, form, order, counts=counts, lower_final=lower, begin=begin)
    reached = begun(start, counts, min(order, 2), 2 if published or lower else order)  # a first-order start caps it at 2
    return Plan(f"{name}-{order}m" + ("-compat" if published else ""), tuple(tape.rows), **ends(grid), **reached)


def build_singlestep(schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], order: int) -> Plan:
    """DPM-Solver++(kS): a step of c calls evaluates c - 1 points inside it, at lam + h/2 (c = 2), h/3 and 2h/3 (c = 3)."""
    check_counts(counts, grid, order)
    tape = single_step(schedule, grid, Denoised(), counts)
    return Plan(f"dpmpp-{order}s", tuple(tape.rows), **ends(grid), order=order)


def build_blocks(schedule: NoiseSchedule, grid: Grid, *, order: int) -> Plan:
    """DPM-Solver++(kS) with the grid's own nodes as inner points (diffusers' DPMSolverSinglestepScheduler): blocks of `order`
    intervals, every point in a block reached from the block's start, the last blocks shorter (Lu et al. 2022a, section 3.4)."""
    tape, first = Tape(), 0
    for i in range(grid.steps):
        left, done = grid.steps - first, i - first  # from the block's start to the end; and the points evaluated in the block
        length = order if left > order else max(1, left - 1) if left == order else left
        a, b = grid.nodes[first], grid.nodes[i + 1]
        entries = [(i, grid.nodes[i])] + ([(first, a)] if done else [])
        if b.sigma == 0.0 or (done and a.alpha == 0.0):
            entries = [(i, grid.nodes[i])]
        point = step(Denoised(second="midpoint" if done == 1 else "exact"), entries, a, b)
        ends_block = done + 1 == length
        tape.add(grid.nodes[i], i, point, None if ends_block else STAY)
        first = i + 1 if ends_block else first
    return Plan(f"dpmpp-{order}s-grid", tuple(tape.rows), **ends(grid), order=2)


def check_eta(eta: float, most: float = 1.0) -> None:
    if not 0.0 <= eta <= most:
        raise FastdiffError(f"eta must lie in [0, {most:g}]; given {eta}")


def build_2s_ancestral(schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], eta: float = 1.0) -> Plan:
    """DPM-Solver++(2S) to a lower noise level, lifted by fresh noise (k-diffusion). eta in [0, 1]."""
    check_counts(counts, grid, 2)
    check_eta(eta)
    tape = single_step(schedule, grid, Denoised(), counts, eta=eta)
    return Plan("dpmpp-2s-ancestral", tuple(tape.rows), **ends(grid), order=2, stochastic=eta > 0)


def build_sde(
    schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], eta: float = 1.0, one_path: bool = True
) -> Plan:
    """DPM-Solver++ SDE (k-diffusion's dpmpp_sde, r = 1/2): the midpoint is reached with noise, the whole step on its prediction
    with noise of its own. Both belong to one Brownian path: the step's contains the midpoint's as the exact SDE has it (at
    eta = 1; k-diffusion's Brownian tree gives nearly that). Without `one_path` they are independent, and the weak order is 1.
    eta in [0, 1]."""
    check_counts(counts, grid, 2)
    check_eta(eta)
    tape, form = Tape(), Denoised()
    for i, count in enumerate(counts):
        a, b = grid.nodes[i], grid.nodes[i + 1]
        (below, up), shared = quiet(a, b, eta), 0.0
        entry: tuple[Hashable, Node] = (i, a)
        if count == 2:
            check_inner(a, b)
            mid = form.inner(schedule, a, b, 1 / 2)
            low, lift = quiet(a, mid, eta)
            point = step(form, [entry], a, low)
            tape.add(a, i, Sum(point.x, point.h, ((i, lift),) if lift else ()), STAY, draw=(a.t, mid.t) if lift else None)
            entry = ((i, 1), mid)
            shared = 1 / math.sqrt(1 + math.exp(b.lam - a.lam)) if one_path and lift else 0.0  # the correlation of the two
        point = step(form, [entry], a, below)
        z = ((entry[0], up * math.sqrt((1 - shared) * (1 + shared))), *(((i, up * shared),) if shared else ()))
        last = Sum(point.x, point.h, z if up else ())
        add_stages(tape, form, [(entry[1], entry[0], last)], draw=((mid.t if shared else a.t), b.t) if up else None)
    weak = 1 if eta and not one_path else 2
    return Plan("dpmpp-sde", tuple(tape.rows), **ends(grid), order=weak, stochastic=eta > 0)


def build_multistep_sde(
    schedule: NoiseSchedule, grid: Grid, *, order: int, published: bool = False, eta: float = 1.0,
    second: str = "midpoint", lower_final: bool = False,
) -> Plan:  # fmt: skip
    """SDE-DPM-Solver++(kM) (Lu et al. 2022b, eq. 18; k-diffusion's dpmpp_2m_sde and dpmpp_3m_sde): eta = 0 is the ODE, eta = 1
    the reverse-time SDE, larger values more noise. `second` "midpoint" or "exact" (k-diffusion's "heun") is the second-order
    step."""
    check_eta(eta, most=float("inf"))
    if second not in ("midpoint", "exact"):
        raise FastdiffError(f'second must be "midpoint" or "exact"; given {second!r}')
    form = Denoised(eta, second=second, published=published)
    tape = multistep(schedule, grid, form, order, lower_final=lower_final)
    name = f"dpmpp-{order}m-sde" + ("-compat" if published else "")
    return Plan(name, tuple(tape.rows), **ends(grid), order=min(order, 2), stochastic=eta > 0)
