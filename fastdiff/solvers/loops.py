"""The two loops that all families share, over a form: steps with stages of their own, and steps through earlier evaluations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from ..errors import FastdiffError
from ..grid import Grid, Node
from ..schedule import NoiseSchedule
from .churn import Churn
from .forms import Form
from .shared import multistep_order, quiet
from .tape import STAY, Sum, Tape

Stage = tuple[Node, Hashable, Sum]  # where to evaluate, its name, and the point that follows
Begin = Callable[[Node, Node, int, int], list[Stage]]


def step(form: Form, entries: Sequence[tuple[Hashable, Node]], a: Node, b: Node) -> Sum:
    """The form's step from a to b through the evaluations `entries`, newest first; without its noise."""
    x, h = form.weights([node for _, node in entries], a, b)
    return Sum(x, tuple((key, w) for (key, _), w in zip(entries, h, strict=True)))


def stages(form: Form, schedule: NoiseSchedule, a: Node, b: Node, calls: int, i: int) -> list[Stage]:
    """One step of `calls` evaluations, the last of which leads to b; its order is `calls`, for every form.

    Inner points lie at 1/2 (two calls) or 1/3 and 2/3 (three) of the form's coordinate. For three, two-point interpolation is
    enough: with the second point at 2/3 the third-order term cancels (Heun's third-order rule; Lu et al. 2022a, B.2). Four is
    the classical Runge-Kutta method in the coordinate whose measure is uniform.
    """
    start = (i, a)
    if calls == 1:
        return [(a, i, step(form, [start], a, b))]
    if calls == 2:
        mid = ((i, 1), form.inner(schedule, a, b, 1 / 2))
        return [(a, i, step(form, [start], a, mid[1])), (mid[1], mid[0], step(form, [mid], a, b))]
    if calls == 3:
        one, two = (((i, j), form.inner(schedule, a, b, j / 3)) for j in (1, 2))
        return [
            (a, i, step(form, [start], a, one[1])),
            (one[1], one[0], step(form, [one, start], a, two[1])),
            (two[1], two[0], step(form, [two, start], a, b)),
        ]
    half = form.middle(schedule, a, b)
    x, (total,) = form.weights([a], a, b)
    shares = ((i, 1 / 6), ((i, 1), 1 / 3), ((i, 2), 1 / 3), ((i, 3), 1 / 6))
    return [
        (a, i, step(form, [start], a, half)),
        (half, (i, 1), step(form, [((i, 1), half)], a, half)),
        (half, (i, 2), step(form, [((i, 2), half)], a, b)),
        (b, (i, 3), Sum(x, tuple((key, total * s) for key, s in shares))),
    ]


def add_stages(
    tape: Tape, form: Form, found: Sequence[Stage], draw: tuple[float, float] | str | None = None, base: Sum = STAY
) -> None:
    """The rows of a step from the base, or from `base` of it (a corrected state); those before its last leave it as it is."""
    for j, (node, key, point) in enumerate(found):
        under, last = base if j == 0 else STAY, j == len(found) - 1
        tape.add(node, key, under.then(point), None if last else under, store=form.store(node), draw=draw if last else None)


def multistep(
    schedule: NoiseSchedule, grid: Grid, form: Form, order: int, *,
    counts: Sequence[int] | None = None, lower_final: bool = False, begin: Begin | None = None,
) -> Tape:  # fmt: skip
    """Every step through the last `order` evaluations at nodes, fewer at the start and, with `lower_final`, at the end.

    `counts` gives the first steps calls of their own, as `begin` takes them: by default one-step methods of the same form.
    """
    tape = Tape()
    for i in range(grid.steps):
        a, b = grid.nodes[i], grid.nodes[i + 1]
        if counts is not None and counts[i] > 1:
            check_inner(a, b)
            found = begin(a, b, counts[i], i) if begin else stages(form, schedule, a, b, counts[i], i)
            add_stages(tape, form, found)
            continue
        k = multistep_order(grid, i, order, lower_final, form.to_clean)
        point = step(form, [(j, grid.nodes[j]) for j in range(i, i - k, -1)], a, b)
        add_step(tape, form, a, b, i, point)
    return tape


def add_step(tape: Tape, form: Form, a: Node, b: Node, i: int, point: Sum) -> None:
    """A row of one call, with the form's noise."""
    fresh = form.noise(a, b)
    z = ((i, fresh),) if fresh else ()
    tape.add(a, i, Sum(point.x, point.h, z), store=form.store(a), draw=(a.t, b.t) if fresh else None)


def single_step(
    schedule: NoiseSchedule, grid: Grid, form: Form, counts: Sequence[int], *, eta: float = 0.0, churn: Churn | None = None
) -> Tape:
    """Steps of `counts` calls; with eta each goes to a lower noise level and is lifted by fresh noise (ancestral), with churn
    each starts at a raised level."""
    tape = Tape()
    for i, count in enumerate(counts):
        a, b = churn.level(i) if churn else grid.nodes[i], grid.nodes[i + 1]
        if count > 1:
            check_inner(a, b)
        below, up = quiet(a, b, eta)
        *inner, (node, key, point) = stages(form, schedule, a, below, count, i)
        draw: tuple[float, float] | str | None = (a.t, b.t) if up else None
        last = Sum(point.x, point.h, ((key, up),) if up else ())
        if churn and churn.lifts(i + 1):
            scale, fresh = churn.lift(i + 1)
            last, draw = Sum(point.x * scale, point.scaled(scale).h, ((key, fresh),)), churn.draw(i + 1)
        add_stages(tape, form, [*inner, (node, key, last)], draw=draw)
    return tape


def check_inner(a: Node, b: Node) -> None:
    """Inner points need a finite log-SNR at both ends of their step."""
    if b.sigma == 0.0 or a.alpha == 0.0:
        raise FastdiffError(f"the step from t = {a.t:g} has no finite log-SNR at an end: no inner points; give it 1 call")


def begun(start: str, counts: Sequence[int], order: int, full: int) -> dict[str, Any]:
    """The order of a multistep plan, and what its start costs: `order` with the ramp, `full` with the Runge-Kutta start."""
    if start not in ("ramp", "rk"):
        raise FastdiffError(f'start must be "ramp" (no extra calls) or "rk"; given {start!r}')
    if start == "ramp":
        return {"order": order}
    return {"order": full, "provenance": {"start": "rk", "start_calls": sum(counts) - len(counts)}}
