"""network.onnx: one evaluation of a denoiser, (x, t, conditions) -> x0, through torch.export; any batch size.

The network is traced once, as (c_in*x, c_noise, conditions) -> F. What surrounds it, the four scalars of the prediction type, is
float64 arithmetic on t in network.onnx and columns of the plan's table in sampler.onnx.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..denoiser import Denoiser
from ..errors import FastdiffError
from .graph import DOUBLE, FLOAT, IR, Graph, clean, joined, value
from .half import half_copy
from .need import need

OPSETS = {"onnxruntime": 20, "tensorrt": 21}  # 20: GroupNorm in the form ORT fuses; 21: as one GroupNormalization node
LIMITS = (18, 23)  # what torch.onnx writes and all hosts read; from 23 on attention is one node
BF16 = 22
BATCH = "batch"
SIZES = ("height", "width")
WEIGHTS = "network."  # prefix of the network's weights in every graph
# with the dtype of the network's weights, where it is not float32
PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": None}


@dataclass(frozen=True)
class Condition:
    """An input beside x and t, one entry a sample: its name, one sample's shape, its dtype and its whole-number range."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    limits: tuple[int, int] | None = None

    @property
    def onnx_dtype(self) -> int:
        from onnx import helper

        return int(helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)))


@dataclass(frozen=True)
class Traced:
    """A denoiser's network as an ONNX model (c_in*x, c_noise, *conditions) -> F in float32 (of prediction "both" still its two
    halves); and what it was made from."""

    model: Any
    denoiser: Denoiser
    conditions: tuple[Condition, ...]
    opset: int
    precision: str
    multiple: int = 0  # with a height and width of any size that this divides; 0: of the denoiser's own
    decoder: Any = None  # an ONNX model from samples to images in the data range, where samples are latents

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.denoiser.shape is not None
        return self.denoiser.shape

    @property
    def sizes(self) -> tuple[int | str, ...]:
        """A sample's shape, with names where it may vary."""
        return (*self.shape[:-2], *SIZES) if self.multiple else self.shape


