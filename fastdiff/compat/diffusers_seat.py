"""What a diffusers scheduler seat decides: from a scheduler's config, a solver and a number of steps to a plan."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import FastdiffError
from ..grid import Grid, Node, make, node_at, node_at_lam
from ..plans import Plan
from ..prediction import Coefficients
from ..schedule import NoiseSchedule
from ..solvers import plan as make_plan
from ..solvers.info import SolverInfo
from ..solvers.names import resolve
from .diffusers_classes import CLASSES, denoising, levels, make_peer, prediction_of, schedule_of, time_scale
from .diffusers_tables import TABLES

SAME_LEVEL = 1e-3  # in log-SNR: what float32 tables of alphas leave uncertain


@dataclass(frozen=True)
class Prepared:
    """A plan for one run, with what is needed to start it later (`rest`). `init` multiplies the pipeline's unit noise."""

    plan: Plan
    schedule: NoiseSchedule
    init: float
    grid: Grid | None = None
    solver: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, options: dict[str, Any]) -> Prepared:
        """The same with other options of the solver."""
        assert self.grid is not None
        options = {**self.options, **options}
        return replace(self, plan=build(self.solver, self.schedule, self.grid, options), options=options)

    def rest(self, first: int) -> Plan:
        """The plan that begins at this one's call number `first`, for image-to-image: a start of its own, the same times.

        Raises:
            FastdiffError: no call is left, a given plan (a table is whole), or a call inside a step.
        """
        times = [row.t for row in self.plan.rows if row.calls]
        if first >= len(times):
            raise FastdiffError(f"a start at call {first} of {len(times)} leaves no steps: give a larger strength or more steps")
        if "told" in self.options:  # its calls are the class's own list
            return self._from_call(first)
        if self.grid is None:
            raise FastdiffError(f"plan {self.plan.name} cannot begin at call {first}, it is one whole: give solver=, not plan=")
        for i, node in enumerate(self.grid.nodes[:-1]):
            if node.t == times[first]:
                grid = Grid(self.grid.nodes[i:], self.grid.name)
                plan = build(self.solver, self.schedule, grid, self.options)
                if [row.t for row in plan.rows if row.calls] == times[first:]:
                    return plan
        raise FastdiffError(
            f"{self.plan.name} cannot begin at call {first} of {len(times)}: no step of its own begins there; "
            "take a solver of one call a step (dpmpp-2m, unipc-2, ...)"
        )


    def _from_call(self, first: int) -> Plan:
        """What PNDMScheduler makes of a list that begins later: its start comes anew, at the times that are left."""
        if self.options["runge_kutta"]:
            raise FastdiffError(f"PNDMScheduler's Runge-Kutta start cannot begin at call {first}: give skip_prk_steps=True")
        assert self.grid is not None
        return build(self.solver, self.schedule, self.grid, {**self.options, "told": self.options["told"][first:]})

    @property
    def order(self) -> int:
        """Calls of a whole step; 1 for a given plan."""
        return known(self.solver).nfe_per_step if self.solver else 1


def known(solver: str) -> SolverInfo:
    """A table of a class's own, or a solver of the registry."""
    return TABLES.get(solver) or resolve(solver)[0]


def build(solver: str, schedule: NoiseSchedule, grid: Grid, options: dict[str, Any]) -> Plan:
    """The solver's table on a grid that is there already."""
    if solver in TABLES:
        takes = TABLES[solver].options
        if refused := set(options) - set(takes):
            raise FastdiffError(f"a class of diffusers is reproduced as it is, without {', '.join(sorted(refused))}: give a "
                                "grid= to take its solver with options")  # fmt: skip
        return TABLES[solver].build(schedule, grid, **options)
    return make_plan(solver, schedule, steps=grid.steps, grid=grid, end="zero" if grid.ends_clean else "sigma_min", **options)


