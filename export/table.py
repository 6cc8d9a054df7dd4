"""A plan's program as matrices: what every executor without Python's loop runs, and what the exported graph holds.

A plan is affine in its states, the prediction and the noises, so a row is one matrix: next states = M [states, D, z...]. States
are the point where the next row evaluates, the base, and the live history entries and noises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import FastdiffError
from ..plans import Plan
from ..program import Step


@dataclass(frozen=True)
class Table:
    """The matrices of a plan, float64, one row for each network call (rows without one are multiplied into their neighbours).

    Shapes, with S states, N network calls, K draws in all and at most m draws in a row:
        start (S, 1 + K): the first states over [start state, draw 1, ..., draw K].
        rows (N, S, S + 1 + m): the next states over [states, D, the row's draws]; state 0 is the point to evaluate.
        draws (N, m): the place of each row's draws in draw order, from 0; where a row draws less, 0 with weight 0.
        t (N,): the time that the denoiser is asked at.
    """

    start: np.ndarray
    rows: np.ndarray
    draws: np.ndarray
    t: np.ndarray

    @property
    def states(self) -> int:
        return self.rows.shape[1]

    def run(self, x: np.ndarray, noises: Sequence[np.ndarray], denoise: Callable[[np.ndarray, float], np.ndarray]) -> np.ndarray:
        """The sample, from the start state x and the plan's draws in order: the graph's arithmetic, in numpy."""
        states = np.tensordot(self.start, np.stack([x, *noises]), 1)
        for matrix, places, t in zip(self.rows, self.draws, self.t, strict=True):
            states = np.tensordot(matrix, np.stack([*states, denoise(states[0], float(t)), *(noises[k] for k in places)]), 1)
        return np.asarray(states[0])


def compile_table(plan: Plan) -> Table:
    """The table of a plan.

    Raises:
        FastdiffError: a plan that never calls the network, or one with learned variance, which is not affine.
    """
    if plan.learned_variance:
        raise FastdiffError(f"plan {plan.name} takes its variance from the network: an engine holds fixed ones (small, large)")
    groups: list[list[Step]] = [[]]  # the rows before the first call, then each call with the rows without one after it
    for step in plan.program.all:
        if step.call:
            groups.append([])
        groups[-1].append(step)
    if len(groups) == 1:
        raise FastdiffError(f"plan {plan.name} never calls the network: there is nothing to export")
    size = 1 + plan.registers
    width = max(_draw_count(group) for group in groups[1:])
    start, drawn = _start(plan, groups[0], size)
    rows, places = [], []
    for group in groups[1:]:
        count = _draw_count(group)
        rows.append(_row(group, size, width))
        places.append([drawn + k if k < count else 0 for k in range(width)])
        drawn += count
    draws = np.array(places, np.int64).reshape(len(rows), width)
    return _merged(Table(start, np.stack(rows), draws, np.array([group[0].t for group in groups[1:]])))


def _draw_count(group: Sequence[Step]) -> int:
    return sum(step.draw is not None for step in group)


def _start(plan: Plan, group: Sequence[Step], size: int) -> tuple[np.ndarray, int]:
    """The states before the first call, over [start state, draws], and the draws used so far."""
    unit = np.eye(1 + plan.draws)
    states = np.zeros((size, 1 + plan.draws))
    states[0] = states[1] = unit[0]
    return _walk(group, states, None, list(unit[1:])), _draw_count(group)


def _row(group: Sequence[Step], size: int, width: int) -> np.ndarray:
    unit = np.eye(size + 1 + width)
    return _walk(group, unit[:size].copy(), unit[size], list(unit[size + 1 :]))


def _walk(group: Sequence[Step], states: np.ndarray, prediction: np.ndarray | None, noises: list[np.ndarray]) -> np.ndarray:
    """`sampling.run` on symbols: every state is a vector over what the group starts from. Register r is state 1 + r."""
    for step in group:
        y = states[0].copy()
        for register in step.keeps:
            states[1 + register] = prediction
        for register, p, q in step.stores:
            states[1 + register] = (p or 0.0) * y + (0.0 if q is None or prediction is None else q * prediction)
        if step.draw is not None:
            states[1 + step.draw] = noises.pop(0)
        base = sum(w * states[1 + r] for r, w in step.base or ())
        if step.onto:
            states[1] = base
        states[0] = sum(w * states[1 + r] for r, w in step.next)
        if step.base is None:
            states[1] = states[0]
        elif step.base:
            states[1] = base
        for register in step.free:
            states[1 + register] = 0.0
    return states


def _merged(table: Table) -> Table:
    """Without the base where it always is the point itself, as in multistep methods."""
    if not (np.array_equal(table.start[0], table.start[1]) and np.array_equal(table.rows[:, 0], table.rows[:, 1])):
        return table
    rows = table.rows.copy()
    rows[:, :, 0] += rows[:, :, 1]
    return Table(np.delete(table.start, 1, 0), np.delete(np.delete(rows, 1, 1), 1, 2), table.draws, table.t)
