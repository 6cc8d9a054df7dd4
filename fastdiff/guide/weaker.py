"""Guidance away from a worse version of the same network: autoguidance, and perturbed attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import FastdiffError
from .classifier_free import EVERYWHERE, Guided, check_guidance


def autoguidance(
    denoiser: Denoiser, weaker: Denoiser, scale: float, interval: tuple[float, float] = EVERYWHERE, rescale: float = 0.0
) -> Guided:
    """D_weaker + scale (D - D_weaker), the weaker one smaller or trained for less, of the same conditions (Karras et al. 2024).

    Raises:
        FastdiffError: two schedules that differ, or a bad scale, interval or rescale.
    """
    if denoiser.schedule != weaker.schedule:
        raise FastdiffError(f"autoguidance needs two denoisers on one noise schedule: given {denoiser.schedule.name} and "
                            f"{weaker.schedule.name} that differ")  # fmt: skip
    return Guided(denoiser, weaker, check_guidance(scale, interval, rescale), interval, float(rescale), batched=False)


def pag(
    denoiser: Denoiser, scale: float, layers: Callable[[str], bool] = lambda name: "mid" in name,
    interval: tuple[float, float] = EVERYWHERE, rescale: float = 0.0,
) -> Guided:  # fmt: skip
    """Perturbed-attention guidance (Ahn et al. 2024): away from the network whose self-attention maps are the identity.

    `layers` picks attention modules by their dotted name, by default those in the middle of the U-Net. The paper's s is
    scale - 1. Works on our U-Net and on diffusers' networks, through their attention processors.

    Raises:
        FastdiffError: a network without such self-attention layers, or a bad scale.
    """
    network = denoiser.network
    if not isinstance(network, nn.Module):
        raise FastdiffError(f"pag needs a network of torch modules; given {type(network).__name__}")
    weaker = copy.copy(denoiser)
    weaker.network = without_maps(network, layers)
    return Guided(denoiser, weaker, check_guidance(scale, interval, rescale), interval, float(rescale), batched=False)


def without_maps(network: nn.Module, layers: Callable[[str], bool]) -> nn.Module:
    """A copy that shares every parameter and buffer, its chosen self-attention layers passing their values on."""
    shared = {id(v): v for v in (*network.parameters(), *network.buffers())}
    copied = copy.deepcopy(network, shared)
    found, changed = [], 0
    for name, module in copied.named_modules():
        ours = hasattr(module, "identity_map")
        theirs = hasattr(module, "set_processor") and hasattr(module, "to_v") and not getattr(module, "is_cross_attention", False)
        if not (ours or theirs):
            continue
        found.append(name)
        if layers(name):
            changed += 1
            if ours:
                module.identity_map = True
            else:
                module.set_processor(ValuesProcessor())
    if not changed:
        raise FastdiffError(f"pag: layers= picks none of the self-attention layers {', '.join(found) or '(there are none)'}")
    return copied


class ValuesProcessor:
    """diffusers' `Attention` with the identity for its map, every position keeping its own value: (B, length, C) or images."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        x = hidden_states
        shape = x.shape
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        y = attn.to_out[1](attn.to_out[0](attn.to_v(x)))
        if len(shape) == 4:
            y = y.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            y = y + hidden_states
        return y / attn.rescale_output_factor
