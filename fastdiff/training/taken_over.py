"""What the trainer takes over from a checkpoint of another library: its network, and what it is told beside the time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.conditions import Conditions, tried, wanted
from ..denoiser import Denoiser
from ..errors import FastdiffError
from .data import Images

LATENTS = "a network on latents learns from an .npz with `latents`, (n, C, h, w)"


def taken_over(start: Denoiser, data: Images, conditions: Conditions | None, dropout: float, learned: bool) -> Denoiser:
    """A copy of the denoiser whose network learns, found to take these data.

    Its network stays in eval mode: its library would draw dropout masks from a state that no run can go on from. Parameters that
    its prediction does not depend on (those of EDM's augmentation) stay as they are.

    Args:
        dropout: the part of labels and conditions to be replaced by what guidance leads away from.
        learned: whether the variance of DDPM's steps, the second half of the network's channels, learns too.

    Raises:
        FastdiffError: labels or conditions that are missing or do not fit; samples that the network does not take; a network with
            such a half that is not to learn, or without one that is.
    """
    shape = tuple(data.x.shape[1:])
    if needs := list(wanted(start)) if conditions is None else []:
        raise FastdiffError(f"this network is conditioned on {', '.join(needs)}: give --condition, 1 row or one for each image")
    _check_labels(start, data)
    _check_dropout(start, conditions, dropout)
    network: Any = copy.deepcopy(start.network)
    same = copy.copy(start if conditions is None else conditions.bound(start, [0]))
    same.shape, same.network = shape, network.eval().requires_grad_(True)
    try:
        out = tried(same)
    except FastdiffError as e:
        raise FastdiffError(f"{e} ({LATENTS})") from e
    _check_outputs(start, shape, tuple(out.shape[1:]), learned)
    out.sum().backward()
    for p in network.parameters():
        p.requires_grad_(p.grad is not None)
        p.grad = None
    same.cond = {}
    return same


def _check_outputs(start: Denoiser, shape: tuple[int, ...], out: tuple[int, ...], learned: bool) -> None:
    """Whether samples of `shape` become predictions of it, and beside them a variance where one learns (`variance.bound`)."""
    doubled = (2 * shape[0], *shape[1:])
    if out not in (shape, doubled):
        raise FastdiffError(f"this network turns samples of {shape} into {out}: they must be of one shape")
    if learned and out == shape:
        raise FastdiffError("vlb trains the variance of a network's steps; this one predicts none: leave it out")
    if out == shape:
        return
    if start.info.get("variance_type") == "learned":
        raise FastdiffError(
            'variance_type "learned": this network predicts the log of a variance itself, which nothing here trains; only '
            '"learned_range" (Nichol and Dhariwal 2021, eq. 15) is trained'
        )
    if not learned:
        raise FastdiffError(
            f"this network gives {2 * shape[0]} channels for {shape[0]}: it learned the variance of its steps too; give --vlb, "
            "usually 0.001, to go on learning both"
        )


def _check_labels(start: Denoiser, data: Images) -> None:
    if start.num_classes and data.y is None:
        raise FastdiffError(f"this network has {start.num_classes} classes, the data no labels")
    if start.num_classes and data.num_classes > start.num_classes:
        raise FastdiffError(f"the data have {data.num_classes} classes, the network has {start.num_classes}")


def _check_dropout(start: Denoiser, conditions: Conditions | None, dropout: float) -> None:
    """Whether there is something to drop to, where anything is to be dropped."""
    null = getattr(start.network, "null_label", None) is not None
    negative = None if conditions is None else conditions.negative
    told = bool(start.num_classes) or conditions is not None
    if dropout and told and not null and negative is None:
        raise FastdiffError("label dropout needs a null class, or negative.NAME tensors in --condition: set --label-dropout 0")
    if dropout and conditions is not None and negative is not None:
        for name in negative:
            _check_alike(name, conditions.cond[name], negative[name])


def _check_alike(name: str, a: Any, b: Any) -> None:
    if isinstance(a, Mapping):
        for part in a:
            _check_alike(f"{name}.{part}", a[part], b[part])
    elif a.shape[1:] != b.shape[1:]:
        raise FastdiffError(
            f"label dropout replaces {name} {tuple(a.shape[1:])} by negative.{name} {tuple(b.shape[1:])}: pad them to one shape, "
            "or set --label-dropout 0"
        )


def dropped(cond: Any, negative: Any, drop: Tensor) -> Any:
    """A condition, a mapping or a tensor (B or 1, ...), with the negative one where `drop` (B,) says so."""
    if isinstance(cond, Mapping):
        return {name: dropped(part, negative[name], drop) for name, part in cond.items()}
    return torch.where(drop.view(-1, *(1,) * (cond.ndim - 1)), negative, cond)
