"""One-step methods on eps: the midpoint rule in log-SNR (DPM-2), with churn or ancestral noise, and classical Runge-Kutta."""

from __future__ import annotations

from collections.abc import Sequence

from ..grid import Grid
from ..plans import Plan
from ..schedule import NoiseSchedule
from .churn import Churn
from .dpmpp import check_eta
from .forms import Noise
from .loops import single_step
from .shared import call_counts, check_counts, ends


def build_dpm2(
    schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int],
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> Plan:  # fmt: skip
    """DPM-2: the whole step on eps at the geometric mean of both levels. DPM-Solver-2 (Lu et al. 2022a, algorithm 1) and, with
    the churn of Karras et al. 2022, k-diffusion's dpm_2."""
    check_counts(counts, grid, 2)
    churn = Churn(schedule, grid, s_churn, s_tmin, s_tmax, s_noise)
    tape = single_step(schedule, grid, Noise(schedule, "lam"), counts, churn=churn)
    return Plan("dpm-2", tuple(tape.rows), **ends(grid), first=churn.first, order=2, **churn.declarations)


def build_dpm2_ancestral(schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int], eta: float = 1.0) -> Plan:
    """DPM-2 to a lower noise level, lifted by fresh noise (k-diffusion's dpm_2_ancestral). eta in [0, 1]."""
    check_counts(counts, grid, 2)
    check_eta(eta)
    tape = single_step(schedule, grid, Noise(schedule, "lam"), counts, eta=eta)
    return Plan("dpm-2-ancestral", tuple(tape.rows), **ends(grid), order=2, stochastic=eta > 0)


def build_rk4(schedule: NoiseSchedule, grid: Grid, *, counts: Sequence[int]) -> Plan:
    """The classical Runge-Kutta method of order 4 in sigma/alpha; steps of fewer calls are Euler, the midpoint rule and Heun's
    third-order rule."""
    check_counts(counts, grid, 4)
    tape = single_step(schedule, grid, Noise(schedule, "u"), counts)
    return Plan("rk4", tuple(tape.rows), **ends(grid), order=4)


def fast_counts(calls: int, from_zero: bool, to_zero: bool) -> tuple[int, ...]:
    """The mixed orders of DPM-Solver-fast (Lu et al. 2022a, section 3.4): threes, then 2 and 1, or what is left."""
    if to_zero or (calls - from_zero) % 3 or calls - from_zero < 3:
        return call_counts(3, calls, None, from_zero, to_zero)
    return (*(1,) * from_zero, *(3,) * ((calls - from_zero) // 3 - 1), 2, 1)
