"""Attention of U-Nets as a registered op: softmax(q k^T scale) v + residual, self and cross, read in the layout it comes in.

q, k and v are (batch, heads, positions, head) views with any strides: parts of a fused projection, be it (B, S, 3 H d) or
(B, 3 H d, S), are read in place, and the result lies as the output projection reads it; what cannot be read 16 bytes at a time is
copied first. `torch.ops.fastdiff.attention` runs the Triton kernel of attention_triton.py on a GPU and torch's
scaled_dot_product_attention wherever that does not run; `why_not` says why. Scores times the scale must stay below 1e8, as in
every kernel that takes the maximum off in the instruction that scales: beyond, float32 rounds an exponent by more than 1.

Where a kernel may run it need not be the faster one: `faster` is what `fastdiff.ops` asks, and it answers by measurement alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FastdiffError
from .availability import missing_triton

DTYPES = (torch.float16, torch.bfloat16)
HEADS = (8, 256)  # sizes of a head, smallest and largest; in steps of EACH
EACH = 8  # elements that 16 bytes hold
BACKWARD = 128  # the largest head whose gradient is our kernels'

Site = tuple[int, int, int, int, int]
# Where benches/gpu_attention.py saw the kernel beat every backend of torch: it prints the lines to put here. Not measured: empty.
FASTER: frozenset[Site] = frozenset()


def site(q: Tensor, k: Tensor, architecture: int) -> Site:
    """What a measurement is valid for: the architecture (90 for sm_90), the head's size, and queries, keys and batch x heads
    rounded up to powers of two."""
    queries, keys, programs = (1 << (n - 1).bit_length() for n in (q.shape[2], k.shape[2], q.shape[0] * q.shape[1]))
    return architecture, q.shape[3], queries, keys, programs


def faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel runs on these inputs and was measured to be the fastest at such a site; what was not measured is not."""
    if not FASTER or why_not(q, k, v) is not None:
        return False
    major, minor = torch.cuda.get_device_capability(q.device)
    return site(q, k, 10 * major + minor) in FASTER


