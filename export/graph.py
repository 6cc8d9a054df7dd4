"""An ONNX graph written node by node, and another model's graph copied into it under new names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

IR = 10  # read by ONNX Runtime 1.18 and later, TensorRT 10 and later
FLOAT, DOUBLE, INT64, BOOL = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL
Shape = Sequence[Any]  # numbers, and names for what may have any size
Weight = float | str  # a number, or the name of a tensor (1,) that holds it


class Graph:
    """Nodes and initializers in the order of their making; names are unique within the prefix."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self._count = 0

    def name(self, stem: str) -> str:
        self._count += 1
        return f"{self.prefix}{stem}_{self._count}"

    def add(self, op: str, *inputs: str, outputs: int = 1, into: Sequence[str] = (), **attributes: Any) -> Any:
        """A node; its output's name, or their list where there are several. `into` gives them names."""
        names = list(into) or [self.name(op) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=self.name(f"node_{op}"), **attributes))
        return names[0] if len(names) == 1 else names

    def constant(self, value: Any, dtype: Any = None, name: str = "") -> str:
        """An initializer; equal ones without a name of their own are one."""
        array = np.asarray(value, dtype)
        key = (str(array.dtype), array.tobytes(), array.shape)
        if not name and key in self._constants:
            return self._constants[key]
        name = name or self.name("const")
        self._constants[key] = name
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def weights_of(self, model: ModelProto, prefix: str) -> None:
        """The model's initializers under `prefix`: once, however often its nodes are then copied in."""
        for tensor in model.graph.initializer:
            copied = TensorProto()
            copied.CopyFrom(tensor)
            copied.name = prefix + tensor.name
            self.initializers.append(copied)

    def inline(self, model: ModelProto, inputs: Sequence[str], weights: str) -> list[str]:
        """Copies the model's nodes in, fed by `inputs`; the names of its outputs. `weights` is the prefix of `weights_of`."""
        call = self.name("call") + "."
        known = {tensor.name: weights + tensor.name for tensor in model.graph.initializer}
        known.update(zip((i.name for i in model.graph.input), inputs, strict=True))
        self.nodes += [_renamed(node, known, call) for node in model.graph.node]
        return [known.get(o.name, call + o.name) for o in model.graph.output]

    def model(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any], opset: int) -> ModelProto:
        graph = self.graph(name, inputs, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR, producer_name="fastdiff")
        return model

    def graph(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> GraphProto:
        return helper.make_graph(self.nodes, name, list(inputs), list(outputs), self.initializers)


def value(name: str, dtype: int, shape: Shape) -> Any:
    """An input or output of a graph."""
    return helper.make_tensor_value_info(name, dtype, list(shape))


def weight_tensor(g: Graph, w: Weight) -> str:
    return w if isinstance(w, str) else g.constant([w], np.float32)


def scaled(g: Graph, w: Weight, x: str) -> str:
    return x if w == 1.0 else str(g.add("Mul", x, weight_tensor(g, w)))


def total(g: Graph, terms: Sequence[tuple[Weight, str]]) -> str:
    """The weighted sum, in order; "" where there is no term."""
    found = ""
    for w, x in terms:
        part = scaled(g, w, x)
        found = g.add("Add", found, part) if found else part
    return found


def joined(g: Graph, f: str, c_skip: str, c_out: str) -> str:
    """The v of the x0 and the eps in f's two halves, as `prediction.joined`; the coefficients are tensors."""
    x0, eps = g.add("Split", f, axis=1, num_outputs=2, outputs=2)
    v = g.add("Add", g.add("Mul", eps, c_skip), g.add("Mul", x0, c_out))
    return str(g.add("Div", v, g.add("Add", g.add("Mul", c_skip, c_skip), g.add("Mul", c_out, c_out))))


def zeros(g: Graph, like: str) -> str:
    return str(g.add("Sub", like, like))


def clean(model: ModelProto) -> ModelProto:
    """Without local functions, and without what the exporter leaves for debugging: four times the bytes of a small network."""
    if model.functions:
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    _strip(model.graph)
    return model


def check(path: str) -> None:
    """The full check of the file at `path`, shapes inferred strictly (by path: a model beyond 2 GB has no other way)."""
    onnx.checker.check_model(path, full_check=True)


def _strip(graph: GraphProto) -> None:
    for g in graphs(graph):
        g.doc_string = ""
        del g.value_info[:]
        del g.metadata_props[:]
        for item in (*g.input, *g.output, *g.initializer, *g.node):
            item.doc_string = ""
            del item.metadata_props[:]


def graphs(graph: GraphProto) -> list[GraphProto]:
    """The graph and every graph inside its nodes."""
    return [graph, *(found for node in graph.node for inner in _subgraphs(node) for found in graphs(inner))]


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    found = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    return found + [g for a in node.attribute if a.type == AttributeProto.GRAPHS for g in a.graphs]


def _renamed(node: NodeProto, known: Mapping[str, str], prefix: str) -> NodeProto:
    """A copy whose names are `known`'s, or get the prefix; so too everything inside its subgraphs."""
    def new(name: str) -> str:
        return known.get(name, prefix + name) if name else ""

    copied = NodeProto()
    copied.CopyFrom(node)
    copied.name = prefix + node.name
    for names in (copied.input, copied.output):
        names[:] = [new(name) for name in names]
    for inner in _subgraphs(copied):
        nodes = [_renamed(child, known, prefix) for child in inner.node]
        del inner.node[:]
        inner.node.extend(nodes)
        for item in (*inner.input, *inner.output, *inner.initializer):
            item.name = new(item.name)
    return copied
