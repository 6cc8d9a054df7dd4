"""The one registry of solvers, and `plan()`, the public way from a name and a budget to a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .. import grid as grids
from ..errors import FastdiffError
from ..plans import Plan
from ..schedule import NoiseSchedule
from .catalogue import SOLVERS
from .info import SolverInfo
from .names import resolve

FEW, FEW_CALLS, MANY_CALLS = 10, "ipndm-3", "unipc-2"  # what `auto` takes up to FEW calls and beyond: benches/results/full


def list_solvers() -> dict[str, SolverInfo]:
    """Every solver by its name; aliases are in the entries."""
    return {info.name: info for info in SOLVERS}


def find(name: str) -> SolverInfo:
    """The solver of a name or alias.

    Raises:
        FastdiffError: an unknown name; the nearest ones are offered.
    """
    return resolve(name)[0]


def plan(
    solver: str,
    schedule: NoiseSchedule | Any,
    nfe: int | None = None,
    *,
    steps: int | None = None,
    grid: str | Sequence[float] | grids.Grid | None = None,
    end: str = "zero",
    grid_options: dict[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """The table of a solver for a budget of network evaluations.

    Args:
        solver: a name of `list_solvers()`, an alias, or a name of diffusers, ComfyUI or A1111 ("DPMSolverMultistepScheduler",
            "dpmpp_2m_karras", "DPM++ 2M Karras": a grid in the name is the default for `grid`); or "auto": the plan tuned for
            this checkpoint, guidance and `nfe` where the denoiser has one, or a student's own for one of its several step
            counts, else the recommended hand-made one.
            `provenance["auto"]` says which.
        schedule: a NoiseSchedule, or anything with a `.schedule` (a Denoiser).
        nfe: evaluations of the denoiser, met exactly: what fills no whole step goes to one lower-order step.
        steps: grid intervals, instead of `nfe`.
        grid: a name of `fastdiff.grid.GRIDS`, a falling list of times, or a Grid; default the solver's recommended one.
        end: "zero" (clean data, alpha = 1) or "sigma_min" (the least noisy trained level).
        grid_options: options of the grid (rho, spacing, num_tokens, table, ...).
        options: the solver's own options (eta, s_churn, variance, ...).

    Raises:
        FastdiffError: an unknown name or option, a budget too small for the method, a grid that does not fall.
    """
    noise_schedule = schedule if isinstance(schedule, NoiseSchedule) else getattr(schedule, "schedule", None)
    if not isinstance(noise_schedule, NoiseSchedule):
        raise FastdiffError(f"plan needs a NoiseSchedule or a denoiser that has one; given {type(schedule).__name__}")
    if solver == "auto":
        return _auto(schedule, nfe, {"steps": steps, "grid": grid, "grid_options": grid_options, **options}, end)
    info, preset = resolve(solver)
    if grid is None and preset.grid is not None:
        grid, grid_options = preset.grid, {**preset.grid_options, **(grid_options or {})}
    if unknown := set(options) - set(info.options):
        raise FastdiffError(
            f"solver {info.name} has no option {', '.join(sorted(unknown))}; it takes {', '.join(info.options) or 'none'}"
        )
    clean = grid.ends_clean if isinstance(grid, grids.Grid) else end == "zero"
    options = {**preset.options, **options}
    counts, options = info.counts(nfe, steps, _starts_at_full_noise(noise_schedule, grid), clean, options)
    chosen = grid if grid is not None else recommended_grid(info, noise_schedule)
    made = grids.make(chosen, noise_schedule, len(counts), end, **(grid_options or {}))
    return info.build(noise_schedule, made, **({"counts": counts} if info.takes_counts else {}), **options)


def _auto(schedule: NoiseSchedule | Any, nfe: int | None, other: dict[str, Any], end: str) -> Plan:
    """The tuned plan of a denoiser, else the hand-made one that is best without knowing the checkpoint."""
    if given := [name for name, value in other.items() if value is not None]:
        raise FastdiffError(f'plan("auto") chooses {", ".join(given)} itself: give nfe= only')
    if nfe is None:
        raise FastdiffError('plan("auto") needs nfe=')
    tuned = getattr(schedule, "tuned_plan", lambda nfe: None)(nfe) if end == "zero" else None
    if tuned is not None:
        own = "tuned_for" not in tuned.provenance
        chosen, why = tuned, "the student's own" if own else "tuned for this checkpoint, guidance and budget"
    else:
        chosen = plan(FEW_CALLS if nfe <= FEW else MANY_CALLS, schedule, nfe, end=end)
        why = "hand-made: no plan is tuned for this checkpoint, guidance and budget"
    return replace(chosen, provenance={**chosen.provenance, "auto": f"{chosen.name}, {why}"})


def recommended_grid(info: SolverInfo, schedule: NoiseSchedule) -> str:
    """The solver's own grid, but karras where time is sigma itself: uniform in time means nothing there."""
    return "karras" if schedule.name in ("ve", "edm") else info.grid


def step_counts(solver: str, schedule: NoiseSchedule, nfe: int) -> tuple[int, ...]:
    """Evaluations of each grid interval at a budget, on a grid that spans the schedule and ends at clean data."""
    return find(solver).counts(nfe, None, _starts_at_full_noise(schedule, None), True, {})[0]


def _starts_at_full_noise(schedule: NoiseSchedule, grid: str | Sequence[float] | grids.Grid | None) -> bool:
    if isinstance(grid, grids.Grid):
        return grid.nodes[0].alpha == 0.0
    if grid is None or isinstance(grid, str):
        return float(schedule.alpha(schedule.t_max)) == 0.0
    return len(grid) > 0 and float(schedule.alpha(float(grid[0]))) == 0.0
