"""The heavy operations of a U-Net and of the sampler's update: one name each, torch here, fused kernels where they exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BY_TORCH = "torch (our kernel was not measured to be faster anywhere: benches/gpu.sh --only attention)"
BY_MEASURE = "triton where it was measured to be faster, else torch"


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5,
    scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = True, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """silu(GroupNorm(x + residual) * (1 + scale) + shift), statistics in float32.

    Shapes: x (B, C, *spatial); residual broadcasts to x, an embedding (B, C, 1, ...) without being spread out; weight, bias (C,)
    or None; scale, shift (B, C), both or neither. Returns x's shape and dtype.

    Raises:
        FastdiffError: other shapes, C that `groups` does not divide, tensors on other devices.
    """
    from .kernels import group_norm as impl

    added = None
    if residual is not None and x.ndim > 2 and residual.shape == (*x.shape[:2], *(1,) * (x.ndim - 2)):
        added, residual = residual.flatten(1), None
    norm = impl.Norm(groups, weight, bias, eps, scale, shift, silu, added)
    if by_torch(x):  # the op would make the same numbers, and the statistics for its gradient
        try:
            return impl.reference(x if residual is None else x + residual, norm)
        except Exception:
            impl.check(x, norm)  # says it in one line where the input is at fault; at every call it would cost 6 us
            raise
    if residual is not None:
        return torch.ops.fastdiff.add_group_norm(x, residual.expand_as(x), *norm[:-1])[0]
    return torch.ops.fastdiff.group_norm(x, *norm)[0]


def by_torch(x: Tensor) -> bool:
    """Whether torch's operations do better than the op: no kernel takes x, or somebody takes forward-mode derivatives
    (torch.func.jvp), which a registered op would drop silently."""
    from .kernels.group_norm import DTYPES

    if x.device.type != "cuda":
        return True
    if torch.compiler.is_compiling():
        return False
    return why_torch(x.device) is not None or x.dtype not in DTYPES or torch.autograd.forward_ad._current_level >= 0


def why_torch(device: torch.device) -> str | None:
    """Why the ops are torch's on a device; None where the kernels run."""
    from .kernels.availability import missing_triton

    return missing_triton(device)


def dtypes(op: str) -> tuple[torch.dtype, ...]:
    """What an op's kernel takes."""
    from .kernels import attention, group_norm

    return {"group_norm_silu": group_norm.DTYPES, "attention": attention.DTYPES}[op]


def backends() -> dict[str, str]:
    """What each op runs on here: "triton", or "torch" and why."""
    from .kernels import attention

    blind = f"torch {torch.__version__} sees no NVIDIA GPU"
    reason = why_torch(torch.device("cuda")) if torch.cuda.is_available() else blind
    ours = "triton" if reason is None else f"torch ({reason})"
    measured = BY_MEASURE if attention.FASTER else BY_TORCH
    return {"group_norm_silu": ours, "attention": measured if reason is None else ours, "combine": ours}


def onnx_table() -> dict[Any, Any]:
    """The fused ops for torch.onnx.export(..., custom_translation_table=): a network on a GPU is traced with them inside."""
    from .kernels import attention, combine, group_norm

    return {**group_norm.onnx_table(), **attention.onnx_table(), **combine.onnx_table()}


def attention(q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v + residual; scale None is 1 / sqrt(d). By our kernel where it was measured to be the fastest.

    Shapes: q and residual (B, heads, S, d); k and v (B, heads, S', d); views of a fused projection are read in place.
    """
    from .kernels import attention as impl

    if q.device.type == "cuda" and impl.faster(q, k, v):
        return torch.ops.fastdiff.attention(q, k, v, residual, scale)[0]
    return impl.reference(q, k, v, residual, scale)


def combine(inputs: Sequence[Tensor], weights: Tensor, seeds: Tensor | None = None, draw: int = 0) -> list[Tensor]:
    """The update of a row of a plan: out[j] = sum_i weights[j, i] inputs[i], and with seeds + weights[j, -1] noise(seeds, draw).

    Shapes: inputs (B, ...), all alike; weights (outputs, inputs or one more), on their device; seeds (B,) int64 bits.
    """
    from .kernels import combine as impl

    if weights.device.type != "cuda":
        impl.check(inputs, weights, seeds, draw)
        return impl.reference(inputs, weights, seeds, draw)
    return torch.ops.fastdiff.combine(list(inputs), weights, seeds, draw)