@dataclass(frozen=True)
class Seat:
    """A scheduler's config (with its `_class_name`) and what runs in its place: a class of diffusers, a solver, or a plan."""

    config: dict[str, Any]
    solver: str | None = None
    grid: str | Sequence[float] | None = None
    grid_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None

    @property
    def is_class(self) -> bool:
        """Whether a class of diffusers is imitated, levels and all."""
        return self.solver in CLASSES and self.grid is None

    @cached_property
    def peer(self) -> Any:
        """diffusers' own scheduler: the imitated class, else the config's."""
        return make_peer(self.solver if self.is_class and self.solver else self.config["_class_name"], self.config)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The parameters that the peer's class has, as it holds them: a config may carry those of other classes too."""
        known = set(inspect.signature(type(self.peer).__init__).parameters) - {"self"}
        found = {"_class_name": type(self.peer).__name__, **{k: v for k, v in self.peer.config.items() if k in known}}
        if found["_class_name"] == "CogVideoXDDIMScheduler":
            found["clip_sample"] = found["thresholding"] = False  # it has the entries, and does not look at them
        return found

    @cached_property
    def prediction(self) -> str:
        return prediction_of(self.settings)

    def schedule(self, mu: float | None = None) -> NoiseSchedule:
        return schedule_of(self.peer, self.settings, mu)

    @cached_property
    def time_scale(self) -> float:
        return time_scale(self.settings)

    def network_time(self, t: float) -> float:
        """The timestep that the pipeline hands to its network at the schedule's time t."""
        return self.time_scale * (math.log(t) if self.prediction == "edm" else t)

    def schedule_time(self, timestep: float) -> float:
        """The schedule's time of a pipeline's timestep."""
        t = timestep / self.time_scale
        return math.exp(t) if self.prediction == "edm" else t

    def denoising(self, alpha: float, sigma: float) -> Coefficients:
        """What turns the network's output at a level into the denoised prediction."""
        return denoising(self.settings, self.prediction, alpha, sigma)

    def prepare(
        self, steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, mu: float | None
    ) -> Prepared:
        """The plan of a run, from what a pipeline gives to set_timesteps."""
        custom = timesteps is not None or (sigmas is not None and not _linear(sigmas))
        if timesteps is not None and sigmas is not None:
            raise FastdiffError("give timesteps= or sigmas=, not both")
        if (self.plan is not None or self.grid is not None) and custom:
            raise FastdiffError(f"{'plan' if self.plan is not None else 'grid'}= was given to the scheduler and custom "
                                f"{'timesteps' if timesteps is not None else 'sigmas'} to the run: leave one out")  # fmt: skip
        steps = steps if steps is not None else len(timesteps if timesteps is not None else sigmas if sigmas is not None else ())
        if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or steps < 1:
            raise FastdiffError(f"num_inference_steps must be a whole number of at least 1; given {steps!r}")
        schedule = self.schedule(mu)
        if self.plan is not None:
            return self._given_plan(int(steps), schedule)
        assert self.solver is not None
        if self.is_class:
            return self._as_class(int(steps), timesteps, sigmas, mu, schedule)
        if timesteps is not None or (sigmas is not None and self.grid is None):
            grid = self._explicit(timesteps, sigmas, schedule)
            plan = build(self.solver, schedule, grid, self.options)
        else:
            plan = make_plan(self.solver, schedule, steps=int(steps), grid=self.grid,
                             grid_options=self.grid_options or None, **self.options)  # fmt: skip
            grid = self._grid_of(plan, int(steps), schedule)
        return Prepared(plan, schedule, plan.start[1], grid, self.solver, self.options)

    def _as_class(
        self, steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, mu: float | None,
        schedule: NoiseSchedule,
    ) -> Prepared:  # fmt: skip
        peer = copy.copy(self.peer)  # set_timesteps only binds new attributes
        accepted = inspect.signature(peer.set_timesteps).parameters
        given = {k: v for k, v in (("timesteps", timesteps), ("sigmas", sigmas), ("mu", mu)) if v is not None}
        if refused := [k for k in given if k not in accepted]:
            raise FastdiffError(f"{type(peer).__name__} takes no {' or '.join(refused)} in set_timesteps")
        if "timesteps" not in given and ("sigmas" not in given or type(peer).__name__.startswith("FlowMatch")):
            given["num_inference_steps"] = steps
        try:
            peer.set_timesteps(**given)
        except ValueError as e:
            raise FastdiffError(f"{type(peer).__name__} makes no list of {steps} steps: {' '.join(str(e).split())}") from None
        grid, init = levels(peer, self.settings, schedule)
        solver, options = CLASSES[type(peer).__name__](self.settings, grid, peer)
        options = {**options, **self.options}
        return Prepared(build(solver, schedule, grid, options), schedule, init, grid, solver, options)

    def _explicit(
        self, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, schedule: NoiseSchedule
    ) -> Grid:
        """The grid of custom timesteps or sigmas; it ends at clean data."""
        given = [] if sigmas is None else [float(s) for s in sigmas]
        if timesteps is not None:
            nodes = [node_at(schedule, self.schedule_time(float(t))) for t in timesteps]
        elif schedule.name == "flow":  # given unshifted, as pipelines do
            nodes = [node_at(schedule, float(schedule.time_of_uniform(s))) for s in given if s > 0]
        else:
            nodes = [node_at_lam(schedule, -math.log(s)) for s in given if s > 0]
        return Grid((*nodes, Node(0.0, 1.0, 0.0)))

    def _grid_of(self, plan: Plan, steps: int, schedule: NoiseSchedule) -> Grid:
        """The grid that fd.plan chose, made again: a name in the solver's name counts too."""
        from ..solvers.registry import recommended_grid

        assert self.solver is not None
        info, preset = resolve(self.solver)
        name = self.grid if self.grid is not None else preset.grid or recommended_grid(info, schedule)
        options = {**(preset.grid_options if self.grid is None else {}), **self.grid_options}
        return make(name, schedule, steps, **options)

    def _given_plan(self, steps: int, schedule: NoiseSchedule) -> Prepared:
        plan = self.plan
        assert plan is not None
        if steps != plan.nfe:
            raise FastdiffError(f"plan {plan.name} takes {plan.nfe} calls: give num_inference_steps={plan.nfe}, not {steps}")
        check_levels(plan, schedule)
        return Prepared(plan, schedule, plan.start[1])


