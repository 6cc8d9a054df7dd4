"""sampler.onnx: noise and conditions -> images, the solver and the guidance inside, as a Loop over the plan's table.

The states of the plan's matrices (`export.table`) are the loop's tensors, all float32, and the table is one initializer: a row
for each network call, a column for each weight that is neither 0 nor 1 in every row. An update is a sum of scaled tensors and no
matrix product, which hosts with tensor cores would round to TF32. The weights of the network lie inside the loop's body: outside,
ONNX Runtime does not pack them for its kernels and every call is slower.

With a plan as input the table has a column for every weight there can be, and is an input of any number of rows: one engine runs
every plan whose states fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from ..errors import FastdiffError
from ..plans import Plan
from .columns import Columns, columns_of
from .evaluate import Contrast, Evaluation
from .graph import BOOL, FLOAT, INT64, Graph, Weight, total, value, zeros
from .network import BATCH, WEIGHTS, Traced
from .planinput import DRAWS, TABLE, Layout
from .table import Table, compile_table

LONGEST_UNROLLED = 8
DECODER = "decoder."  # prefix of its weights


def sampler_model(
    traced: Traced, plan: Plan, contrast: Contrast | None = None, unroll: bool = False, layout: Layout | None = None
) -> tuple[Any, Columns]:
    """The model, and the table's columns.

    Inputs: noise (batch, *shape) float32 unit normals (draw 0); `noises` (draws, batch, *shape) where the plan draws; the
    network's conditions; `guidance_scale` () float32 with guidance; with a layout, the arrays of `planinput.arrays`. Outputs: `x`
    (batch, *shape) float32 in the model's data range; `images` the same in [0, 1].

    Raises:
        FastdiffError: a plan too long to unroll, or one that the denoiser cannot be asked along.
    """
    table = compile_table(plan)
    if unroll and len(table.rows) > LONGEST_UNROLLED:
        raise FastdiffError(f"--unroll copies the network for every call: at most {LONGEST_UNROLLED}, given {len(table.rows)}")
    columns = layout.columns() if layout else columns_of(table, traced.denoiser, contrast)
    g = Graph()
    row = _Row(table, columns, Evaluation.of(g, traced, contrast))
    if layout:
        states = _loop(g, row, layout.first_states(g), layout)
    elif unroll:
        states = _first_states(g, table, plan)
        g.weights_of(traced.model, WEIGHTS)
        for i in range(len(table.rows)):
            states = row.emit(g, states, _numbers(columns.values[i], columns), [int(k) for k in table.draws[i]])
    else:
        states = _loop(g, row, _first_states(g, table, plan))
    shown = outputs(g, states[0], traced)
    full = (BATCH, *traced.sizes)
    draws: list[Any] = [layout.draws] if layout and layout.draws else [plan.draws] if plan.draws else []
    inputs = [value("noise", FLOAT, full), *(value("noises", FLOAT, (n, *full)) for n in draws), *row.evaluation.inputs()]
    inputs += layout.inputs() if layout else []
    return g.model("sampler", inputs, [value("x", FLOAT, full), shown], traced.opset), columns


@dataclass(frozen=True)
class _Row:
    """Writes one row of the plan: the network, then the next states."""

    table: Table
    columns: Columns
    evaluation: Evaluation

    def emit(self, g: Graph, states: Sequence[str], read: Callable[[Weight], Weight], draws: Sequence[str | int]) -> list[str]:
        """The next states. `read` gives a weight of this row as a number or a tensor (1,); `draws` the places of its noises."""
        levels = {name: read(w) for name, w in self.columns.levels.items()}
        terms = [*states, self.evaluation.denoised(g, states[0], levels)]
        terms += [g.add("Gather", "noises", k if isinstance(k, str) else g.constant(k, np.int64), axis=0) for k in draws]
        out = []
        for i in range(len(states)):
            parts = [(read(w), terms[j]) for (to, j), w in self.columns.weights.items() if to == i]
            out.append(total(g, [(w, term) for w, term in parts if w != 0.0]) or zeros(g, states[0]))
        return out


def _loop(g: Graph, row: _Row, states: list[str], layout: Layout | None = None) -> list[str]:
    """A Loop over the rows; the body holds the network's weights."""
    body = Graph("body.")
    body.weights_of(row.evaluation.traced.model, WEIGHTS)
    # an explicit condition, though it never fails: TensorRT's parser refuses a body that reads an omitted one
    true, width = g.constant(True, np.bool_), layout.width if layout else row.table.draws.shape[1]
    if layout:
        count = g.add("Squeeze", g.add("Shape", TABLE, start=0, end=1))
    else:
        count = g.constant(len(row.table.rows), np.int64)
        g.constant(row.columns.values, name=TABLE)
        if width:
            g.constant(row.table.draws, np.int64, name=DRAWS)
    inner = [f"state_{i}" for i in range(len(states))]
    where = _entries(body, row.columns.names)
    places: list[str | int] = []
    if width:
        mine = body.add("Gather", DRAWS, "row", axis=0)
        places = [body.add("Gather", mine, body.constant(k, np.int64), axis=0) for k in range(width)]
    after = row.emit(body, inner, lambda w: where[w] if isinstance(w, str) else w, places)
    outs = [f"next_{i}" for i in range(len(states))]
    for name, out in zip(after, outs, strict=True):
        body.add("Identity", name, into=[out])
    body.add("Identity", "going", into=["still_going"])
    full = (BATCH, *row.evaluation.traced.sizes)
    inputs = [value("row", INT64, ()), value("going", BOOL, ()), *(value(n, FLOAT, full) for n in inner)]
    graph = body.graph("row", inputs, [value("still_going", BOOL, ()), *(value(n, FLOAT, full) for n in outs)])
    results = [g.name("sampled") for _ in states]
    g.nodes.append(helper.make_node("Loop", [count, true, *states], results, name="plan", body=graph))
    return results


def _entries(body: Graph, names: Sequence[str]) -> dict[str, str]:
    """This row's columns, each a tensor (1,)."""
    entries = body.add("Gather", TABLE, "row", axis=0)
    split = body.add("Split", entries, axis=0, num_outputs=len(names), outputs=len(names)) if len(names) > 1 else [entries]
    return dict(zip(names, split, strict=True))


def _first_states(g: Graph, table: Table, plan: Plan) -> list[str]:
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
        found = total(g, [(float(w), term) for w, term in zip(weights, terms, strict=True) if w != 0.0])
        if not found:
            found = zero = zero or zeros(g, "noise")
        out.append(found)
    return out


def outputs(g: Graph, x: str, traced: Traced) -> Any:
    """Writes `x`, and `images` in [0, 1], decoded where the samples are latents; what `images` is."""
    low, high = traced.denoiser.data_range
    g.add("Identity", x, into=["x"])
    shown: Any = (BATCH, *traced.sizes)
    if traced.decoder is not None:
        g.weights_of(traced.decoder, DECODER)
        x = g.inline(traced.decoder, [x], DECODER)[0]
        shown = (BATCH, *(d.dim_value for d in traced.decoder.graph.output[0].type.tensor_type.shape.dim[1:]))
    unit = g.add("Div", g.add("Sub", x, g.constant(low, np.float32)), g.constant(high - low, np.float32))
    g.add("Clip", unit, g.constant(0.0, np.float32), g.constant(1.0, np.float32), into=["images"])
    return value("images", FLOAT, shown)


def _numbers(row: np.ndarray, columns: Columns) -> Callable[[Weight], Weight]:
    given = dict(zip(columns.names, map(float, row), strict=True))
    return lambda w: given[w] if isinstance(w, str) else w
