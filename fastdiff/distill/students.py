"""The networks of a run: the teacher as it is, its student with the inputs that a method adds; and what does not fit together."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import others
from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..models import UNet, UNetConfig
from ..training.data import Images
from .lora import ADDED
from .method import Method

# of a student of "both", in multiples of its teacher's output: x0 and eps. For v, c (cos + sin) is nearest to 1 over all angles
HEADS = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-4 / (math.pi + 2), 4 / (math.pi + 2))}
OUTPUT = ("out.2.weight", "out.2.bias")


def placed(teacher: Denoiser, device: torch.device) -> Denoiser:
    """The teacher with its network, in place as `nn.Module.to`, and with all that is bound to it on a device: what guidance leads
    away from too, which a text encoder is asked for here, once."""
    assert isinstance(teacher.network, nn.Module), "`check_teacher` refuses others"
    teacher.network.to(device)
    out = copy.copy(teacher)
    out.cond, out.contrast = _placed(teacher.cond, device), _placed(teacher.unprompted, device)
    return out


def _placed(value: Any, device: torch.device) -> Any:
    """A condition, a tensor or a mapping of them, on a device."""
    if isinstance(value, Mapping):
        return {name: _placed(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


def own_format(teacher: Denoiser) -> bool:
    """Whether it is fastdiff's own U-Net with the description that its file had, which then goes into the student's."""
    return isinstance(teacher.network, UNet) and "schedule" in teacher.info and others.LAYOUT not in teacher.info


def check_teacher(teacher: Denoiser, method: Method) -> None:
    """
    Raises:
        FastdiffError: no torch module, guidance around it, no shape; or a method whose student such a network cannot be.
    """
    network = teacher.network
    if not isinstance(network, nn.Module) or not any(True for _ in network.parameters()):
        kind = type(network).__name__
        raise FastdiffError("a teacher is a checkpoint of fastdiff's own format, another that fd.load reads, or a Denoiser "
                            f"around a torch module with parameters; this one's network is a {kind}")  # fmt: skip
    if type(teacher) is not Denoiser:
        raise FastdiffError(f"a teacher is a plain Denoiser, not a {type(teacher).__name__} around one; the guided method "
                            "teaches guidance")  # fmt: skip
    if teacher.shape is None:
        raise FastdiffError("the teacher does not say the shape of a sample: give shape= to fd.load or Denoiser")
    if method.adds() and not own_format(teacher):
        raise FastdiffError(f"this method gives the student {method.adds()}, which fastdiff's own U-Net alone can have; the "
                            f"teacher's network is a {type(network).__name__}")  # fmt: skip


def fingerprint(network: nn.Module) -> str:
    """sha256 of its weights: tells teachers apart that come from no file."""
    digest = hashlib.sha256()
    for name, v in network.state_dict().items():
        digest.update(name.encode())
        digest.update(v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def student_network(teacher: Denoiser, method: Method) -> nn.Module:
    """A copy of the teacher's network with the inputs that the method adds, which change nothing before the first update; where
    the method asks for another shape, a network of that shape with drawn weights.

    Raises:
        FastdiffError: a teacher that nobody can learn from, or not by this method.
    """
    check_teacher(teacher, method)
    assert isinstance(teacher.network, nn.Module)
    if not own_format(teacher):
        return copy.deepcopy(teacher.network).eval().requires_grad_(True)
    assert isinstance(teacher.network, UNet)
    own = teacher.network.config
    if own.step_counts:
        raise FastdiffError("this teacher is a student of several step counts, each a sampler of its own: distil its teacher")
    config = method.network(teacher, own)
    if config == own:
        return copy.deepcopy(teacher.network).eval().requires_grad_(True)
    with torch.random.fork_rng(devices=[]):  # what is added and not zero is the same in every run
        torch.manual_seed(0)
        student = UNet(config)
    inputs: dict[str, Any] = {"guidance_range": own.guidance_range, "step_counts": None}
    outputs: dict[str, Any] = {"out_channels": own.out_channels, "learned_variance": own.learned_variance}
    if dataclasses.replace(config, **inputs, **outputs) == own:
        weights = teacher.network.state_dict()
        if config.out_channels != own.out_channels:
            weights |= _heads(weights, teacher.prediction, config)
        missing, unexpected = student.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.startswith(ADDED) for name in missing), (missing, unexpected)
    return student.eval().requires_grad_(True)


def _heads(weights: dict[str, Tensor], prediction: str, config: UNetConfig) -> dict[str, Tensor]:
    """The output layer of a student of "both" from its teacher's, a variance's rows left out; zero where it is the teacher that
    predicts both."""
    if config.out_channels == config.in_channels:
        return {name: torch.zeros_like(weights[name][: config.out_channels]) for name in OUTPUT}
    x0, eps = HEADS.get(prediction, (0.0, 0.0))
    first = {name: weights[name][: config.in_channels] for name in OUTPUT}
    return {name: torch.cat([x0 * layer, eps * layer]) for name, layer in first.items()}


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
