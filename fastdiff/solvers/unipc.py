"""UniPC (Zhao et al. 2023) and SA-Solver (Xue et al. 2023): each evaluation corrects the step that led to it, then predicts.

Solving the order conditions makes the predictor of order p an exponential Adams-Bashforth step through p points and the
corrector an Adams-Moulton step through the new one too, whatever UniPC's B(h) is. B(h) acts only where the authors fix the one
unknown to 1/2, in steps through two points: there "bh2", e^h - 1, is `Denoised`'s "midpoint", and "bh1", h, its "linear".
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import FastdiffError
from ..grid import Grid
from ..plans import Plan
from ..schedule import NoiseSchedule
from .forms import Denoised
from .loops import add_stages, begun, check_inner, stages, step
from .shared import ends, multistep_order, usable
from .tape import STAY, Sum, Tape

SECOND = {"bh1": "linear", "bh2": "midpoint"}


def build_unipc(
    schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], order: int, variant: str = "bh2", correct: bool = True,
    start: str = "ramp", lower_final: bool | None = None,
) -> Plan:  # fmt: skip
    """UniPC-p with B(h) "bh1" or "bh2", on the denoised prediction; `correct` False leaves the corrector out (UniP).

    The corrected state is the base; the order ramps up from 1 and, with `lower_final`, down to 1 (Zhao et al. 2023,
    algorithm 1): by default below 15 steps, since the last steps' lower order caps the whole at 2.
    """
    if variant not in SECOND:
        raise FastdiffError(f'variant must be "bh1" or "bh2"; given {variant!r}')
    lower = grid.steps < 15 if lower_final is None else lower_final
    form, tape = Denoised(second=SECOND[variant]), Tape()
    before: Sequence[int] = ()  # the evaluations that the step to this node went through; none where it needs no correction
    for i in range(grid.steps):
        a, b = grid.nodes[i], grid.nodes[i + 1]
        base = _corrected(form, grid, before, i, 0.0) if before else STAY
        if counts[i] > 1:
            check_inner(a, b)
            add_stages(tape, form, stages(Denoised(), schedule, a, b, counts[i], i), base=base)
            before = ()
            continue
        k = multistep_order(grid, i, order, lower)
        past = range(i, i - k, -1)
        point = step(form, [(j, grid.nodes[j]) for j in past], a, b)
        tape.add(a, i, base.then(point), base if correct else None)
        before = past if correct else ()
    # the corrector adds an order; the first step's (2, over one step) caps it at 3, a last step of order 1 at 2
    ramp = min(order + correct, 3 if correct and not lower_final else 2)
    full = min(order, 2) + (correct and order < 2) if lower_final else order + correct
    return Plan(f"unipc-{order}", tuple(tape.rows), **ends(grid), **begun(start, counts, ramp, full))


def _corrected(form: Denoised, grid: Grid, past: Sequence[int], i: int, fresh: float) -> Sum:
    """The step from node i - 1 to node i again, with the evaluation at i; `fresh` is the noise that it had."""
    a, b = grid.nodes[i - 1], grid.nodes[i]
    point = step(form, [(j, grid.nodes[j]) for j in (i, *past)], a, b)
    return Sum(point.x, point.h, ((i - 1, fresh),) if fresh else ())


def build_sa(
    schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], name: str, predictor: int = 2, corrector: int = 2,
    tau: float = 1.0, tau_min: float = 0.0, tau_max: float = float("inf"), lower_final: bool | None = None,
) -> Plan:  # fmt: skip
    """SA-Solver (algorithm 1): stochastic Adams of `predictor` and `corrector` points (0: none), noise strength tau where
    tau_min <= sigma/alpha <= tau_max and none elsewhere. The corrector keeps the predictor's noise. A node of two calls is
    evaluated again after its correction (PECE)."""
    if not (1 <= predictor <= 4 and 0 <= corrector <= 4 and tau >= 0.0 and tau_min <= tau_max):
        raise FastdiffError(f"sa-solver needs predictor 1 to 4, corrector 0 to 4, tau >= 0 and tau_min <= tau_max; given "
                            f"{predictor}, {corrector}, {tau}, {tau_min}, {tau_max}")  # fmt: skip
    lower = grid.steps < 15 if lower_final is None else lower_final
    tape, forms = Tape(), [_sa_form(tau if tau_min <= n.u <= tau_max else 0.0) for n in grid.nodes]
    for i in range(grid.steps):
        a, b = grid.nodes[i], grid.nodes[i + 1]
        k = multistep_order(grid, i, predictor, lower)
        point = step(forms[i], [(j, grid.nodes[j]) for j in range(i, i - k, -1)], a, b)
        fresh = forms[i].noise(a, b)
        base = STAY
        if i and corrector:
            # as many points as there are, less one a step towards the end
            points = min(corrector, 1 + max(1, usable(grid, i - 1)), grid.steps - i + 2 if lower else corrector)
            past = range(i - 1, i - points, -1)
            base = _corrected(forms[i - 1], grid, past, i, forms[i - 1].noise(grid.nodes[i - 1], a))
            if counts[i] == 2:
                tape.add(a, i, base)
                base = STAY
        nxt = Sum(point.x, point.h, ((i, fresh),) if fresh else ())
        tape.add(a, i, base.then(nxt), base if corrector else None, draw=(a.t, b.t) if fresh else None)
    noisy = any(row.draw is not None for row in tape.rows)
    return Plan(name, tuple(tape.rows), **ends(grid), order=min(corrector or predictor, 2), stochastic=noisy)


def _sa_form(tau: float) -> Denoised:
    return Denoised(tau**2, second="linear")
