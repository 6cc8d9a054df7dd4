"""The heavy operations of a U-Net and of the sampler's update: one name each, torch here, fused kernels where they exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5,
    scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = True,
) -> Tensor:  # fmt: skip
    """silu(GroupNorm(x) * (1 + scale) + shift), statistics in float32.

    Shapes: x (B, C, *spatial); weight, bias (C,); scale, shift (B, C) or None. Returns x's shape and dtype.
    """
    from .kernels import group_norm as fused

    if x.device.type != "cuda":  # the op would make the same numbers, and the statistics that only its gradient needs
        return fused.reference(x, fused.Norm(groups, weight, bias, eps, scale, shift, silu))
    return torch.ops.fastdiff.group_norm(x, groups, weight, bias, eps, scale, shift, silu)[0]


def backends() -> dict[str, str]:
    """What each op runs on here: "triton", or "torch" and why."""
    from .kernels.availability import missing_triton

    reason = missing_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "group_norm_silu": "triton" if reason is None else f"torch ({reason})",
        "attention": "torch (no kernel yet)",
        "combine": "torch (no kernel yet)",
    }


def onnx_table() -> dict[Any, Any]:
    """The fused ops for torch.onnx.export(..., custom_translation_table=): a network on a GPU is traced with them inside."""
    from .kernels import group_norm as fused

    return fused.onnx_table()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, heads, length, d) inputs."""
    return F.scaled_dot_product_attention(q, k, v)


def combine(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of same-shaped tensors: one row of a plan. Never aliases an input; needs at least one tensor."""
    y = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        y.add_(tensor, alpha=weight)
    return y
