"""What a training run is: its settings, the network and schedule that they name, those of a checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints.conditions import Conditions
from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..models import UNet, UNetConfig
from ..schedule import NoiseSchedule, from_config
from . import losses
from .data import Images


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines the weights. Times are in optimiser steps, `lr` falls linearly to 0 over `steps`; `batch` is
    that of all processes together.

    `vlb` > 0 learns the variance of DDPM's steps too: the weight of the variational bound beside the loss (Nichol and Dhariwal
    2021, eq. 16: 0.001), summed over a chain of `vlb_steps`.
    """

    steps: int
    batch: int = 64
    lr: float = 5e-4
    warmup: int = 200
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "vp_cosine"})
    prediction: str = "v"
    weighting: str = "simple"
    times: str = "uniform"
    time_scale: float | None = 1000.0
    ema: float = 0.999
    label_dropout: float = 0.1
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    network: dict[str, Any] = field(default_factory=dict)
    start: str = ""  # hash of the checkpoint whose weights the first step begins with; "" = drawn
    condition: str = ""  # hash of the file that says what another library's network is conditioned on
    vlb: float = 0.0
    vlb_steps: int = 1000

    def __post_init__(self) -> None:
        if not (math.isfinite(self.vlb) and self.vlb >= 0):
            raise FastdiffError(f"vlb must be at least 0; given {self.vlb!r}")
        if self.vlb and self.prediction == "both":
            raise FastdiffError('a network of "both" has no variance beside it: leave out vlb, or predict eps, x0 or v')
        for name, low in (("steps", 1), ("batch", 1), ("warmup", 0), ("vlb_steps", 2)):
            if not (isinstance(value := getattr(self, name), int) and value >= low):
                raise FastdiffError(f"{name} must be a whole number of at least {low}; given {value!r}")
        for name in ("lr", "clip"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise FastdiffError(f"{name} must be a positive number; given {value!r}")
        for name in ("ema", "label_dropout"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise FastdiffError(f"{name} must lie in [0, 1]; given {value!r}")
        if self.time_scale is not None and not math.isfinite(self.time_scale):
            raise FastdiffError(f"time_scale must be a finite number or None; given {self.time_scale!r}")
        losses.check_names(self.weighting, self.times)


def unet_config(config: TrainConfig, data: Images) -> UNetConfig:
    """The network's shape: channels and classes from the data, the rest from the configuration."""
    classes = data.num_classes
    fields: dict[str, Any] = {"in_channels": data.x.shape[1], "out_channels": data.x.shape[1] * outputs(config)}
    if classes:
        fields |= {"num_classes": classes + 1, "null_class": True}
    if config.vlb:
        fields["learned_variance"] = True
    if not isinstance(config.network, dict):
        raise FastdiffError(f"network settings must be a mapping from names to values; given {config.network!r}")
    if unknown := set(config.network) - {f.name for f in dataclasses.fields(UNetConfig)}:
        raise FastdiffError(f"the U-Net has no setting {', '.join(sorted(unknown))}; see fastdiff.models.UNetConfig")
    try:
        made = UNetConfig(**(fields | config.network))
    except TypeError as e:
        raise FastdiffError(f"a U-Net setting has the wrong type: {e}") from e
    _check_fit(made, data, bool(config.vlb), outputs(config))
    if made.num_classes and not made.null_class and config.label_dropout:
        raise FastdiffError("label dropout needs the null class: leave out null_class, or set label_dropout to 0")
    return made


def outputs(config: TrainConfig) -> int:
    """Tensors of the images' shape that the network predicts."""
    return 2 if config.prediction == "both" else 1


def continuing(config: TrainConfig, denoiser: Denoiser, conditions: Conditions | None = None) -> TrainConfig:
    """The configuration that goes on with a checkpoint: its network, schedule, prediction and time, the rest as given.

    Raises:
        FastdiffError: a network that cannot be trained here, or saved as what it was.
    """
    kind = denoiser.info.get("format", type(denoiser.network).__name__)
    if not isinstance(denoiser.network, UNet) and denoiser.write is None:
        raise FastdiffError(
            "training goes on from networks of fastdiff, guided-diffusion, EDM, k-diffusion, diffusers and Stable Diffusion "
            f"files; this is a network of {kind}"
        )
    return dataclasses.replace(
        config, network=denoiser.network.config.asdict() if isinstance(denoiser.network, UNet) else {},
        schedule=denoiser.schedule.config(), prediction=denoiser.prediction, time_scale=denoiser.info.get("time_scale"),
        start=denoiser.hash, condition="" if conditions is None else conditions.hash,
    )  # fmt: skip


def made_schedule(config: dict[str, Any]) -> NoiseSchedule:
    """The schedule of a description, asked once, so that wrong parameters are found before the first step."""
    try:
        schedule = from_config(config)
        usable = math.isfinite(float(schedule.alpha(schedule.t_max)) + float(schedule.sigma(schedule.t_min)))
    except (TypeError, ArithmeticError) as e:
        raise FastdiffError(f"noise schedule {config} cannot be made: {e}") from e
    if not usable or not schedule.t_min < schedule.t_max:
        raise FastdiffError(f"noise schedule {config} has no finite levels from t_min to t_max; check its parameters")
    return schedule


def _check_fit(network: UNetConfig, data: Images, learned: bool, count: int) -> None:
    """That the network takes these images and labels, before the first step finds out."""
    channels, *size = data.x.shape[1:]
    if (network.in_channels, network.out_channels) != (channels, channels * count) or network.learned_variance != learned:
        how = "with learned variance (vlb > 0)" if learned else "without learned variance (vlb trains it)"
        raise FastdiffError(f"the network must map {channels} channels to {channels * count}, {how}")
    multiple = 2 ** (len(network.channel_mult) - 1)
    if any(side % multiple for side in size):
        raise FastdiffError(
            f"{len(network.channel_mult)} levels need images of a height and width divisible by {multiple}; given "
            f"{tuple(size)}: choose fewer channel_mult, or another --size"
        )
    rows = (network.num_classes or 0) - network.null_class
    if data.y is None and network.num_classes:
        raise FastdiffError("the network has classes, the data no labels: leave out num_classes")
    if rows < data.num_classes and network.num_classes:
        raise FastdiffError(f"the data have {data.num_classes} classes, the network has {rows}: leave out num_classes")
