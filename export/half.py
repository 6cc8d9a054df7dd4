"""A network in half precision whose norms stay in float32, for graphs that carry their precision in themselves."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FastdiffError

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm2d)


class _InFloat32(nn.Module):
    """A module with float32 weights inside a network of another dtype: tensors are cast on the way in and out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(_float(v) for v in args)
        return self.module(x.float(), *args, **{k: _float(v) for k, v in kwargs.items()}).to(x.dtype)


def _float(v: Any) -> Any:
    return v.float() if isinstance(v, Tensor) and v.is_floating_point() else v


def half_copy(network: Any, dtype: torch.dtype = torch.float16) -> nn.Module:
    """A copy of the network in float16 or bfloat16 but for its norms (group, layer, RMS, instance), which compute in float32.

    Raises:
        FastdiffError: a network that is no nn.Module.
    """
    if not isinstance(network, nn.Module):
        raise FastdiffError(f"half precision needs a network that is an nn.Module; given {type(network).__name__}")
    made = copy.deepcopy(network).to(dtype)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NORMS) and not isinstance(parent, _InFloat32):
                setattr(parent, name, _InFloat32(child.float()))
    return made
