"""Tuning without gradients: the nodes of a solver by COBYQA, for networks that have none (an ONNX or TensorRT engine).

COBYQA (Ragonneau and Zhang 2024; scipy's) builds quadratic models of an objective without noise. The same seeds give the same
value for the same nodes, so it fits, and a handful of nodes takes about a hundred evaluations.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import FastdiffError
from ..files import write_text
from ..plans import Plan
from .features import Distribution
from .nodes import SolverNodes
from .targets import Pairs, endpoints, measure
from .tune import ROUNDING, Progress, check, endpoint_error

RADIUS = 0.5, 0.02  # of the trust region, first and last, in the logarithms of the steps' shares of the way


@dataclass(frozen=True)
class SearchConfig:
    """`evaluations` of the objective at most, each on `batch` pairs of every guidance scale."""

    evaluations: int = 120
    batch: int = 64

    def __post_init__(self) -> None:
        if self.evaluations < 1 or self.batch < 2:
            raise FastdiffError(f"a search needs at least 1 evaluation and 2 pairs; given {asdict(self)}")


class NodeSearch:
    """Moves the nodes of one solver to where its endpoint error on training pairs is least; chosen on validation like a
    learned table. What was evaluated is kept in `state`, and a resumed run takes the same way.

    Raises:
        FastdiffError: scipy is missing, too few pairs, a state of another run.
    """

    def __init__(
        self, table: SolverNodes, train: Sequence[Pairs], validation: Sequence[Pairs], config: SearchConfig,
        state: Path | None = None,
    ) -> None:  # fmt: skip
        check(table, train, validation, config.batch)
        self.table, self.config, self.train, self.validation, self.state_path = table, config, train, validation, state
        self.source = table.plan("start", {})
        self.distribution = Distribution(torch.cat([p.target for p in validation]))
        self.start = measure(self.source, validation, self.distribution)
        self.scale = max(self.start.rmse, 1e-5) * ROUNDING[1]
        self.best, self.best_score, self.step = self.source, self.start, 0
        self.values: dict[str, float] = {}
        self._lowest = math.inf
        if state is not None and state.exists():
            self._resume()

    def run(self, budget: float = math.inf, callback: Callable[[Progress], None] | None = None) -> Plan:
        """Searches until the trust region is small, the evaluations are used up, or `budget` seconds have passed."""
        try:
            from scipy.optimize import minimize
        except ImportError as e:
            raise FastdiffError("--derivative-free needs scipy: pip install 'fastdiff[tune]'") from e
        began = time.monotonic()
        start = self.table.times.increments.detach().numpy().copy()
        free = np.arange(len(start)) != int(start.argmax())  # only ratios matter: the largest step stays where it is

        def objective(moves: np.ndarray) -> float:
            if time.monotonic() - began >= budget:
                raise StopIteration
            at = start.copy()
            at[free] += moves
            value = self._value(at)
            if callback:
                callback(Progress(self.step, value, self.best_score, self.start))
            return value

        options = {"maxfev": self.config.evaluations, "initial_tr_radius": RADIUS[0], "final_tr_radius": RADIUS[1]}
        with contextlib.suppress(StopIteration):
            minimize(objective, np.zeros(int(free.sum())), method="COBYQA", options=options)
        return self.best

    def _value(self, increments: np.ndarray) -> float:
        key = increments.tobytes().hex()
        self.step += 1
        with torch.no_grad():
            self.table.times.increments.copy_(torch.from_numpy(increments))
        plan = self.table.plan(self.source.name, {})
        if key not in self.values:
            self.values[key] = sum(self._loss(plan, pairs) for pairs in self.train) / len(self.train)
            self.save()
        if self.values[key] < self._lowest:
            self._lowest = self.values[key]
            score = measure(plan, self.validation, self.distribution)
            if score.against(self.start) < self.best_score.against(self.start):
                self.best, self.best_score = plan, score
        return self.values[key]

    def _loss(self, plan: Plan, pairs: Pairs) -> float:
        among = range(self.config.batch)
        value = float(endpoint_error(endpoints(plan, pairs, among), pairs.target[: len(among)], self.scale))
        return value if math.isfinite(value) else 1e9

    def save(self) -> None:
        if self.state_path is not None:
            write_text(self.state_path, json.dumps({"identity": self._identity(), "values": self.values}))

    def _identity(self) -> dict[str, Any]:
        parts = [[p.setup.first_seed, p.setup.n, p.setup.guidance] for p in (*self.train, *self.validation)]
        settings = {"batch": self.config.batch}
        return {"settings": settings, "source": self.source.to_json(), "pairs": parts, "checkpoint": self.train[0].denoiser.hash}

    def _resume(self) -> None:
        assert self.state_path is not None
        try:
            state = json.loads(self.state_path.read_text())
        except ValueError as e:
            raise FastdiffError(f"{self.state_path} is not the state of a search: remove it, or give another --out") from e
        if state.get("identity") != self._identity():
            raise FastdiffError(f"{self.state_path} belongs to another tuning run: give its settings, or another --out")
        self.values = state["values"]
