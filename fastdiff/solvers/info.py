"""What the registry knows of a solver, and how many calls each of its steps takes at a budget."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import FastdiffError
from ..plans import Plan
from .shared import call_counts, start_counts

Options = dict[str, Any]
Counting = Callable[[int | None, int | None, bool, bool, Options], tuple[tuple[int, ...], Options]]


@dataclass(frozen=True)
class SolverInfo:
    """What `fastdiff solvers` lists. `order` is the one reached with the default start (weak order where `stochastic`; 0 with a
    reason in `why_no_order`), `full_order` the one with start="rk", `first` the calls that the first steps take then, or always
    where `starts_so`. `nfe_per_step` counts the calls of a full step, `inner_points` says whether they lie inside it, at log-SNRs
    of their own; `grid` is the recommended one (`recommended_grid` says what it is for a schedule whose time is sigma itself)."""

    name: str
    build: Callable[..., Plan] = field(repr=False)
    order: int
    source: str
    nfe_per_step: int = 1
    stochastic: bool = False
    inner_points: bool = False
    grid: str = "karras"
    aliases: tuple[str, ...] = ()
    full_order: int = 0
    first: tuple[int, ...] = ()
    starts_so: bool = False
    why_no_order: str = ""
    counting: Counting | None = field(default=None, repr=False)

    @property
    def options(self) -> Options:
        """The solver's own options and their defaults."""
        fixed = set(self.build.keywords) if isinstance(self.build, functools.partial) else set()
        parameters = inspect.signature(self.build).parameters.values()
        return {
            p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in {"counts", *fixed}
        }  # fmt: skip

    @property
    def takes_counts(self) -> bool:
        return "counts" in inspect.signature(self.build).parameters

    def counts(
        self, nfe: int | None, steps: int | None, from_zero: bool, to_zero: bool, options: Options
    ) -> tuple[tuple[int, ...], Options]:
        """Calls of each grid interval, and the options as the budget allows them.

        Inner points in log-SNR need a finite one at both ends. Heun has none, and needs it at its end.
        """
        if (nfe is None) == (steps is None):
            raise FastdiffError("give either nfe= (network evaluations) or steps= (grid intervals)")
        budget = nfe if nfe is not None else steps
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
            raise FastdiffError(f"{'nfe' if nfe is not None else 'steps'} must be a whole number of at least 1; given {budget!r}")
        if self.counting is not None:
            return self.counting(nfe, steps, from_zero, to_zero, options)
        if self.nfe_per_step > 1:
            return call_counts(self.nfe_per_step, nfe, steps, from_zero and self.inner_points, to_zero), options
        if self.starts_so or options.get("start") == "rk":
            return start_counts(self.first, nfe, steps, from_zero, to_zero), options
        return (1,) * budget, options


def entry(name: str, build: Callable[..., Plan], order: int, source: str, **fields: Any) -> SolverInfo:
    """An entry of the catalogue; `bind` fixes options of the builder."""
    bound = fields.pop("bind", {})
    return SolverInfo(name, functools.partial(build, **bound) if bound else build, order, source, **fields)
