"""GroupNorm with what surrounds it in a U-Net, as registered ops: SiLU, scale and shift (AdaGN), a residual or an embedding
added before.

    y = silu(GroupNorm(x + residual + added) (1 + scale) + shift)        Wu and He 2018; Dhariwal and Nichol 2021, section 3

`torch.ops.fastdiff.group_norm` and `add_group_norm` run the Triton kernels of group_norm_triton.py on a GPU and the torch
reference wherever those do not run; `why_not` says why. Eager, compiled and exported models see one op.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FastdiffError
from .availability import missing_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GRID = 65_535  # programs on the second and third axis of a launch


class Norm(NamedTuple):  # made at every call: a frozen dataclass takes 3 us
    """What a normalisation does: weight and bias (C,) or None; scale and shift (B, C), both or neither; added (B, C) or None, an
    embedding that is added to every position before."""

    groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    scale: Tensor | None = None
    shift: Tensor | None = None
    silu: bool = True
    added: Tensor | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """Elements from a sample's scale to the next one's, and its shift's."""
        return (0, 0) if self.scale is None or self.shift is None else (self.scale.stride(0), self.shift.stride(0))


def like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape and dtype; channels-last where x is, else contiguous."""
    if x.ndim == 3:  # torch has no name for it: positions of an attention block, a transposed (B, S, C)
        return like(x.unsqueeze(3)).squeeze(3)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    plain = last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last)
    return torch.empty_like(x, memory_format=torch.contiguous_format if plain else last)


def laid(y: Tensor, x: Tensor) -> Tensor:
    """y, laid out as `like(x)`."""
    made = like(x)
    return y if y.stride() == made.stride() else made.copy_(y)


def per_channel(v: Tensor | None, x: Tensor) -> Tensor:
    """v (B, C) for every position of x."""
    assert v is not None
    return v.view(*x.shape[:2], *(1,) * (x.ndim - 2))


def flat(x: Tensor) -> Tensor:
    """x as (batch, channels, positions); a view wherever the positions have one stride."""
    return x.reshape(*x.shape[:2], -1)


def reference(x: Tensor, norm: Norm) -> Tensor:
    """The torch form, in x's dtype; where weight and bias are wider, in theirs, rounded once."""
    x = x if norm.added is None else x + per_channel(norm.added, x)
    affine = [v for v in (norm.weight, norm.bias) if v is not None]
    if all(v.dtype == x.dtype for v in affine):
        y = torch.group_norm(x, norm.groups, norm.weight, norm.bias, norm.eps)
    else:
        wide = reduce(torch.promote_types, (v.dtype for v in affine), x.dtype)
        weight, bias = (None if v is None else v.to(wide) for v in (norm.weight, norm.bias))
        y = torch.group_norm(x.to(wide), norm.groups, weight, bias, norm.eps).to(x.dtype)
    if norm.scale is not None or norm.shift is not None:
        y = torch.addcmul(per_channel(norm.shift, y), y, 1 + per_channel(norm.scale, y))
    # y is new: where no gradient needs it, SiLU writes over it
    return F.silu(y, inplace=not (y.requires_grad or torch.compiler.is_compiling())) if norm.silu else y


def statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation (B, groups), in float32 (float64 of float64)."""
    v = x.to(torch.promote_types(x.dtype, torch.float32))
    v = v if norm.added is None else v + per_channel(norm.added, x)
    v = v.reshape(x.shape[0], norm.groups, math.prod(x.shape[1:]) // norm.groups)
    mean = v.mean(-1)
    var = (v - mean.unsqueeze(-1)).square().mean(-1)  # torch.var_mean warns of an empty batch
    return mean, torch.rsqrt(var + norm.eps)


def backward_reference(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, dtotal: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, p, q) as the kernels give them: p and q (B, C) are the sums over positions of dz and of dz x_hat."""
    wide = mean.dtype
    batch, channels = x.shape[:2]
    grouped = (batch, norm.groups, channels // norm.groups, math.prod(x.shape[2:]))
    one_each = (*grouped[:3], 1)
    x_hat = (x.to(wide).reshape(grouped) - mean[:, :, None, None]) * rstd[:, :, None, None]
    one = torch.ones(batch, channels, dtype=wide, device=x.device)
    factor = one if norm.scale is None else 1 + norm.scale.to(wide)
    gain = factor if norm.weight is None else factor * norm.weight.to(wide)
    offset = 0 * one if norm.bias is None else factor * norm.bias.to(wide)
    offset = offset if norm.shift is None else offset + norm.shift.to(wide)
    gain, offset = gain.reshape(one_each), offset.reshape(one_each)
    dz = dy.to(wide).reshape(grouped)
    if norm.silu:
        z = x_hat * gain + offset
        slope = torch.sigmoid(z)
        dz = dz * slope * (1 + z * (1 - slope))
    p, q = dz.sum(-1, keepdim=True), (dz * x_hat).sum(-1, keepdim=True)
    count = math.prod(x.shape[1:]) // norm.groups
    group_p, group_q = ((gain * v).sum(2, keepdim=True) / count for v in (p, q))
    dx = (rstd[:, :, None, None] * (dz * gain - group_p - x_hat * group_q)).reshape(x.shape)
    dx = dx if dtotal is None else dx + dtotal.to(wide)
    return laid(dx.to(x.dtype), x), p.reshape(batch, channels), q.reshape(batch, channels)


def why_not(x: Tensor, norm: Norm, residual: Tensor | None = None) -> str | None:
    """Why the kernels do not take this input and the torch reference runs instead; None where they run."""
    if reason := missing_triton(x.device):
        return reason
    if x.dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16; given {x.dtype}"
    if x.numel() == 0:
        return "the input is empty"
    # offsets inside a sample are 32 bits, in x and in the dense results
    steps = [v.stride()[1:] for v in (x, residual) if v is not None]
    if max(x[0].numel(), *(sum((n - 1) * step for n, step in zip(x.shape[1:], s, strict=True)) for s in steps)) >= 2**31:
        return "one sample spans 2^31 elements or more"
    if max(x.shape[:2]) > GRID or x.shape[0] * norm.groups >= 2**31:
        return f"a launch takes {GRID:,} samples and channels; given {x.shape[0]:,} and {x.shape[1]:,}"
    return None


def check(x: Tensor, norm: Norm, residual: Tensor | None = None) -> None:
    """The arguments of the ops, on the side of eager and of tracing alike.

    Raises:
        FastdiffError: what was given and what is allowed.
    """
    if x.ndim < 2 or norm.groups < 1 or x.shape[1] % norm.groups or not x.is_floating_point():
        given = f"{tuple(x.shape)} {x.dtype}, {norm.groups} groups"
        raise FastdiffError(f"GroupNorm needs (B, C, ...) with C divisible by groups, in floating point; given {given}")
    channels, samples = x.shape[1:2], x.shape[:2]
    for name, v, shape in (
        ("weight", norm.weight, channels), ("bias", norm.bias, channels),
        ("scale", norm.scale, samples), ("shift", norm.shift, samples), ("added", norm.added, samples),
    ):  # fmt: skip
        if v is not None and (v.shape != shape or v.device != x.device):
            wanted, given = f"{tuple(shape)} on {x.device}", f"{tuple(v.shape)} on {v.device}"
            raise FastdiffError(f"GroupNorm's {name} must have the shape {wanted}; given {given}")
    if (norm.scale is None) != (norm.shift is None):
        raise FastdiffError("GroupNorm takes scale and shift together, or neither")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        wanted, given = (f"{tuple(v.shape)} {v.dtype} on {v.device}" for v in (x, residual))
        raise FastdiffError(f"a residual must have x's shape, dtype and device, {wanted}; given {given}")


def _packed(norm: Norm) -> Norm:
    """The same with one stride along the channels, as the kernels read them."""
    weight, bias = (v if v is None else v.contiguous() for v in (norm.weight, norm.bias))
    scale, shift, added = (v if v is None or v.stride(1) == 1 else v.contiguous() for v in (norm.scale, norm.shift, norm.added))
    return norm._replace(weight=weight, bias=bias, scale=scale, shift=shift, added=added)


def _forward(x: Tensor, norm: Norm, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, x + residual or None, mean, rstd), by the kernels where they run."""
    check(x, norm, residual)
    if why_not(x, norm, residual) is None:
        from .group_norm_triton import forward

        with torch.cuda.device(x.device):  # a launch goes to the current device, whatever its tensors say
            return forward(x, _packed(norm), residual)
    total = x if residual is None else laid(x + residual, x)
    return laid(reference(total, norm), x), None if residual is None else total, *statistics(total, norm)


NORM = "int groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift, bool silu"
ADDED = "Tensor? added=None"


@torch.library.custom_op(
    "fastdiff::group_norm", mutates_args=(), schema=f"(Tensor x, {NORM}, {ADDED}) -> (Tensor y, Tensor mean, Tensor rstd)"
)
def group_norm(x: Tensor, *norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and the statistics (B, groups) that the backward needs. Arguments of `Norm`, in order."""
    y, _, mean, rstd = _forward(x, Norm(*norm))
    return y, mean, rstd


@torch.library.custom_op(
    "fastdiff::add_group_norm", mutates_args=(),
    schema=f"(Tensor x, Tensor residual, {NORM}) -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
)  # fmt: skip
def add_group_norm(x: Tensor, residual: Tensor, *norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and the sum x + residual that was normalised, both like x; then the statistics (B, groups)."""
    y, total, mean, rstd = _forward(x, Norm(*norm), residual)
    assert total is not None
    return y, total, mean, rstd


@torch.library.custom_op(
    "fastdiff::group_norm_backward", mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor mean, Tensor rstd, {NORM}, Tensor? dtotal) -> (Tensor dx, Tensor p, Tensor q)",
)  # fmt: skip
def group_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *norm_and_dtotal: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x (dtotal added to it), and per sample and channel the sums that the other gradients are made of."""
    norm, dtotal = Norm(*norm_and_dtotal[:-1]), norm_and_dtotal[-1]
    if why_not(x, norm) is None:
        from .group_norm_backward_triton import backward

        with torch.cuda.device(x.device):
            return backward(dy, x, mean, rstd, _packed(norm), dtotal)
    return backward_reference(dy, x, mean, rstd, norm, dtotal)


def _like_statistics(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


@group_norm.register_fake
def _(x: Tensor, *norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    check(x, Norm(*norm))
    return like(x), _like_statistics(x, x.shape[0], norm[0]), _like_statistics(x, x.shape[0], norm[0])


@add_group_norm.register_fake
def _(x: Tensor, residual: Tensor, *norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(x, Norm(*norm), residual)
    return like(x), like(x), _like_statistics(x, x.shape[0], norm[0]), _like_statistics(x, x.shape[0], norm[0])


@group_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), _like_statistics(x, *x.shape[:2]), _like_statistics(x, *x.shape[:2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what was normalised: x, or the sum with a residual."""
    residual = len(output) == 4
    norm = Norm(*inputs[2 if residual else 1 :])
    ctx.groups, ctx.eps, ctx.silu, ctx.residual = norm.groups, norm.eps, norm.silu, residual
    kept = output[1] if residual else inputs[0]
    ctx.save_for_backward(kept, *output[-2:], norm.weight, norm.bias, norm.scale, norm.shift, norm.added)
    ctx.mark_non_differentiable(*output[-2:])
    ctx.set_materialize_grads(False)  # a sum that nobody reads has no gradient to be added


def _gradients(ctx: Any, dy: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    x, mean, rstd, weight, bias, scale, shift, added = ctx.saved_tensors
    x = x if added is None else laid(x + per_channel(added, x), x)
    norm = (ctx.groups, weight, bias, ctx.eps, scale, shift, ctx.silu)
    dy = torch.zeros_like(x) if dy is None else dy
    dx, p, q = torch.ops.fastdiff.group_norm_backward(dy, x, mean, rstd, *norm, rest[0] if ctx.residual else None)
    factor = 1 if scale is None else 1 + scale.to(p.dtype)
    dweight = None if weight is None else (factor * q).sum(0).to(weight.dtype)
    dbias = None if bias is None else (factor * p).sum(0).to(bias.dtype)
    dscale = dshift = None
    if scale is not None:
        through_weight = q if weight is None else q * weight.to(q.dtype)
        dscale = (through_weight if bias is None else through_weight + p * bias.to(p.dtype)).to(scale.dtype)
        dshift = p.to(shift.dtype)
    own = (None, dweight, dbias, None, dscale, dshift, None)
    if ctx.residual:
        return dx, dx, *own
    return dx, *own, None if added is None else dx.flatten(2).sum(2, dtype=p.dtype).to(added.dtype)


group_norm.register_autograd(_gradients, setup_context=_save)
add_group_norm.register_autograd(_gradients, setup_context=_save)


def _to_onnx(x: Any, groups: int, *rest: Any) -> tuple[Any, Any, Any]:
    """group_norm as ONNX nodes of opset 18: the form around InstanceNormalization that ONNX Runtime fuses and TensorRT reads."""
    import numpy as np
    from onnxscript import opset18

    op: Any = opset18
    weight, bias, eps, scale, shift, silu, added = (*rest, None)[:7]
    spatial = list(range(2, len(x.shape)))

    def number(v: Any, dtype: Any = np.int64) -> Any:
        return op.Constant(value=_proto(np.array(v, dtype)))

    def spread(v: Any, axes: list[int]) -> Any:
        return op.CastLike(op.Unsqueeze(v, number(axes)) if axes else v, x)

    x = x if added is None else op.Add(x, spread(added, spatial))
    grouped = op.Reshape(x, number([0, groups, -1]))
    ones, zeros = (op.CastLike(number([v] * groups, np.float32), x) for v in (1, 0))
    y = op.Reshape(op.InstanceNormalization(grouped, ones, zeros, epsilon=eps), op.Shape(x))
    y = y if weight is None else op.Mul(y, spread(weight, [v - 1 for v in spatial]))
    y = y if bias is None else op.Add(y, spread(bias, [v - 1 for v in spatial]))
    if scale is not None:
        y = op.Mul(y, op.Add(spread(scale, spatial), op.CastLike(number(1, np.float32), x)))
        y = op.Add(y, spread(shift, spatial))
    y = op.Mul(y, op.Sigmoid(y)) if silu else y
    wide = op.Cast(grouped, to=1)
    mean = op.ReduceMean(wide, number([2]), keepdims=1)
    apart = op.Sub(wide, mean)
    variance = op.ReduceMean(op.Mul(apart, apart), number([2]), keepdims=0)
    rstd = op.Reciprocal(op.Sqrt(op.Add(variance, number(eps, np.float32))))
    return y, op.Squeeze(mean, number([2])), rstd


def _add_to_onnx(x: Any, residual: Any, *norm: Any) -> tuple[Any, Any, Any, Any]:
    from onnxscript import opset18 as op

    total = op.Add(x, residual)
    total.shape = x.shape
    y, mean, rstd = _to_onnx(total, *norm)
    return y, total, mean, rstd


def _proto(v: Any) -> Any:
    import onnx_ir

    return onnx_ir.tensor(v)


def onnx_table() -> dict[Any, Any]:
    """For torch.onnx.export(..., custom_translation_table=)."""
    ops = torch.ops.fastdiff
    return {ops.group_norm.default: _to_onnx, ops.add_group_norm.default: _add_to_onnx}
