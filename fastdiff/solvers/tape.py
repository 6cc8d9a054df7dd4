"""Rows written by name: a solver says which evaluation or noise it weighs, the tape turns that into positions, newest first."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..grid import Node
from ..plans import IDENTITY, X0_ENTRY, Row, Weights

Terms = tuple[tuple[Hashable, float], ...]


@dataclass(frozen=True)
class Sum:
    """x on the base, and weights on history entries and noises by name."""

    x: float
    h: Terms = ()
    z: Terms = ()

    def then(self, other: Sum) -> Sum:
        """`other` applied to the result of this one, both on the same history and noises."""
        kept = self.scaled(other.x)
        return Sum(kept.x, (*kept.h, *other.h), (*kept.z, *other.z))

    def scaled(self, factor: float) -> Sum:
        return Sum(self.x * factor, tuple((k, w * factor) for k, w in self.h), tuple((k, w * factor) for k, w in self.z))


STAY = Sum(1.0)  # the base of a Runge-Kutta stage: what later rows build on is unchanged


@dataclass
class Tape:
    """The rows of a plan so far. A name that is stored twice means its newest entry."""

    rows: list[Row] = field(default_factory=list)
    stored: list[Hashable] = field(default_factory=list)  # newest first
    drawn: list[Hashable] = field(default_factory=list)

    def add(
        self, node: Node, key: Hashable, nxt: Sum, base: Sum | None = None, *,
        store: tuple[tuple[float, float], ...] = X0_ENTRY, draw: tuple[float, float] | str | None = None, noise: Hashable = None,
    ) -> None:  # fmt: skip
        """Evaluates at `node`, keeps the result as `key` and a drawn noise as `noise` (by default `key` too). Without `base`,
        later rows build on the next point itself."""
        self.stored.insert(0, key)
        if draw is not None:
            self.drawn.insert(0, key if noise is None else noise)
        point = self._weights(nxt)
        under = point if base is None else IDENTITY if base is STAY else self._weights(base)
        self.rows.append(Row(node.t, node.alpha, node.sigma, point, under, store, draw))

    def _weights(self, s: Sum) -> Weights:
        return Weights(s.x, _positions(s.h, self.stored), _positions(s.z, self.drawn))


def _positions(terms: Iterable[tuple[Hashable, Any]], names: list[Hashable]) -> tuple[float, ...]:
    at: dict[int, float] = {}
    for name, w in terms:
        at[names.index(name)] = at.get(names.index(name), 0.0) + w
    used = [i for i, w in at.items() if w != 0.0]
    return tuple(at.get(i, 0.0) for i in range(max(used, default=-1) + 1))
