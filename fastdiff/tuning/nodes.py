"""The times of any deterministic solver as parameters; its own formulas give the weights (LD3, Tong et al. 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..grid import make
from ..plans import Plan, expand
from ..schedule import NoiseSchedule
from ..solvers import plan as make_plan
from ..solvers.registry import find, recommended_grid, step_counts
from .table import Numbers, Table, Times, check_tunable

STEP = 1e-4  # of the gap to the nearest node: the formulas' derivatives come from central differences in float64


class SolverNodes(Table):
    """The nodes of a solver's grid as parameters. Weights and inner points follow from the solver at every step, and their
    derivatives from central differences of its table, so that every deterministic solver of the registry can be tuned.

    Raises:
        FastdiffError: a stochastic solver, a budget it cannot meet.
    """

    def __init__(self, solver: str, schedule: NoiseSchedule, nfe: int, grid: str | None = None) -> None:
        name = grid or recommended_grid(find(solver), schedule)
        super().__init__(schedule, f"{find(solver).name} · {name}", "nodes")
        self.solver, self.nfe = find(solver).name, nfe
        check_tunable(make_plan(solver, schedule, nfe, grid=name))
        nodes = make(name, schedule, len(step_counts(solver, schedule, nfe))).nodes[:-1]
        self.times = Times(np.array([node.t for node in nodes]), schedule.t_min, trained=True)

    def numbers(self) -> Numbers:
        times = self.times()
        at = times.detach().numpy()
        values = self._table(at)
        if not times.requires_grad:
            return Numbers(*map(torch.tensor, values))
        moved = times - times.detach()
        out = [torch.tensor(v) for v in values]
        for k in range(1, len(at)):
            h = STEP * min(at[k - 1] - at[k], at[k] - (at[k + 1] if k + 1 < len(at) else self.schedule.t_min))
            shift = np.zeros_like(at)
            shift[k] = h
            for i, (up, down) in enumerate(zip(self._table(at + shift), self._table(at - shift), strict=True)):
                out[i] = out[i] + torch.tensor((up - down) / (2 * h)) * moved[k]
        return Numbers(*out)

    def _table(self, times: np.ndarray) -> tuple[np.ndarray, ...]:
        plan = self._plan(times)
        levels = np.array([(row.alpha, row.sigma) for row in plan.rows] + [plan.end])
        return np.array([row.t for row in plan.rows]), expand(plan), levels[:, 0].copy(), levels[:, 1].copy()

    def _plan(self, times: np.ndarray) -> Plan:
        return make_plan(self.solver, self.schedule, self.nfe, grid=times.tolist())

    def plan(self, name: str, provenance: dict[str, Any]) -> Plan:
        with torch.no_grad():
            times: Tensor = self.times()
        return replace(self._plan(times.numpy()), name=name, provenance=provenance)