class _Raw(nn.Module):
    """F for an input already scaled, in float32 outside whatever the network's precision inside."""

    def __init__(self, denoiser: Denoiser, network: Any, names: tuple[str, ...], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.output = denoiser.output
        self.names, self.fixed = names, dict(fixed)
        self.both = denoiser.prediction == "both"
        parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
        self.dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    def forward(self, x: Tensor, c_noise: Tensor, *conditions: Tensor) -> Tensor:
        given = dict(zip(self.names, conditions, strict=True))
        f = self.output(self.network(x.to(self.dtype), c_noise, **given, **self.fixed)).float()
        # a learned variance is not part of x0
        return f[:, : x.shape[1]] if f.shape[1] == 2 * x.shape[1] and not self.both else f


class _Head(nn.Module):
    """c_in, c_skip, c_out and c_noise (B,) float32 of times (B,) float64, by the denoiser's own float64 arithmetic."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, t: Tensor) -> tuple[Tensor, ...]:
        return head_values(self.denoiser, t)


def head_values(denoiser: Denoiser, t: Tensor) -> tuple[Tensor, ...]:
    c, c_noise = denoiser._at_tensor(t.float(), t)
    ones = torch.ones_like(t)
    flat = [v.double().view(-1) if isinstance(v, Tensor) else v for v in c]
    return (*((v * ones).float() for v in flat), c_noise + 0 * t.float())


def conditions_of(denoiser: Denoiser) -> tuple[tuple[Condition, ...], dict[str, Any]]:
    """The inputs that the bound conditioning asks for (every tensor, batch first), and what stays fixed (all else)."""
    bound = dict(denoiser.cond)
    classes = getattr(getattr(denoiser.network, "config", None), "num_classes", None)
    if classes and "class_labels" not in bound:
        bound["class_labels"] = torch.zeros(1, dtype=torch.int64)
    found = []
    for name, v in bound.items():
        if isinstance(v, Tensor):
            limits = (0, classes - 1) if name == "class_labels" and classes else None
            found.append(Condition(name, tuple(v.shape[1:]), str(v.dtype).removeprefix("torch."), limits))
    return tuple(found), {name: v for name, v in bound.items() if not isinstance(v, Tensor)}


@dataclass(frozen=True)
class Form:
    """How a network is written: precision, target, opset (0: the target's own), and `multiple`, of which height and width may be
    any (0: they are fixed)."""

    precision: str = "fp32"
    target: str = "onnxruntime"
    opset: int = 0
    multiple: int = 0

    def check(self) -> int:
        """The opset.

        Raises:
            FastdiffError: a precision, target or opset that there is not.
        """
        if self.precision not in PRECISIONS or self.target not in OPSETS:
            given = f"{self.precision!r}, {self.target!r}"
            raise FastdiffError(f"precision is {' or '.join(PRECISIONS)}, target {' or '.join(OPSETS)}; given {given}")
        low, high = LIMITS
        if self.opset and not low <= self.opset <= high:
            raise FastdiffError(f"--opset is {low} to {high}; given {self.opset}")
        if self.precision == "int8" and self.target != "onnxruntime":
            raise FastdiffError("int8 is calibrated with ONNX Runtime's tools, for --target onnxruntime")
        if self.precision == "bf16" and 0 < self.opset < BF16:
            raise FastdiffError(f"ONNX has bf16 convolutions from opset {BF16} on; given --opset {self.opset}")
        return self.opset or (BF16 if self.precision == "bf16" else OPSETS[self.target])


def trace(denoiser: Denoiser, form: Form | None = None) -> Traced:
    """The denoiser's network as an ONNX model with a batch of any size; int8 is made from it afterwards (`int8`).

    Raises:
        FastdiffError: no shape, an unknown precision or target, a network that torch.export cannot take (which operation, where).
    """
    need("onnx"), need("onnxscript")
    form = form or Form()
    opset = form.check()
    if denoiser.shape is None:
        raise FastdiffError("an engine needs the shape of a sample: make the Denoiser with shape=")
    if denoiser.dtype not in (torch.float32, None):
        raise FastdiffError(f"export starts from float32 weights and rounds them itself; this network has {denoiser.dtype}")
    conditions, fixed = conditions_of(denoiser)
    dtype = PRECISIONS[form.precision]
    network = half_copy(denoiser.network, dtype) if dtype else denoiser.network
    module = _Raw(denoiser, network, tuple(c.name for c in conditions), fixed)
    training = isinstance(network, nn.Module) and network.training
    # two samples: torch.export takes a size of 1 for a constant, and equal sizes for one
    extra = tuple(torch.zeros(2, *c.shape, dtype=getattr(torch, c.dtype)) for c in conditions)
    shape = list(denoiser.shape)
    if form.multiple:
        shape[-2:] = [3 * form.multiple, 5 * form.multiple]
    axes = {len(shape) - 1 + i: torch.export.Dim.AUTO for i in (0, 1)} if form.multiple else {}
    try:
        model = export_module(module.eval(), (torch.zeros(2, *shape), torch.zeros(2), *extra), opset, axes=axes)
    finally:
        module.train(training)
    return Traced(model, denoiser, conditions, opset, form.precision, form.multiple)


def with_decoder(traced: Traced, decoder: nn.Module) -> Traced:
    """The traced network with a decoder behind its sampler, (batch, *shape) -> images in the denoiser's data range, float32.

    Raises:
        FastdiffError: sizes that vary, or a decoder that torch.export cannot take.
    """
    if traced.multiple:
        raise FastdiffError("an engine with a decoder has a fixed height and width: leave out multiple")
    training = decoder.training
    try:
        model = export_module(decoder.eval(), (torch.zeros(2, *traced.shape),), traced.opset)
    finally:
        decoder.train(training)
    return replace(traced, decoder=model)


def network_model(traced: Traced) -> Any:
    """The model (x, t, *conditions) -> x0: x and x0 (batch, *shape) float32, t (batch,) float64 in the schedule's own time."""
    time = torch.full((2,), traced.denoiser.schedule.t_max / 2, dtype=torch.float64)
    head = export_module(_Head(traced.denoiser), (time,), traced.opset)
    g = Graph()
    g.weights_of(head, "head.")
    g.weights_of(traced.model, WEIGHTS)
    column = g.constant([-1] + [1] * len(traced.shape), np.int64)
    c_in, c_skip, c_out, c_noise = g.inline(head, ["t"], "head.")
    c_in, c_skip, c_out = (g.add("Reshape", c, column) for c in (c_in, c_skip, c_out))
    names = [c.name for c in traced.conditions]
    f = g.inline(traced.model, [g.add("Mul", "x", c_in), c_noise, *names], WEIGHTS)[0]
    if traced.denoiser.prediction == "both":
        f = joined(g, f, c_skip, c_out)
    g.add("Add", g.add("Mul", "x", c_skip), g.add("Mul", f, c_out), into=["x0"])
    full = (BATCH, *traced.sizes)
    inputs = [value("x", FLOAT, full), value("t", DOUBLE, (BATCH,)), *condition_values(traced)]
    return g.model("denoiser", inputs, [value("x0", FLOAT, full)], traced.opset)


def levels_model(traced: Traced) -> Any:
    """The model t (batch,) float64 -> c_in, c_skip, c_out, c_noise (batch,): what a host needs to bring a plan into an engine."""
    times = torch.full((2,), traced.denoiser.schedule.t_max / 2, dtype=torch.float64)
    head = export_module(_Head(traced.denoiser), (times,), traced.opset)
    g = Graph()
    g.weights_of(head, "head.")
    names = ("c_in", "c_skip", "c_out", "c_noise")
    for name, v in zip(names, g.inline(head, ["t"], "head."), strict=True):
        g.add("Identity", v, into=[name])
    return g.model("levels", [value("t", DOUBLE, (BATCH,))], [value(n, FLOAT, (BATCH,)) for n in names], traced.opset)


def condition_values(traced: Traced) -> list[Any]:
    return [value(c.name, c.onnx_dtype, (BATCH, *c.shape)) for c in traced.conditions]


def export_module(module: nn.Module, example: tuple[Tensor, ...], opset: int, any_batch: bool = True, axes: Any = None) -> Any:
    """torch.onnx's model of a module whose arguments all have the batch first, of any size or of the example's;
    `axes` are further ones of the first argument that may have any size."""
    batch = torch.export.Dim.AUTO if axes else torch.export.Dim(BATCH, min=1)
    free: list[Any] = [{0: batch, **(axes or {})}, *({0: batch} for _ in example[1:])]
    named = 2 if isinstance(module, _Raw) else len(example)  # the conditions are one argument, of any number
    shapes = (*free[:named], *([tuple(free[named:])] if free[named:] else []))
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module, example, dynamo=True, opset_version=opset, dynamic_shapes=shapes if any_batch else None, verbose=False,
                custom_translation_table={torch.ops.aten.scalar_tensor.default: _scalar, **ops.onnx_table()},
            )  # fmt: skip
    except Exception as e:
        raise FastdiffError(f"this network cannot be exported: {_why(e)}") from e
    assert program is not None
    model = program.model_proto
    model.ir_version = IR
    return clean(model)


def _why(error: BaseException) -> str:
    """What failed and the last line of code outside torch that led there."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    frames = [f for e in (error, cause) for f in traceback.extract_tb(e.__traceback__)]
    outside = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__ and "/contextlib" not in f.filename]
    where = f" (at {Path(outside[-1].filename).name}, line {outside[-1].lineno}: {outside[-1].line})" if outside else ""
    text = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {text[0] if text else 'no message'}{where}"


def _scalar(s: float, dtype: int = 1, layout: str = "", device: str = "", pin_memory: bool = False) -> Any:
    """aten::scalar_tensor with all digits. torch.onnx (2.13) takes a Python number through float32 even where float64 is wanted:
    wrong by 2e-6 of alpha near full noise."""
    import onnx_ir
    from onnxscript import opset18

    exact: Any = onnx_ir.tensor(np.array(s, onnx_ir.DataType(dtype).numpy()))
    return opset18.Constant(value=exact)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not here and on names of dimensions."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
