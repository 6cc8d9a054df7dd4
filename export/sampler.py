"""sampler.onnx: noise and conditions -> images, the solver and the guidance inside, as a Loop over the plan's table.

The states of the plan's matrices (`export.table`) are the loop's tensors, all float32, and the table is one initializer: a row
for each network call, a column for each weight that is neither 0 nor 1 in every row. An update is a sum of scaled tensors and no
matrix product, which hosts with tensor cores would round to TF32. The weights of the network lie inside the loop's body: outside,
ONNX Runtime does not pack them for its kernels and every call is slower.

Guidance evaluates both conditions in one batch of twice the size: one network graph, and one large
call instead of two small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..guide import Guided, Wrapped
from ..plans import Plan
from .graph import BOOL, FLOAT, INT64, Graph, value
from .network import BATCH, WEIGHTS, Condition, Traced, condition_values
from .table import Table, compile_table

LONGEST_UNROLLED = 8
TABLE = "plan.table"
SCALE = "guidance_scale"
LEVELS = ("c_in", "c_skip", "c_out", "c_noise", "guided")
Weight = float | str  # a number that holds in every row, or the name of a column


@dataclass(frozen=True)
class Contrast:
    """How a guided denoiser's two conditions differ: each input's constant negative value, or None for an input of its own."""

    negatives: dict[str, int | None]
    low: float
    high: float

    def inputs(self, traced: Traced) -> list[Condition]:
        """The further inputs it asks for."""
        found = [c for c in traced.conditions if self.negatives.get(c.name, 0) is None]
        return [Condition(f"negative_{c.name}", c.shape, c.dtype, c.limits) for c in found]


@dataclass(frozen=True)
class Columns:
    """What the loop reads, row by row: a matrix (rows, columns) float32, and each column's name."""

    values: np.ndarray
    names: tuple[str, ...]
    weights: dict[tuple[int, int], Weight]  # (next state, term) -> its weight; left out where it is 0 in every row
    levels: dict[str, Weight]


def contrast_of(guided: Guided) -> Contrast:
    """What a guided denoiser contrasts.

    Raises:
        FastdiffError: guidance that is more than two conditions of one network and a scale.
    """
    same = guided.positive.network is guided.negative.network
    nested = any(isinstance(d, Guided | Wrapped) for d in (guided.positive, guided.negative))
    if guided.rescale or guided.projection or type(guided) is not Guided or not same or nested:
        raise FastdiffError("an engine holds classifier-free guidance of one network with a scale and an interval: no rescale=, "
                            "apg or cfgpp, no second network, no guidance inside guidance")  # fmt: skip
    null = getattr(guided.network, "null_label", None)
    negatives: dict[str, int | None] = {}
    for name, value_ in guided.positive.cond.items():
        other = guided.negative.cond.get(name)
        if other is value_:
            continue
        is_null = name == "class_labels" and null is not None and other is not None and bool((other == null).all())
        negatives[name] = int(null) if is_null and null is not None else None
    if set(guided.negative.cond) != set(guided.positive.cond) or not negatives:
        raise FastdiffError("guidance needs two conditions with the same names and different values; bind them before export")
    return Contrast(negatives, *guided.interval)


