"""A plan's table as a graph reads it: a column for each weight that varies, the denoiser's four scalars among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..denoiser import Denoiser
from ..schedule import NoiseSchedule
from .evaluate import LEVELS, Contrast
from .graph import Weight
from .table import Table


@dataclass(frozen=True)
class Columns:
    """What the loop reads, row by row: a matrix (rows, columns) float32, and each column's name. A weight is a number that holds
    in every row, or the name of a column."""

    values: np.ndarray
    names: tuple[str, ...]
    weights: dict[tuple[int, int], Weight]  # (next state, term) -> its weight; left out where it is 0 in every row
    levels: dict[str, Weight]


def columns_of(table: Table, denoiser: Denoiser, contrast: Contrast | None) -> Columns:
    """The table's columns: the denoiser's scalars at every row's own time, then the plan's weights."""
    values: list[np.ndarray] = []
    names: list[str] = []

    def column(name: str, entries: np.ndarray) -> Weight:
        if np.all(entries == entries[0]) and entries[0] in (0.0, 1.0):
            return float(entries[0])
        values.append(entries)
        names.append(name)
        return name

    scalars = levels_at(denoiser, table.t)
    levels = {name: column(name, scalars[:, k]) for k, name in enumerate(LEVELS[:4])}
    if levels["c_noise"] in (0.0, 1.0):  # an input of the network even where it is the same in every row
        levels["c_noise"] = "c_noise"
        values.append(scalars[:, 3])
        names.append("c_noise")
    levels["guided"] = column("guided", acts_at(denoiser.schedule, table.t, contrast.low, contrast.high)) if contrast else 1.0
    weights = {}
    for i, j in zip(*np.nonzero(np.any(table.rows != 0.0, axis=0)), strict=True):
        weights[int(i), int(j)] = column(f"w{i}.{j}", table.rows[:, i, j])
    return Columns(np.stack(values, axis=1).astype(np.float32), tuple(names), weights, levels)


def levels_at(denoiser: Denoiser, times: np.ndarray) -> np.ndarray:
    """c_in, c_skip, c_out and c_noise of every time, (N, 4) float64."""
    return np.array([(*c, c_noise) for c, c_noise in (denoiser.level(float(t)) for t in times)], np.float64)


def acts_at(schedule: NoiseSchedule, times: np.ndarray, low: float, high: float) -> np.ndarray:
    """(N,) 1 at the times where guidance acts, sigma/alpha within (low, high], 0 elsewhere."""
    if (low, high) == (0.0, float("inf")):
        return np.ones(len(times))
    u = [float(schedule.sigma(t)) / max(float(schedule.alpha(t)), 1e-300) for t in map(float, times)]
    return np.array([float(low < v <= high) for v in u])
