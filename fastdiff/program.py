"""A plan's rows compiled to registers: what every executor runs. No torch, no solver here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .plans import Plan

Terms = tuple[tuple[int, float], ...]  # (register, weight)
Named = list[tuple[str, float]]
FAR = 2.0**8  # a register's factor lies between this and its inverse: a state in float16 has room for it
CANCELLED = 1e-12  # what rounding leaves of two equal weights is a smaller part of them (of the registry's plans 3e-16)


@dataclass(frozen=True)
class Step:
    """A row as an executor runs it: registers instead of positions, zero weights left out, dead registers named.

    Register 0 is the base. `keeps` get the prediction D itself, `stores` (register, p, q) p*y + q*D, None for a weight of 0.
    `next` and `base` are sums; base None means "the next point itself", an empty base means "unchanged". With `onto` the base is
    summed first and register 0 in `next` is the new one: a predictor starts from the corrected state, a term less to sum. With
    `own` the old base is a sum that no one else holds, neither the start nor a point: the new one takes its place, and its own
    weight is 1, a product less: register 0 is then the base up to a factor that the weights of its readers hold.
    """

    t: float
    call: bool
    keeps: tuple[int, ...]
    stores: tuple[tuple[int, float | None, float | None], ...]
    draw: int | None
    next: Terms
    base: Terms | None
    free: tuple[int, ...]
    var: tuple[float, float] | None = None
    onto: bool = False
    own: bool = False


@dataclass(frozen=True)
class Program:
    """`opening`, where a plan has one, weighs the start and a noise before the first row; then one step a row."""

    opening: Step | None
    steps: tuple[Step, ...]

    @property
    def all(self) -> tuple[Step, ...]:
        return self.steps if self.opening is None else (self.opening, *self.steps)

    @property
    def registers(self) -> int:
        """Registers the program needs: the base, and the most history entries and noises alive at once."""
        used = [0]
        for s in self.all:
            used += [*s.keeps, *(r for r, _, _ in s.stores), *(r for r, _ in (*s.next, *(s.base or ())))]
            used += [] if s.draw is None else [s.draw]
        return 1 + max(used)


def compile_program(plan: Plan) -> Program:
    """Registers by linear scan over the last use of each history entry and noise."""
    named = _named_rows(plan)
    last_use = {name: i for i, names in enumerate(named) for name, _ in (*names.next, *names.base)}
    for i, names in enumerate(named):
        if names.drawn is not None:
            last_use.setdefault(names.drawn, i)  # a noise that nothing weighs is drawn all the same: draw k stays draw k
    last_use.setdefault("z", -1)
    registers = _Registers(last_use)
    opening = None
    if plan.first.values != (1.0,):
        z = [("z", w) for w in plan.first.z]
        drawn = registers.take("z") if z else None
        point = registers.total(plan.first.x, z)
        opening = Step(plan.rows[0].t, False, (), (), drawn, point, None, registers.release(-1))
    steps, factor = [], None
    for i, (row, names) in enumerate(zip(plan.rows, named, strict=True)):
        pairs = zip(names.stored, row.store, strict=True)
        entries = [(name, float(p), float(q)) for name, (p, q) in pairs if name in last_use]
        keeps = tuple(registers.take(name) for name, p, q in entries if (p, q) == (0.0, 1.0))
        stores = tuple(
            (registers.take(name), p if p != 0.0 or q == 0.0 else None, q if q != 0.0 else None)
            for name, p, q in entries if (p, q) != (0.0, 1.0)
        )  # fmt: skip
        draw = None if names.drawn is None else registers.take(names.drawn)
        same = row.base == row.next or i == len(named) - 1
        base = None if same else () if row.base.values == (1.0,) else registers.total(row.base.x, names.base)
        sums = (row.next.x, names.next)
        over = _over(*sums, row.base.x, names.base) if base else None
        point = registers.total(*(over or sums))
        step = Step(row.t, row.calls, keeps, stores, draw, point, base, registers.release(i), row.var, over is not None)
        step, factor = _aside(step, factor)
        steps.append(step)
    return Program(opening, tuple(steps))


def _aside(step: Step, factor: float | None) -> tuple[Step, float | None]:
    """A step where register 0 times `factor` is the base (None: the base is not the executor's own), and the factor after it."""
    def read(terms: Terms, factor: float) -> Terms:
        return tuple((r, w * factor if r == 0 else w) for r, w in terms)

    old = 1.0 if factor is None else factor
    if not step.base:
        return replace(step, next=read(step.next, old)), None if step.base is None else factor
    (first, w), *rest = step.base
    own = factor is not None and first == 0 and 1 / FAR < abs(old * w) < FAR
    new = old * w if own else 1.0
    base = ((0, 1.0), *((r, w / new) for r, w in rest)) if own else read(step.base, old)
    return replace(step, next=read(step.next, new if step.onto else old), base=base, own=own), new


def _over(x: float, terms: Named, base_x: float, base: Named) -> tuple[float, Named] | None:
    """`next` counted from the new base instead of the old one, where that leaves fewer terms."""
    if x == 0.0 or base_x == 0.0:
        return None
    ratio, own = x / base_x, dict(terms)
    rest = []
    for name in dict.fromkeys([*own, *(name for name, _ in base)]):
        w, taken = own.get(name, 0.0), ratio * dict(base).get(name, 0.0)
        if abs(w - taken) > CANCELLED * max(abs(w), abs(taken)):
            rest.append((name, w - taken))
    return (ratio, rest) if len(rest) < len(terms) else None


class _Registers:
    """A register for each name, from where it is taken to its last use."""

    def __init__(self, last_use: dict[str, int]) -> None:
        self.last_use = last_use
        self.of: dict[str, int] = {}
        self.spare: list[int] = []

    def take(self, name: str) -> int:
        self.of[name] = self.spare.pop() if self.spare else len(self.of) + 1
        return self.of[name]

    def release(self, row: int) -> tuple[int, ...]:
        """The registers that no later row reads; they may be taken again."""
        freed = tuple(self.of.pop(name) for name in list(self.of) if self.last_use[name] == row)
        self.spare += freed
        return freed

    def total(self, x: float, terms: Named) -> Terms:
        base = ((0, float(x)),) if x != 0.0 or not terms else ()
        return (*base, *((self.of[name], float(w)) for name, w in terms))  # an executor tells floats from tensors


class _NamedRow(NamedTuple):
    """The entries a row stores, the noise it draws, and its `next` and `base` over names instead of positions."""

    stored: list[str]
    drawn: str | None
    next: Named
    base: Named


def _named_rows(plan: Plan) -> list[_NamedRow]:
    history: list[str] = []
    noises = ["z"] * len(plan.first.z)
    out = []
    for i, row in enumerate(plan.rows):
        stored = [f"h{i}.{j}" for j in range(len(row.store))]
        history = stored[::-1] + history
        drawn = None if row.draw is None else f"z{i}"
        if drawn:
            noises.insert(0, drawn)
        point, base = (
            [(name, w) for name, w in (*zip(history, s.h, strict=False), *zip(noises, s.z, strict=False)) if w != 0.0]
            for s in (row.next, row.next if i == len(plan.rows) - 1 else row.base)  # nothing builds on the last base
        )
        out.append(_NamedRow(stored, drawn, point, base))
    return out
