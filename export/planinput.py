"""A plan as an input of an engine: one layout of columns, and the arrays that bring a plan into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FastdiffError
from ..plans import Plan
from .columns import Columns
from .evaluate import LEVELS
from .graph import FLOAT, INT64, Graph, total, value, zeros
from .table import compile_table

TABLE, START, DRAWS = "plan_table", "plan_start", "plan_draws"
ROWS = "rows"
LEAST_STATES = 4  # what all solvers but PNDM fit in


@dataclass(frozen=True)
class Layout:
    """The plans that an engine takes: up to `states` states, `width` draws in a row, `first` draws before the first call."""

    states: int
    width: int
    first: int
    guided: bool

    @classmethod
    def of(cls, plan: Plan, guided: bool) -> Layout:
        """Room for this plan and for those of most solvers of its kind (with draws, or without)."""
        table = compile_table(plan)
        used = np.nonzero(np.any(table.start[:, 1:] != 0.0, axis=0))[0]
        first = int(used[-1]) + 1 if len(used) else 0
        return cls(max(LEAST_STATES, table.states), table.draws.shape[1], first, guided)

    @property
    def draws(self) -> str:
        """The name of how many draws there are, or "" where there is no such input."""
        return "draws" if self.width or self.first else ""

    def columns(self) -> Columns:
        """Every weight a column of its own; no rows."""
        levels = LEVELS if self.guided else LEVELS[:4]
        places = [(i, j) for i in range(self.states) for j in range(self.states + 1 + self.width)]
        names = (*levels, *(f"w{i}.{j}" for i, j in places))
        asked = {name: name if name in levels else 1.0 for name in LEVELS}
        return Columns(np.zeros((0, len(names)), np.float32), names, {p: f"w{p[0]}.{p[1]}" for p in places}, asked)

    def inputs(self) -> list[Any]:
        found = [value(TABLE, FLOAT, (ROWS, len(self.columns().names))), value(START, FLOAT, (self.states, 1 + self.first))]
        return [*found, value(DRAWS, INT64, (ROWS, self.width))] if self.width else found

    def first_states(self, g: Graph) -> list[str]:
        """The states before the first call, by START."""
        terms = ["noise", *(g.add("Gather", "noises", g.constant(k, np.int64), axis=0) for k in range(self.first))]
        flat, count = g.add("Reshape", START, g.constant([-1], np.int64)), self.states * len(terms)
        weights = g.add("Split", flat, axis=0, num_outputs=count, outputs=count)
        rows = [weights[i * len(terms) : (i + 1) * len(terms)] for i in range(self.states)]
        return [total(g, list(zip(row, terms, strict=True))) or zeros(g, "noise") for row in rows]

    def arrays(self, plan: Plan, levels: np.ndarray, acts: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs that make an engine run `plan`.

        Args:
            levels: (N, 4) the denoiser's c_in, c_skip, c_out and c_noise at the times of the plan's calls (levels.onnx).
            acts: (N,) 1 where guidance acts.

        Raises:
            FastdiffError: a plan that needs more than the layout has.
        """
        table = compile_table(plan)
        (count, states, _), width = table.rows.shape, table.draws.shape[1]
        first = Layout.of(plan, self.guided).first
        if states > self.states or width > self.width or first > self.first:
            raise FastdiffError(
                f"plan {plan.name} needs {states} states, {width} draws a row and {first} before the first; this engine has room "
                f"for {self.states}, {self.width} and {self.first}: export with this plan and --plan-input"
            )
        rows = np.zeros((count, self.states, self.states + 1 + self.width))
        rows[:, :states, :states] = table.rows[:, :, :states]
        rows[:, :states, self.states : self.states + 1 + width] = table.rows[:, :, states:]
        start = np.zeros((self.states, 1 + self.first))
        start[:states, : 1 + first] = table.start[:, : 1 + first]
        start[:, 0] *= plan.start[1]
        asked = [levels, acts[:, None]] if self.guided else [levels]
        values = np.concatenate([*asked, rows.reshape(count, -1)], axis=1)
        found = {TABLE: values.astype(np.float32), START: start.astype(np.float32)}
        if self.width:
            found[DRAWS] = np.zeros((count, self.width), np.int64)
            found[DRAWS][:, :width] = table.draws
        return found