def reference(q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The torch form, in the inputs' dtype."""
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out if residual is None else out + residual


def side_by_side(x: Tensor) -> bool:
    """Whether positions are what lies side by side: (B, H, d, S) in memory."""
    return x.stride(3) != 1 and x.stride(2) == 1


def like(q: Tensor) -> Tensor:
    """An empty result of q's shape: (B, S, H, d) in memory, or (B, H, d, S) where q's own positions lie side by side."""
    return empty(q, side_by_side(q))


def empty(q: Tensor, first: bool) -> Tensor:
    """An empty tensor of q's shape, its positions side by side or its elements."""
    batch, heads, length, head = q.shape
    if first:
        return q.new_empty(batch, heads, head, length).transpose(2, 3)
    return q.new_empty(batch, length, heads, head).transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None = None) -> None:
    """The arguments of the op, on the side of eager and of tracing alike.

    Raises:
        FastdiffError: what was given and what is allowed.
    """
    shapes = [tuple(x.shape) for x in (q, k, v)]
    alike = all(len(s) == 4 for s in shapes) and shapes[1] == shapes[2]
    if not (alike and shapes[0][:2] == shapes[1][:2] and shapes[0][3] == shapes[1][3]):
        given = ", ".join(map(str, shapes))
        raise FastdiffError(f"attention needs q (B, heads, S, d), and k and v (B, heads, S', d); given {given}")
    if k.shape[2] == 0:
        raise FastdiffError("attention needs at least one key")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise FastdiffError(f"attention needs q, k and v of one floating-point dtype; given {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise FastdiffError(f"attention needs q, k and v on one device; given {q.device}, {k.device}, {v.device}")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (q.shape, q.dtype, q.device):
        wanted, given = (f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (q, residual))
        raise FastdiffError(f"attention's residual must have q's shape, dtype and device, {wanted}; given {given}")


def why_not(q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None = None) -> str | None:
    """Why the kernel does not take these inputs and torch runs instead; None where it runs."""
    if reason := missing_triton(q.device):
        return reason
    if q.dtype not in DTYPES:  # tensor cores would round float32 to 10 bits, which torch does not do unasked
        return f"the kernel takes float16 and bfloat16; given {q.dtype}"
    if not HEADS[0] <= q.shape[3] <= HEADS[1] or q.shape[3] % EACH:
        return f"the kernel takes heads of {HEADS[0]} to {HEADS[1]} in steps of {EACH}; given {q.shape[3]}"
    if q.numel() == 0:
        return "the input is empty"
    # offsets inside a sample are 32 bits; a size that a trace leaves open (a SymInt) is taken to stay below
    given = (q, k, v) if residual is None else (q, k, v, residual)
    spans = [sum((n - 1) * step for n, step in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in given]
    if any(isinstance(n, int) and n >= 2**31 for n in (*spans, q[0].numel(), k[0].numel())):
        return "one sample spans 2^31 elements or more"
    return None


def why_not_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels of the backward do not take these inputs and torch goes back instead; None where they do."""
    if q.shape[3] > BACKWARD:
        return f"the backward's kernels take heads up to {BACKWARD}; given {q.shape[3]}"
    return why_not(q, k, v, dout)


def sums_like(q: Tensor, runs: bool) -> Tensor:
    """Room for log2 of each query's sum of exponentials (B, heads, S), float32; none where no backward of ours needs it: the
    kernel does not run, or the head is larger than BACKWARD."""
    return q.new_empty(q.shape[:3] if runs and q.shape[3] <= BACKWARD else (0,), dtype=torch.float32)


@torch.library.custom_op(
    "fastdiff::attention", mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? residual, float? scale) -> (Tensor out, Tensor sums)",
)  # fmt: skip
def attention(q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v + residual, of q's shape (scale None is 1 / sqrt(d)); and what the kernels of the backward need:
    see `sums_like`."""
    check(q, k, v, residual)
    if why_not(q, k, v, residual) is None:
        from .attention_triton import forward

        with torch.cuda.device(q.device):
            return forward(q, k, v, residual, scale)
    return like(q).copy_(reference(q, k, v, residual, scale)), sums_like(q, False)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    check(q, k, v, residual)
    return like(q), sums_like(q, why_not(q, k, v, residual) is None)


def backward_reference(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by the kernels' formulas in float32 (float64 of float64), with every score at once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, dout = (x.to(wide) for x in (q, k, v, dout))
    factor = q.shape[3] ** -0.5 if scale is None else scale
    p = torch.softmax(q @ k.mT * factor, -1)
    dp = dout @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * factor
    return ds @ k, ds.mT @ q, p.mT @ dout


@torch.library.custom_op(
    "fastdiff::attention_backward", mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums, float? scale) -> "
           "(Tensor dq, Tensor dk, Tensor dv)",
)  # fmt: skip
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as `like`; out is the result before a residual was added."""
    check(q, k, v, dout)
    if why_not_backward(dout, q, k, v) is None:
        from .attention_backward_triton import backward

        with torch.cuda.device(q.device):
            return backward(dout, q, k, v, out, sums, scale)
    dq, dk, dv = backward_reference(dout, q, k, v, scale)
    return like(q).copy_(dq), like(k).copy_(dk), like(v).copy_(dv)


@attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    check(q, k, v, dout)
    return like(q), like(k), like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """The result is kept where our backward reads it: not one of torch's, nor one that holds a residual."""
    *tensors, residual, ctx.scale = inputs
    out, sums = output
    ctx.residual = residual is not None
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(*tensors, sums, out if sums.ndim == 3 and not ctx.residual else None)


def _gradients(ctx: Any, dout: Tensor, _: Tensor | None = None) -> tuple[Any, ...]:
    """Our kernels' where one of them made the forward and the head is at most BACKWARD; else torch's: the forward is made
    again by scaled_dot_product_attention and gone back through."""
    q, k, v, sums, out = ctx.saved_tensors
    found: tuple[Tensor, ...]
    if sums.ndim == 3 and why_not_backward(dout, q, k, v) is None:
        if out is None:  # rounded with the residual, so not to be had from the result
            out, sums = torch.ops.fastdiff.attention(q, k, v, None, ctx.scale)
        found = torch.ops.fastdiff.attention_backward(dout, q, k, v, out, sums, ctx.scale)
    else:
        with torch.enable_grad():
            q, k, v = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            again = F.scaled_dot_product_attention(q, k, v, scale=ctx.scale)
        found = torch.autograd.grad(again, leaves, dout)
    return *found, dout if ctx.residual else None, None


attention.register_autograd(_gradients, setup_context=_save)


def _to_onnx(q: Any, k: Any, v: Any, residual: Any, scale: float | None) -> tuple[Any, Any]:
    """attention as MatMul and Softmax, which every runtime fuses by itself; q and k each take the root of the scale, so that no
    product leaves float16. The sums are for a backward, which an exported graph has not."""
    import numpy as np
    import onnx_ir
    from onnxscript import opset18

    op: Any = opset18
    size = q.shape[3] ** -0.5 if scale is None else scale
    of_q, of_k = abs(size) ** 0.5, math.copysign(abs(size) ** 0.5, size)
    q_factor, k_factor = (op.CastLike(op.Constant(value=onnx_ir.tensor(np.array(f, np.float32))), q) for f in (of_q, of_k))
    scores = op.MatMul(op.Mul(q, q_factor), op.Mul(op.Transpose(k, perm=[0, 1, 3, 2]), k_factor))
    out = op.MatMul(op.Softmax(scores, axis=-1), v)
    none = op.Constant(value=onnx_ir.tensor(np.empty(0, np.float32)))
    return (out if residual is None else op.Add(out, residual)), none


def onnx_table() -> dict[Any, Any]:
    """For torch.onnx.export(..., custom_translation_table=)."""
    return {torch.ops.fastdiff.attention.default: _to_onnx}
