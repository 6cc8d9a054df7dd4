"""The loop over a plan's rows where a row is one op: weights, guidance and prediction conversion folded into one matrix a row.

A row's matrix has a column for each tensor it reads (the point, the network's outputs, registers, noises) and a line for each
tensor it leaves (the next point, the base, what is kept for later rows). All matrices of a run lie in one table on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops
from .denoiser import Denoiser, Folded
from .noise import NoiseSource, Seeded, of_learned_strength
from .philox import seed_bits
from .plans import Plan
from .program import Step, Terms

Column = str | int  # "y", "noise", an output of the denoiser "f0", "f1", or a register
Vector = dict[Column, float]
BASE = 0


@dataclass(frozen=True)
class Row:
    """What a row does, whatever its numbers are. `reads` names the columns, the noise last; `writes` says which register each
    line's tensor becomes, None for the next point alone; `keeps` are registers that become a tensor that is there already;
    `learned` says that the network makes the noise's strength; no later row reads what is `free`."""

    call: bool
    folded: bool
    draws: bool
    learned: bool
    reads: tuple[Column, ...]
    writes: tuple[int | None, ...]
    keeps: tuple[tuple[int, Column], ...]
    free: tuple[int, ...]


class Matrix(NamedTuple):
    """A row with its numbers: its time, its weights (a line for each of `writes`, a column for each of `reads`), and between what
    a learned strength lies."""

    row: Row
    t: float
    weights: np.ndarray
    strength: tuple[float, float] | None


def matrices(plan: Plan, denoiser: Any) -> list[Matrix]:
    """The steps of a plan's program for a denoiser; in float64."""
    folded = denoiser.folded if isinstance(denoiser, Denoiser) else lambda t: None
    out, same = [], True  # whether the point is the base
    for step in plan.program.all:
        out.append(_matrix(step, folded(step.t) if step.call and step.var is None else None, same))
        same = step.base is None
    return out


def table(steps: Sequence[Matrix]) -> list[float]:
    """The numbers of all rows, as `points` reads them."""
    return [float(v) for step in steps for v in (*step.weights.ravel(), *(step.strength or ()))]


def _matrix(step: Step, folded: Folded | None, same: bool) -> Matrix:
    y: Vector = {BASE: 1.0} if same else {"y": 1.0}
    skip, weights = folded or Folded(0.0, (1.0,))
    outputs: list[tuple[float, Vector]] = [(w, {f"f{i}": 1.0}) for i, w in enumerate(weights)]
    d = _add([(skip, y), *outputs])
    values: dict[int, Vector] = dict.fromkeys(step.keeps, d)
    values |= {r: _add([(p or 0.0, y), (q or 0.0, d)]) for r, p, q in step.stores}
    if step.draw is not None:
        values[step.draw] = {"noise": 1.0}

    def total(terms: Terms, known: dict[int, Vector]) -> Vector:
        return _add([(w, known.get(r, {r: 1.0})) for r, w in terms])

    base = total(step.base or (), values)
    point = total(step.next, {**values, BASE: base} if step.onto else values)
    lines: list[tuple[int | None, Vector]] = [(BASE if step.base is None else None, point)]
    if step.base:
        lines.append((BASE, base))
    keeps = []
    for register, value in values.items():
        (column, weight), *more = value.items() or [("y", 0.0)]
        if register in step.free:
            continue
        if not more and weight == 1.0 and column != "noise":
            keeps.append((register, column))
        else:
            lines.append((register, value))
    reads = sorted({c for _, line in lines for c in line} or {BASE}, key=lambda c: (c == "noise", str(c)))
    row = Row(
        step.call, folded is not None, step.draw is not None, step.var is not None, tuple(reads), tuple(r for r, _ in lines),
        tuple(keeps), step.free,
    )  # fmt: skip
    return Matrix(row, step.t, np.array([[line.get(c, 0.0) for c in reads] for _, line in lines]), step.var)


def _add(terms: list[tuple[float, Vector]]) -> Vector:
    """A weighted sum; what cancels to 0 is read all the same, what weighs 0 is not."""
    out: Vector = {}
    for weight, vector in terms:
        for column, w in vector.items():
            if weight * w != 0.0:
                out[column] = out.get(column, 0.0) + weight * w
    return out


@dataclass
class Draws:
    """The draws of a plan in order: made by the op from seeds, or taken from another source."""

    source: NoiseSource | None
    like: Tensor
    made: int = 0  # so far
    seeds: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, Seeded):
            self.source.check(len(self.like))
            self.seeds = seed_bits(self.source.seeds, self.like.device)

    def next(self, needed: bool) -> Tensor | None:
        """The next draw; None where the op makes it, unless the tensor is needed."""
        self.made += 1
        if self.seeds is not None and not needed:
            return None
        assert self.source is not None
        return self.source(self.made, self.like.shape, self.like.device).to(self.like.dtype)


def run(
    denoiser: Any, plan: Plan, x: Tensor, source: NoiseSource | None, callback: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """`sampling.run` with a step of the program as one op."""
    steps, y = matrices(plan, denoiser), x
    numbers = torch.tensor(table(steps), dtype=x.dtype, device=x.device)
    rows = [(step.row, step.t) for step in steps]
    for i, y in enumerate(points(denoiser, rows, numbers, x, source), start=len(plan.rows) - len(steps)):
        if callback is not None and i >= 0:  # the opening, where there is one, is no row
            callback(i, y)
    return y


def points(
    denoiser: Any, rows: Sequence[tuple[Row, float]], numbers: Tensor, x: Tensor, source: NoiseSource | None
) -> Iterator[Tensor]:
    """The point after each row, at its time, from the start x; `numbers` is `table` on x's device. No host sync."""
    registers, draws, y, first = {BASE: x}, Draws(source, x), x, 0
    for row, t in rows:
        size = len(row.writes) * len(row.reads)
        weights = numbers[first : first + size].view(len(row.writes), -1)
        strength = numbers[first + size : first + size + 2].unbind() if row.learned else ()
        first += size + len(strength)
        y = _advance(denoiser, row, t, weights, strength, registers, y, draws)
        yield y


def _advance(
    denoiser: Any, row: Row, t: float, weights: Tensor, strength: Sequence[Tensor], registers: dict[int, Tensor], y: Tensor,
    draws: Draws,
) -> Tensor:  # fmt: skip
    """One row: the network's call and the op; what no later row reads is gone at the end."""
    there: dict[Column, Tensor] = {"y": y} | dict(registers)
    z = draws.next(row.learned) if row.draws else None
    if row.learned:
        there["f0"], v = denoiser.with_variance(y, t)
        z = None if z is None else of_learned_strength(z, v, *strength)
    elif row.call:
        given = denoiser.outputs(y, t) if row.folded else (denoiser(y, t),)
        there |= {f"f{i}": f for i, f in enumerate(given)}
    if z is not None:
        there["noise"] = z
    seeds = draws.seeds if "noise" in row.reads and z is None else None
    columns = [there[c] for c in row.reads if c != "noise" or z is not None]
    made = ops.combine(columns, weights, seeds, draws.made if seeds is not None else 0)
    for register, column in row.keeps:
        registers[register] = there[column]
    for written, tensor in zip(row.writes, made, strict=True):
        if written is not None:
            registers[written] = tensor
    for r in row.free:
        registers.pop(r, None)
    return made[0]
