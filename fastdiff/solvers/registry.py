"""The one registry of solvers, and `plan()`, the public way from a name and a budget to a table."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .. import grid as grids
from ..errors import FastdiffError
from ..plans import Plan
from ..schedule import NoiseSchedule
from .dpmpp import build_multistep, build_singlestep
from .first_order import build_ddim, build_ddpm, build_euler, build_euler_ancestral
from .heun import build_heun
from .linear import build_ipndm, build_lms
from .shared import call_counts
from .unipc import build_unipc


@dataclass(frozen=True)
class SolverInfo:
    """What `fastdiff solvers` lists. `order` is the one reached with the default start; `nfe_per_step` the calls of a full
    step, `inner_points` whether they lie inside it, at log-SNRs of their own; `grid` the recommended grid
    (measured on the shipped model; `recommended_grid` says what it is for a schedule whose time is sigma itself)."""

    name: str
    build: Callable[..., Plan] = field(repr=False)
    order: int
    source: str
    nfe_per_step: int = 1
    stochastic: bool = False
    inner_points: bool = False
    grid: str = "karras"
    aliases: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The solver's own options and their defaults."""
        fixed = set(self.build.keywords) if isinstance(self.build, functools.partial) else set()
        parameters = inspect.signature(self.build).parameters.values()
        return {
            p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in {"counts", *fixed}
        }  # fmt: skip


def _entry(name: str, build: Callable[..., Plan], order: int, source: str, **fields: Any) -> SolverInfo:
    bound = fields.pop("bind", {})
    return SolverInfo(name, functools.partial(build, **bound) if bound else build, order, source, **fields)


_SOLVERS = [
    _entry("ddim", build_ddim, 1, "Song et al. 2020", grid="uniform_t", aliases=("DDIMScheduler", "dpmpp-1m", "dpmpp-1s")),
    _entry("ddpm", build_ddpm, 1, "Ho et al. 2020", grid="uniform_t", stochastic=True, aliases=("DDPMScheduler",)),
    _entry("euler", build_euler, 1, "Karras et al. 2022, alg. 2", aliases=("EulerDiscreteScheduler",)),
    _entry("euler-ancestral", build_euler_ancestral, 1, "k-diffusion", stochastic=True,
           aliases=("euler_a", "EulerAncestralDiscreteScheduler")),
    _entry("heun", build_heun, 2, "Karras et al. 2022, alg. 1", nfe_per_step=2, aliases=("edm", "HeunDiscreteScheduler")),
    _entry("dpmpp-2m", build_multistep, 2, "Lu et al. 2022b", bind={"order": 2, "published": False}, grid="uniform_lambda",
           aliases=("dpm++2m", "dpmpp_2m")),
    _entry("dpmpp-3m", build_multistep, 2, "Lu et al. 2022b, corrected", bind={"order": 3, "published": False}, grid="uniform_t",
           aliases=("dpm++3m", "dpmpp_3m")),
    _entry("dpmpp-3m-compat", build_multistep, 2, "Lu et al. 2022b, as published", bind={"order": 3, "published": True},
           grid="uniform_t"),
    _entry("dpmpp-2s", build_singlestep, 2, "Lu et al. 2022b", bind={"order": 2}, nfe_per_step=2, inner_points=True,
           grid="uniform_lambda", aliases=("dpm++2s", "dpmpp_2s")),
    _entry("dpmpp-3s", build_singlestep, 3, "Lu et al. 2022b", bind={"order": 3}, nfe_per_step=3, inner_points=True,
           grid="uniform_lambda", aliases=("dpm++3s", "dpmpp_3s")),
    *(_entry(f"unipc-{k}", build_unipc, min(k + 1, 3), "Zhao et al. 2023", bind={"order": k}, grid="uniform_t",
             aliases=("unipc",) if k == 2 else ())
      for k in (1, 2, 3)),
    *(_entry(f"lms-{k}", build_lms, min(k, 2), "k-diffusion", bind={"order": k}, grid="beta", aliases=("lms",) if k == 4 else ())
      for k in (1, 2, 3, 4)),
    *(_entry(f"ipndm-{k}", build_ipndm, min(k, 2), "Zhang and Chen 2022", bind={"order": k}, grid="beta",
             aliases=("ipndm",) if k == 4 else ()) for k in (1, 2, 3, 4)),
]  # fmt: skip
FEW, FEW_CALLS, MANY_CALLS = 10, "ipndm-3", "unipc-2"  # what `auto` takes up to FEW calls and beyond: benches/results/full
_BY_NAME = {name: info for info in _SOLVERS for name in (info.name, *info.aliases)}


