"""Where learning starts from when nobody says."""

from __future__ import annotations

from dataclasses import replace

from ..plans import Plan
from ..schedule import NoiseSchedule
from ..solvers import plan

SOLVERS = ("unipc-3", "unipc-2", "dpmpp-3m", "ipndm-3")
RIVALS = (("ipndm-2", "beta"), ("ipndm-3", "beta"))  # the best hand-made plans at few calls, though not to start from


def starts(schedule: NoiseSchedule) -> list[tuple[str, str]]:
    """Solvers and grids, the best of which by validation is tuned.

    The grid matters more than the solver: a call spent at the least noisy level, where most grids end, hardly moves away by
    gradients, so the best plan as it stands is not the best to start from.
    """
    grid = "karras" if schedule.name in ("ve", "edm") else "uniform_t"
    return [(solver, grid) for solver in SOLVERS]


def rivals(schedule: NoiseSchedule, nfe: int) -> list[Plan]:
    """Hand-made plans to beat beside the starts."""
    if schedule.name in ("ve", "edm"):
        return []  # on the starts' own grid already
    return [replace(plan(solver, schedule, nfe, grid=grid), name=f"{solver} · {grid}") for solver, grid in RIVALS]