def sampler_model(traced: Traced, plan: Plan, contrast: Contrast | None = None, unroll: bool = False) -> tuple[Any, Columns]:
    """The model, and the table's columns.

    Inputs: noise (batch, *shape) float32 unit normals (draw 0); `noises` (draws, batch, *shape) where the plan draws; the
    network's conditions; `guidance_scale` () float32 with guidance. Outputs: `x` (batch, *shape) float32 in the model's data
    range; `images` the same in [0, 1].

    Raises:
        FastdiffError: a plan too long to unroll, or one that the denoiser cannot be asked along.
    """
    table = compile_table(plan)
    if unroll and len(table.rows) > LONGEST_UNROLLED:
        raise FastdiffError(f"--unroll copies the network for every call: at most {LONGEST_UNROLLED}, given {len(table.rows)}")
    columns = columns_of(table, traced.denoiser, contrast)
    g = Graph()
    states = _first_states(g, table, plan, traced)
    row = _Row(traced, table, columns, contrast, _Batch.of(g, traced, contrast))
    if unroll:
        g.weights_of(traced.model, WEIGHTS)
        for i in range(len(table.rows)):
            states = row.emit(g, states, _numbers(g, columns.values[i], columns), [int(k) for k in table.draws[i]])
    else:
        states = _loop(g, row, states)
    _outputs(g, states[0], traced.denoiser)
    full = (BATCH, *traced.shape)
    inputs = [value("noise", FLOAT, full)]
    inputs += [value("noises", FLOAT, (plan.draws, *full))] if plan.draws else []
    inputs += condition_values(traced)
    inputs += [value(c.name, c.onnx_dtype, (BATCH, *c.shape)) for c in (contrast.inputs(traced) if contrast else [])]
    inputs += [value(SCALE, FLOAT, ())] if contrast else []
    outputs = [value("x", FLOAT, full), value("images", FLOAT, full)]
    return g.model("sampler", inputs, outputs, traced.opset), columns


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

    asked = [denoiser._at(float(t)) for t in table.t]
    scalars = np.array([(*c, c_noise) for c, c_noise in asked], np.float64)
    levels = {name: column(name, scalars[:, k]) for k, name in enumerate(LEVELS[:4])}
    if levels["c_noise"] in (0.0, 1.0):  # an input of the network even where it is the same in every row
        levels["c_noise"] = "c_noise"
        values.append(scalars[:, 3])
        names.append("c_noise")
    levels["guided"] = column("guided", _acts(table, denoiser, contrast)) if contrast else 1.0
    weights = {}
    for i, j in zip(*np.nonzero(np.any(table.rows != 0.0, axis=0)), strict=True):
        weights[int(i), int(j)] = column(f"w{i}.{j}", table.rows[:, i, j])
    return Columns(np.stack(values, axis=1).astype(np.float32), tuple(names), weights, levels)


def _acts(table: Table, denoiser: Denoiser, contrast: Contrast) -> np.ndarray:
    """1 in the rows where guidance acts, 0 elsewhere."""
    u = [float(denoiser.schedule.sigma(t)) / max(float(denoiser.schedule.alpha(t)), 1e-300) for t in map(float, table.t)]
    if (contrast.low, contrast.high) == (0.0, float("inf")):
        return np.ones(len(u))
    return np.array([float(contrast.low < v <= contrast.high) for v in u])


@dataclass(frozen=True)
class _Batch:
    """What all rows share: the shape (1,) of the network's batch, and its conditions, both kinds one after the other."""

    size: str
    conditions: tuple[str, ...]

    @classmethod
    def of(cls, g: Graph, traced: Traced, contrast: Contrast | None) -> _Batch:
        size = g.add("Shape", "noise", start=0, end=1)
        if contrast is None:
            return cls(size, tuple(c.name for c in traced.conditions))
        doubled = []
        for c in traced.conditions:
            negative = contrast.negatives.get(c.name, c.name)
            if negative is None:
                negative = f"negative_{c.name}"
            elif isinstance(negative, int):
                negative = g.add("Expand", g.constant([negative], c.dtype), g.add("Shape", c.name))
            doubled.append(g.add("Concat", c.name, negative, axis=0))
        return cls(g.add("Mul", size, g.constant([2], np.int64)), tuple(doubled))


@dataclass(frozen=True)
class _Row:
    """Writes one row of the plan: the network, then the next states."""

    traced: Traced
    table: Table
    columns: Columns
    contrast: Contrast | None
    batch: _Batch

    def emit(self, g: Graph, states: Sequence[str], read: Callable[[Weight], Weight], draws: Sequence[str | int]) -> list[str]:
        """The next states. `read` gives a weight of this row as a number or a tensor (1,); `draws` the places of its noises."""
        terms = [*states, self._denoised(g, states[0], read)]
        terms += [g.add("Gather", "noises", k if isinstance(k, str) else g.constant(k, np.int64), axis=0) for k in draws]
        out = []
        for i in range(len(states)):
            parts = [(read(w), terms[j]) for (to, j), w in self.columns.weights.items() if to == i]
            out.append(_sum(g, [(w, term) for w, term in parts if w != 0.0]) or _zeros(g, states[0]))
        return out

    def _denoised(self, g: Graph, y: str, read: Callable[[Weight], Weight]) -> str:
        c = {name: read(w) for name, w in self.columns.levels.items()}
        x = _scaled(g, c["c_in"], y)
        if self.contrast is not None:
            x = g.add("Concat", x, x, axis=0)
        told = g.add("Expand", _tensor(g, c["c_noise"]), self.batch.size)
        f = g.inline(self.traced.model, [x, told, *self.batch.conditions], WEIGHTS)[0]
        if self.contrast is not None:
            f = self._guided(g, f, c["guided"])
        return _sum(g, [(w, v) for w, v in ((c["c_skip"], y), (c["c_out"], f)) if w != 0.0]) or _zeros(g, y)

    def _guided(self, g: Graph, f: str, acts: Weight) -> str:
        """F_n + scale (F_c - F_n): both have the same four scalars, so this is guidance of x0. Scale 1 where it does not act."""
        if acts == 0.0:
            scale: Weight = 1.0
        elif acts == 1.0:
            scale = SCALE
        else:
            one = g.constant(1.0, np.float32)
            scale = g.add("Add", one, g.add("Mul", _tensor(g, acts), g.add("Sub", SCALE, one)))
        positive, negative = g.add("Split", f, axis=0, num_outputs=2, outputs=2)
        return str(g.add("Add", negative, _scaled(g, scale, g.add("Sub", positive, negative))))


