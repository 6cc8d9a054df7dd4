"""The networks of a run: the teacher as it is, its student with the inputs that a method adds; and what does not fit together."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..models import UNet
from ..training.data import Images
from .lora import ADDED
from .method import Method


def with_network(denoiser: Denoiser, network: Any, prediction: str | None = None) -> Denoiser:
    """The denoiser around another network, of another prediction where given, without the plans that belonged to its own."""
    out = copy.copy(denoiser)
    out.network, out.plan, out.tuned, out.levels = network, None, (), {}
    out.prediction = prediction or denoiser.prediction
    out.__dict__.pop("_dtype", None)
    return out


def frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


def student_network(teacher: Denoiser, method: Method) -> UNet:
    """A copy of the teacher's network with the inputs that the method adds, which change nothing before the first update; where
    the method asks for another shape, a network of that shape with drawn weights.

    Raises:
        FastdiffError: a teacher that is not of our own format, or not for this method.
    """
    if not isinstance(teacher.network, UNet) or not teacher.info:
        raise FastdiffError("a teacher is a checkpoint of fastdiff's own format: its description goes into the student's")
    own = teacher.network.config
    if own.step_counts:
        raise FastdiffError("this teacher is a student of several step counts, each a sampler of its own: distil its teacher")
    config = method.network(teacher, own)
    if config == own:
        return copy.deepcopy(teacher.network).eval().requires_grad_(True)
    with torch.random.fork_rng(devices=[]):  # what is added and not zero is the same in every run
        torch.manual_seed(0)
        student = UNet(config)
    if dataclasses.replace(config, guidance_range=own.guidance_range, step_counts=None) == own:
        missing, unexpected = student.load_state_dict(teacher.network.state_dict(), strict=False)
        assert not unexpected and all(name.startswith(ADDED) for name in missing), (missing, unexpected)
    return student.eval().requires_grad_(True)


def check_data(teacher: Denoiser, method: Method, data: Images | None) -> None:
    """
    Raises:
        FastdiffError: images missing, or of another shape, range or number of classes than the teacher's.
    """
    if method.needs_data and data is None:
        raise FastdiffError(f"{method.name} distillation{method.why_data} needs images: give --data")
    if data is None:
        return
    if tuple(data.x.shape[1:]) != teacher.shape:
        raise FastdiffError(f"the teacher makes samples of shape {teacher.shape}, the data have {tuple(data.x.shape[1:])}")
    if tuple(teacher.data_range) != (-1.0, 1.0):
        raise FastdiffError(f"images are read into -1 to 1, the teacher's range is {teacher.data_range[0]:g} to "
                            f"{teacher.data_range[1]:g}: use a data-free method (trajectory)")  # fmt: skip
    if 0 < teacher.num_classes < data.num_classes:
        raise FastdiffError(f"the data have {data.num_classes} classes, the teacher knows {teacher.num_classes}")
