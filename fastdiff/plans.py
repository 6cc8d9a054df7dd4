"""A Plan: a solver on a grid as a frozen table that checks itself when it is made. No torch, no state, no solver here.

The table is a general linear method with variable coefficients. With a base x, a history h and unit noises z (both newest
first), a row evaluates the denoiser at the current point y, stores p*y + q*D, may draw a noise, and forms the next point and
the next base as weighted sums of the base before the row, the history and the noises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from .errors import PlanError
from .files import write_text
from .program import Program, compile_program

FORMAT = 1
TOLERANCE = 1e-12  # on mean and spread, relative to hypot(alpha, sigma)
ROUNDING = 8 * 2.0**-52  # and beside it, what adding up the table's own terms may round off, relative to their sizes


@dataclass(frozen=True)
class Weights:
    """x on the base; h on the history and z on the unit noises, newest first."""

    x: float
    h: tuple[float, ...] = ()
    z: tuple[float, ...] = ()

    def scaled(self, factor: float) -> Weights:
        return Weights(self.x * factor, tuple(w * factor for w in self.h), tuple(w * factor for w in self.z))

    @property
    def values(self) -> tuple[float, ...]:
        return (self.x, *self.h, *self.z)


IDENTITY = Weights(1.0)
X0_ENTRY = ((0.0, 1.0),)  # the store that keeps the denoised prediction itself


@dataclass(frozen=True)
class Row:
    """One evaluation. See the module's text; `draw` names the Brownian interval (from, to) of a new noise, or "free".

    `var` is learned variance: the noise drawn here is multiplied, element by element, by a factor between the two whose logs it
    gives, by the network's second output v in [-1, 1] (log factor = low at v = -1, high at 1). The weights are those at factor 1.
    """

    t: float
    alpha: float
    sigma: float
    next: Weights
    base: Weights
    store: tuple[tuple[float, float], ...] = X0_ENTRY
    draw: tuple[float, float] | str | None = None
    var: tuple[float, float] | None = None

    @property
    def calls(self) -> bool:
        """Whether the network is called: not where every stored weight on its prediction is 0."""
        return any(q != 0.0 for _, q in self.store)


@dataclass(frozen=True)
class Plan:
    """A fixed-grid sampler as a table.

    `start` and `end` are levels (alpha, sigma). `mean` and `spread` declare how the table keeps the moments of constant-
    denoiser data: "exact" (checked here), "order p" or "waived: reason". `nfe` counts rows that call the network.

    Raises:
        PlanError: weights that are not finite, refer to entries that do not exist, or break what the plan declares.
    """

    name: str
    rows: tuple[Row, ...]
    start: tuple[float, float]
    end: tuple[float, float]
    first: Weights = IDENTITY
    order: int = 1
    stochastic: bool = False
    mean: str = "exact"
    spread: str = "exact"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows:
            raise PlanError(f"plan {self.name} has no rows")
        self._check_declarations()
        self._check_structure()
        self._check_moments()

    @property
    def nfe(self) -> int:
        """Evaluations of the denoiser; a guided denoiser may call its network twice in each."""
        return sum(row.calls for row in self.rows)

    @property
    def learned_variance(self) -> bool:
        """Whether a row's noise is scaled by the network's second output."""
        return any(row.var is not None for row in self.rows)

    @property
    def draws(self) -> int:
        """Unit noises drawn, the start noise not counted."""
        return len(self.first.z) + sum(row.draw is not None for row in self.rows)

    def _check_declarations(self) -> None:
        named = isinstance(self.name, str) and isinstance(self.provenance, dict)
        if not (named and type(self.order) is int and isinstance(self.stochastic, bool)):
            raise PlanError("a plan's name is text, its order a whole number, its provenance a dict, stochastic true or false")
        for what, value in (("mean", self.mean), ("spread", self.spread)):
            if value != "exact" and not str(value).startswith(("order ", "waived: ")):
                raise PlanError(f'{what} must be "exact", "order p" or "waived: reason"; given {value!r}')

    def _check_structure(self) -> None:
        stored, drawn = 0, len(self.first.z)
        if len(self.first.z) > 1 or self.first.h:
            raise PlanError(f"plan {self.name}: `first` may weigh the start and one noise, nothing else")
        for what, numbers in (("start", self.start), ("end", self.end)):
            if len(numbers) != 2 or not all(math.isfinite(v) for v in numbers):
                raise PlanError(f"plan {self.name}: {what} must be (alpha, sigma), both finite; given {numbers}")
        if not all(math.isfinite(w) for w in self.first.values):
            raise PlanError(f"plan {self.name}: a weight of `first` is not finite")
        for i, row in enumerate(self.rows):
            stored += len(row.store)
            drawn += row.draw is not None
            if row.draw not in (None, "free") and not _is_pair(row.draw):
                raise PlanError(f'plan {self.name}, row {i}: draw must be (from, to), "free" or None; given {row.draw!r}')
            if row.var is not None and not _is_pair(row.var):
                raise PlanError(f"plan {self.name}, row {i}: var must be (log low, log high) or None; given {row.var!r}")
            if row.var is not None and not (row.calls and row.draw is not None):
                raise PlanError(f"plan {self.name}, row {i}: learned variance needs a network call and a drawn noise")
            if not all(math.isfinite(v) for v in (row.t, row.alpha, row.sigma)):
                raise PlanError(f"plan {self.name}, row {i}: its time or level is not finite: {row.t}, {row.alpha}, {row.sigma}")
            for weights in (row.next, row.base):
                if not all(math.isfinite(w) for w in weights.values):
                    raise PlanError(f"plan {self.name}, row {i} (t = {row.t:g}): a weight is not finite")
                if len(weights.h) > stored or len(weights.z) > drawn:
                    raise PlanError(f"plan {self.name}, row {i}: it weighs {len(weights.h)} history entries of {stored} and "
                                    f"{len(weights.z)} noises of {drawn}")  # fmt: skip
            if not all(math.isfinite(w) for pair in row.store for w in pair):
                raise PlanError(f"plan {self.name}, row {i} (t = {row.t:g}): a stored weight is not finite")

    def moments(self) -> list[tuple[float, float, float]]:
        """(mean, standard deviation, rounding bound) at every evaluated point and the end, for the constant denoiser D = 1
        with the start drawn from N(alpha_start, sigma_start^2): what the plan claims is (alpha, sigma)."""
        # Every state is a vector: its mean, its weights on independent unit normals (start noise, then the draws), and last
        # a running error: weights grow like the ratio of two levels, and with them the rounding of their sum.
        size = 3 + self.draws
        unit = np.eye(size)
        points: list[np.ndarray] = []
        noises: list[np.ndarray] = []
        history: list[np.ndarray] = []
        base = unit[0] * self.start[0] + unit[1] * self.start[1]
        drawn = 2
        if self.first.z:
            noises.insert(0, unit[drawn])
            drawn += 1
        base = _sum(self.first, base, history, noises)
        y = base
        for row in self.rows:
            points.append(y)
            for p, q in row.store:
                history.insert(0, _add([(p, y), (q, unit[0])]))
            if row.draw is not None:
                noises.insert(0, unit[drawn])
                drawn += 1
            y, base = _sum(row.next, base, history, noises), _sum(row.base, base, history, noises)
        points.append(y)
        return [(float(v[0]), float(np.linalg.norm(v[1:-1])), float(v[-1])) for v in points]

    def _check_moments(self) -> None:
        levels = [(row.alpha, row.sigma) for row in self.rows] + [self.end]
        for i, ((mean, spread, rounding), (alpha, sigma)) in enumerate(zip(self.moments(), levels, strict=True)):
            bound = TOLERANCE * math.hypot(alpha, sigma) + rounding
            where = "end" if i == len(self.rows) else f"row {i} (t = {self.rows[i].t:g})"
            if self.mean == "exact" and not abs(mean - alpha) <= bound:
                raise PlanError(f"plan {self.name}, {where}: its weights give a mean of {mean:.15g} where alpha is {alpha:.15g}")
            if self.spread == "exact" and not abs(spread - sigma) <= bound:
                raise PlanError(f"plan {self.name}, {where}: its weights give noise of {spread:.15g} where sigma is {sigma:.15g}")

    @cached_property
    def program(self) -> Program:
        """The rows compiled to registers; every executor runs this. An entry is dropped after the last row that reads it."""
        return compile_program(self)

    @property
    def registers(self) -> int:
        """Registers the program needs: the base, and the most history entries and noises alive at once."""
        return self.program.registers

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, whole or not at all; floats keep every bit."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of `to_json`, checked like any other.

        Raises:
            PlanError: not a plan, of another format, or one that does not keep what it declares.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise PlanError(f"this version reads plans of format {FORMAT}")
            rows = tuple(_row(r) for r in data.pop("rows"))
            first = _weights(data.pop("first"))
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return cls(rows=rows, first=first, **fields)
        except PlanError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
            raise PlanError(f"not a plan: {type(e).__name__} {e}") from e

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            return cls.from_json(Path(path).read_text())
        except OSError as e:
            raise PlanError(f"cannot read the plan {path}: {e.strerror}") from e
        except UnicodeDecodeError as e:
            raise PlanError(f"{path} is not a plan: it is not text") from e


def expand(plan: Plan) -> np.ndarray:
    """A plan without draws against its start alone: [i, j] is the weight of prediction D_j in the point after row i, oldest
    first; (n, n), lower triangular. The start itself weighs sigma_{i+1}/sigma_0 there, since the plan keeps its spread."""
    n = len(plan.rows)
    base = np.zeros(n + 1)  # weight on x, then on D_0 ... D_{n-1}
    base[0] = 1.0
    history: list[np.ndarray] = []
    out: list[np.ndarray] = []
    y = base
    for i, row in enumerate(plan.rows):
        prediction = np.zeros(n + 1)
        prediction[1 + i] = 1.0
        history = [p * y + q * prediction for p, q in row.store][::-1] + history
        y, base = (w.x * base + sum(h * v for h, v in zip(w.h, history, strict=False)) for w in (row.next, row.base))
        out.append(y[1:])
    return np.array(out)


def _is_pair(value: Any) -> bool:
    """Two finite numbers."""
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, Real) and math.isfinite(v) for v in value)


def _sum(w: Weights, base: np.ndarray, history: Sequence[np.ndarray], noises: Sequence[np.ndarray]) -> np.ndarray:
    return _add([(w.x, base), *zip(w.h, history, strict=False), *zip(w.z, noises, strict=False)])


def _add(terms: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
    """The weighted sum of state vectors; the last element bounds its rounding."""
    total = np.zeros_like(terms[0][1])
    for weight, v in terms:
        total[:-1] += weight * v[:-1]
        total[-1] += abs(weight) * (v[-1] + ROUNDING * np.linalg.norm(v[:-1]))
    return total


def _weights(data: dict[str, Any]) -> Weights:
    return Weights(float(data["x"]), tuple(map(float, data["h"])), tuple(map(float, data["z"])))


def _row(data: dict[str, Any]) -> Row:
    draw, var = data["draw"], data["var"]
    return Row(
        t=float(data["t"]), alpha=float(data["alpha"]), sigma=float(data["sigma"]),
        next=_weights(data["next"]), base=_weights(data["base"]),
        store=tuple((float(p), float(q)) for p, q in data["store"]),
        draw=tuple(draw) if isinstance(draw, list) else draw, var=None if var is None else tuple(var),
    )  # fmt: skip