def _loop(g: Graph, row: _Row, states: list[str]) -> list[str]:
    """A Loop over the rows; the body holds the network's weights."""
    body = Graph("body.")
    body.weights_of(row.traced.model, WEIGHTS)
    # an explicit condition, though it never fails: TensorRT's parser refuses a body that reads an omitted one
    count, true = g.constant(len(row.table.rows), np.int64), g.constant(True, np.bool_)
    g.constant(row.columns.values, name=TABLE)
    inner = [f"state_{i}" for i in range(len(states))]
    entries = body.add("Gather", TABLE, "row", axis=0)
    width = len(row.columns.names)
    split = body.add("Split", entries, axis=0, num_outputs=width, outputs=width) if width > 1 else [entries]
    where = dict(zip(row.columns.names, [split] if isinstance(split, str) else split, strict=True))
    places: list[str | int] = []
    if row.table.draws.shape[1]:
        g.constant(row.table.draws, np.int64, name="plan.draws")
        mine = body.add("Gather", "plan.draws", "row", axis=0)
        places = [body.add("Gather", mine, body.constant(k, np.int64), axis=0) for k in range(row.table.draws.shape[1])]
    after = row.emit(body, inner, lambda w: where[w] if isinstance(w, str) else w, places)
    outs = [f"next_{i}" for i in range(len(states))]
    for name, out in zip(after, outs, strict=True):
        body.add("Identity", name, into=[out])
    body.add("Identity", "going", into=["still_going"])
    full = (BATCH, *row.traced.shape)
    inputs = [value("row", INT64, ()), value("going", BOOL, ()), *(value(n, FLOAT, full) for n in inner)]
    graph = body.graph("row", inputs, [value("still_going", BOOL, ()), *(value(n, FLOAT, full) for n in outs)])
    results = [g.name("sampled") for _ in states]
    g.nodes.append(helper.make_node("Loop", [count, true, *states], results, name="plan", body=graph))
    return results


def _first_states(g: Graph, table: Table, plan: Plan, traced: Traced) -> list[str]:
    """The states before the first call, from the unit noise and the draws before it."""
    start = table.start.copy()
    start[:, 0] *= plan.start[1]
    terms = ["noise"]
    for k in range(start.shape[1] - 1):
        used = bool(np.any(start[:, 1 + k]))
        terms.append(g.add("Gather", "noises", g.constant(k, np.int64), axis=0) if used else "")
    zero = ""
    out: list[str] = []
    for weights in start:
        found = _sum(g, [(float(w), term) for w, term in zip(weights, terms, strict=True) if w != 0.0])
        if not found:
            found = zero = zero or _zeros(g, "noise")
        out.append(found)
    return out


def _outputs(g: Graph, x: str, denoiser: Denoiser) -> None:
    low, high = denoiser.data_range
    g.add("Identity", x, into=["x"])
    unit = g.add("Div", g.add("Sub", x, g.constant(low, np.float32)), g.constant(high - low, np.float32))
    g.add("Clip", unit, g.constant(0.0, np.float32), g.constant(1.0, np.float32), into=["images"])


def _numbers(g: Graph, row: np.ndarray, columns: Columns) -> Callable[[Weight], Weight]:
    given = dict(zip(columns.names, map(float, row), strict=True))
    return lambda w: given[w] if isinstance(w, str) else w


def _tensor(g: Graph, w: Weight) -> str:
    return w if isinstance(w, str) else g.constant([w], np.float32)


def _scaled(g: Graph, w: Weight, x: str) -> str:
    return x if w == 1.0 else str(g.add("Mul", x, _tensor(g, w)))


def _sum(g: Graph, terms: Sequence[tuple[Weight, str]]) -> str:
    """The weighted sum, in order; "" where there is no term."""
    total = ""
    for w, x in terms:
        part = _scaled(g, w, x)
        total = g.add("Add", total, part) if total else part
    return total


def _zeros(g: Graph, like: str) -> str:
    return str(g.add("Sub", like, like))