def list_solvers() -> dict[str, SolverInfo]:
    """Every solver by its name; aliases are in the entries."""
    return {info.name: info for info in _SOLVERS}


def find(name: str) -> SolverInfo:
    """The solver of a name or alias.

    Raises:
        FastdiffError: an unknown name; the nearest ones are offered.
    """
    info = _BY_NAME.get(name) or _BY_NAME.get(name.lower())
    if info is None:
        near = difflib.get_close_matches(name.lower(), _BY_NAME, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(list_solvers())}"
        raise FastdiffError(f"unknown solver {name!r}; {hint} (`fastdiff solvers` lists all)")
    return info


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
        solver: a name of `list_solvers()` or an alias; or "auto": the plan tuned for this checkpoint, guidance and `nfe` where
            the denoiser has one, else the recommended hand-made one. `provenance["auto"]` says which.
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
    info = find(solver)
    if unknown := set(options) - set(info.options):
        raise FastdiffError(
            f"solver {info.name} has no option {', '.join(sorted(unknown))}; it takes {', '.join(info.options) or 'none'}"
        )
    clean = grid.ends_clean if isinstance(grid, grids.Grid) else end == "zero"
    counts = _counts(info, nfe, steps, _starts_at_full_noise(noise_schedule, grid), clean)
    chosen = grid if grid is not None else recommended_grid(info, noise_schedule)
    made = grids.make(chosen, noise_schedule, len(counts), end, **(grid_options or {}))
    return info.build(noise_schedule, made, **({"counts": counts} if info.nfe_per_step > 1 else {}), **options)


def _auto(schedule: NoiseSchedule | Any, nfe: int | None, other: dict[str, Any], end: str) -> Plan:
    """The tuned plan of a denoiser, else the hand-made one that is best without knowing the checkpoint."""
    if given := [name for name, value in other.items() if value is not None]:
        raise FastdiffError(f'plan("auto") chooses {", ".join(given)} itself: give nfe= only')
    if nfe is None:
        raise FastdiffError('plan("auto") needs nfe=')
    tuned = getattr(schedule, "tuned_plan", lambda nfe: None)(nfe) if end == "zero" else None
    if tuned is not None:
        chosen, why = tuned, "tuned for this checkpoint, guidance and budget"
    else:
        chosen = plan(FEW_CALLS if nfe <= FEW else MANY_CALLS, schedule, nfe, end=end)
        why = "hand-made: no plan is tuned for this checkpoint, guidance and budget"
    return replace(chosen, provenance={**chosen.provenance, "auto": f"{chosen.name}, {why}"})


def recommended_grid(info: SolverInfo, schedule: NoiseSchedule) -> str:
    """The solver's own grid, but karras where time is sigma itself: uniform in time means nothing there."""
    return "karras" if schedule.name in ("ve", "edm") else info.grid


def step_counts(solver: str, schedule: NoiseSchedule, nfe: int) -> tuple[int, ...]:
    """Evaluations of each grid interval at a budget, on a grid that spans the schedule and ends at clean data."""
    return _counts(find(solver), nfe, None, _starts_at_full_noise(schedule, None), True)


def _starts_at_full_noise(schedule: NoiseSchedule, grid: str | Sequence[float] | grids.Grid | None) -> bool:
    if isinstance(grid, grids.Grid):
        return grid.nodes[0].alpha == 0.0
    if grid is None or isinstance(grid, str):
        return float(schedule.alpha(schedule.t_max)) == 0.0
    return len(grid) > 0 and float(schedule.alpha(float(grid[0]))) == 0.0


def _counts(info: SolverInfo, nfe: int | None, steps: int | None, from_zero: bool, to_zero: bool) -> tuple[int, ...]:
    """Calls of each step. Inner points in log-SNR need a finite one at both ends; Heun has none, and needs it at its end."""
    if (nfe is None) == (steps is None):
        raise FastdiffError("give either nfe= (network evaluations) or steps= (grid intervals)")
    budget = nfe if nfe is not None else steps
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise FastdiffError(f"{'nfe' if nfe is not None else 'steps'} must be a whole number of at least 1; given {budget!r}")
    if info.nfe_per_step == 1:
        return (1,) * budget
    return call_counts(info.nfe_per_step, nfe, steps, from_zero and info.inner_points, to_zero)