def check_levels(plan: Plan, schedule: NoiseSchedule) -> None:
    """Whether a plan's rows lie on the schedule: each level, and each time but a learned plan's (which may tell another)."""
    learned = "tuned_for" in plan.provenance
    for i, row in enumerate(plan.rows):
        node = Node(row.t, row.alpha, row.sigma)
        there = node_at(schedule, schedule.t_max if row.alpha == 0.0 else float(schedule.t_of_lam(node.lam)))
        same = abs(there.alpha - row.alpha) < SAME_LEVEL and math.isclose(there.sigma, row.sigma, rel_tol=SAME_LEVEL)
        told = learned or row.alpha == 0.0 or abs(float(schedule.lam(row.t)) - node.lam) < SAME_LEVEL
        if not (same and told):
            raise FastdiffError(
                f"plan {plan.name} is for another schedule: its row {i} has time {row.t:g}, alpha {row.alpha:.4g} and sigma "
                f"{row.sigma:.4g}, the pipeline's {schedule.name} schedule does not; make it with fd.plan(solver, schedule)"
            )


def _linear(sigmas: Sequence[float]) -> bool:
    """Whether sigmas are the ones that flow pipelines give of themselves: from 1 to 1/n."""
    return bool(np.allclose(np.asarray(sigmas, np.float64), np.linspace(1.0, 1 / len(sigmas), len(sigmas))))
