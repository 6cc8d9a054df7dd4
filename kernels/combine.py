"""The sampler's update as one registered op: a small matrix times the tensors of a row, each read once, each result written once.

    out[j] = sum_i weights[j, i] inputs[i] + weights[j, -1] noise(seeds, draw)

A row of a Plan is linear in the point, the network's outputs, the base, the history and the noises, and so are guidance and the
conversion of what a network predicts: all of it is folded into the matrix (fastdiff.fused). The matrix lies on the device, so a
loop of rows uploads its numbers once. Draw k of a seed is fastdiff.noise's, made inside the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..errors import FastdiffError
from ..philox import normals
from .availability import missing_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INPUTS, OUTPUTS = 16, 8  # at most; the largest table of fastdiff's solvers takes 12 and 5


def result_dtype(inputs: Sequence[Tensor]) -> torch.dtype:
    """float32, or wider where an input is."""
    return reduce(torch.promote_types, (x.dtype for x in inputs), torch.float32)


def reference(inputs: Sequence[Tensor], weights: Tensor, seeds: Tensor | None = None, draw: int = 0) -> list[Tensor]:
    """The torch form, on any device; it reads no weight on the host."""
    shape, dtype = inputs[0].shape, result_dtype(inputs)
    columns = [x.to(dtype) for x in inputs]
    if seeds is not None:
        columns.append(normals(seeds, draw, math.prod(shape[1:])).view(shape).to(dtype))
    weights = weights.to(dtype)
    out = []
    for row in weights:
        total = columns[0] * row[0]
        for column, weight in zip(columns[1:], row[1:], strict=True):
            total.addcmul_(column, weight)
        out.append(total)
    return out


def check(inputs: Sequence[Tensor], weights: Tensor, seeds: Tensor | None, draw: int) -> None:
    """The arguments of the op, on the side of eager and of tracing alike.

    Raises:
        FastdiffError: what was given and what is allowed.
    """
    if not 1 <= len(inputs) <= INPUTS or any(x.shape != inputs[0].shape or x.device != inputs[0].device for x in inputs):
        given = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in inputs) or "none"
        raise FastdiffError(f"combine needs 1 to {INPUTS} tensors (B, ...) of one shape on one device; given {given}")
    if not all(x.is_floating_point() and x.ndim for x in inputs):
        given = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        raise FastdiffError(f"combine needs floating-point tensors (B, ...); given {given}")
    columns = len(inputs) + (seeds is not None)
    if weights.ndim != 2 or weights.shape[1] != columns or not 1 <= weights.shape[0] <= OUTPUTS:
        raise FastdiffError(f"combine's weights must be (1 to {OUTPUTS}, {columns}); given {tuple(weights.shape)}")
    if weights.device != inputs[0].device or not weights.is_floating_point():
        raise FastdiffError(f"combine's weights must be floating point on {inputs[0].device}; given {weights.dtype} on "
                            f"{weights.device}")  # fmt: skip
    if seeds is not None and (seeds.shape != inputs[0].shape[:1] or seeds.dtype != torch.int64 or seeds.device != weights.device):
        given = f"{tuple(seeds.shape)} {seeds.dtype} on {seeds.device}"
        raise FastdiffError(f"combine needs one int64 seed a sample on {weights.device}; given {given}")
    if not 0 <= draw < 2**31:
        raise FastdiffError(f"combine's draw must lie in [0, 2^31); given {draw}")


def why_not(inputs: Sequence[Tensor]) -> str | None:
    """Why the kernel does not take these inputs and the torch reference runs instead; None where it runs."""
    if reason := missing_triton(inputs[0].device):
        return reason
    if wrong := [x.dtype for x in inputs if x.dtype not in DTYPES]:
        return f"the kernel takes float32, float16 and bfloat16; given {wrong[0]}"
    if inputs[0].numel() == 0:
        return "the inputs are empty"
    if inputs[0][0].numel() >= 2**31:
        return "one sample has 2^31 elements or more"
    return None


@torch.library.custom_op(
    "fastdiff::combine", mutates_args=(), schema="(Tensor[] inputs, Tensor weights, Tensor? seeds, int draw) -> Tensor[]"
)
def combine(inputs: Sequence[Tensor], weights: Tensor, seeds: Tensor | None, draw: int) -> list[Tensor]:
    """One tensor a row of the weights, of the inputs' shape, contiguous, float32 (float64 where an input is)."""
    check(inputs, weights, seeds, draw)
    if why_not(inputs) is None:
        from .combine_triton import forward

        with torch.cuda.device(inputs[0].device):
            return forward(inputs, weights, seeds, draw)
    return [y.contiguous() for y in reference(inputs, weights, seeds, draw)]


@combine.register_fake
def _(inputs: Sequence[Tensor], weights: Tensor, seeds: Tensor | None, draw: int) -> list[Tensor]:
    check(inputs, weights, seeds, draw)
    return [inputs[0].new_empty(inputs[0].shape, dtype=result_dtype(inputs)) for _ in range(weights.shape[0])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, weights, seeds, ctx.draw = inputs
    ctx.save_for_backward(weights, seeds, *tensors)


def _gradients(ctx: Any, given: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The op again, with the matrix transposed; a weight's gradient is a dot product."""
    weights, seeds, *inputs = ctx.saved_tensors
    rows, grads = zip(*[(j, g) for j, g in enumerate(given) if g is not None], strict=True)
    across = weights[list(rows), : len(inputs)].T.contiguous()
    back = [g for part in across.split(OUTPUTS) for g in torch.ops.fastdiff.combine(list(grads), part, None, 0)]
    dweights = None
    if ctx.needs_input_grad[1]:
        columns = [x.to(grads[0].dtype) for x in inputs]
        if seeds is not None:
            columns.append(normals(seeds, ctx.draw, math.prod(inputs[0].shape[1:])).view(inputs[0].shape).to(grads[0].dtype))
        found = torch.stack([torch.stack([(g * x).sum() for x in columns]) for g in grads])
        dweights = torch.zeros_like(weights).index_copy(0, torch.tensor(rows, device=weights.device), found.to(weights.dtype))
    return [g.to(x.dtype) for g, x in zip(back, inputs, strict=True)], dweights, None, None


combine.register_autograd(_gradients, setup_context=_save)


def _to_onnx(inputs: Sequence[Any], weights: Any, seeds: Any, draw: int) -> list[Any]:
    """combine as Mul and Add of float32 (or float64) tensors."""
    import onnx_ir
    from onnxscript import opset18

    op: Any = opset18
    if seeds is not None:
        raise FastdiffError("an exported graph takes its noise as an input: no seeds in combine")
    double = any(x.dtype == onnx_ir.DataType.DOUBLE for x in inputs)
    kind = onnx_ir.DataType.DOUBLE if double else onnx_ir.DataType.FLOAT
    columns, table = [op.Cast(x, to=int(kind)) for x in inputs], op.Cast(weights, to=int(kind))
    out = []
    for j in range(weights.shape[0]):
        row = op.Gather(table, op.Constant(value_int=j), axis=0)
        terms = [op.Mul(x, op.Gather(row, op.Constant(value_int=i), axis=0)) for i, x in enumerate(columns)]
        out.append(reduce(op.Add, terms))
    return out


def onnx_table() -> dict[Any, Any]:
    """For torch.onnx.export(..., custom_translation_table=)."""
    return {torch.ops.fastdiff.combine.default: _to_onnx}
