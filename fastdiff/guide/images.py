"""Conditioning on an image that the network gets as more channels (SR3, Palette), and the noise it is augmented with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser, Network
from ..errors import FastdiffError
from ..noise import from_seeds
from ..schedule import NoiseSchedule

KEY = "concatenated_image"  # in the denoiser's conditions, so that it is cut and bound with them


def image_condition(denoiser: Denoiser, image: Tensor) -> Denoiser:
    """The denoiser of a network that takes the noisy sample and an image side by side: network(cat([c_in x, image], dim=1)).

    image (B, C, ...) of the sample's spatial size, as the network was trained to get it: not scaled by c_in (Saharia et al.
    2021, SR3; 2022, Palette).

    Raises:
        FastdiffError: an image of another spatial size than the denoiser's samples.
    """
    shape = denoiser.shape
    if image.ndim < 3 or (shape is not None and tuple(image.shape[2:]) != tuple(shape[1:])):
        raise FastdiffError(f"an image of shape (B, C, *{tuple(shape[1:]) if shape else '(spatial)'}) is wanted; given "
                            f"{tuple(image.shape)}: resize it to the sample first")  # fmt: skip
    made = copy.copy(denoiser)
    made.network = denoiser.network if isinstance(denoiser.network, Concatenated) else Concatenated(denoiser.network)
    made.__dict__.pop("_dtype", None)
    return made.bind(**{KEY: image})


class Concatenated(torch.nn.Module):
    """A network that gets the conditioning image as further channels."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.null_label = getattr(network, "null_label", None)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        image = cond.pop(KEY)
        if len(image) != len(x):
            raise FastdiffError(f"{len(image)} conditioning images for a batch of {len(x)}: give one a sample")
        return self.network(torch.cat([x, image.to(x.dtype)], dim=1), t, **cond)


def augmented(
    denoiser: Denoiser, image: Tensor, t: float, seeds: Sequence[int], schedule: NoiseSchedule | None = None,
    name: str = "aug_level",
) -> Denoiser:  # fmt: skip
    """Noise-conditioning augmentation of a cascade's low-resolution image (Ho et al. 2021, section 4.2; Imagen).

    The image is taken to time t of `schedule` (default the denoiser's) by noise of its own, one seed a sample, and the network
    is told t as the condition `name`, (B,).

    Raises:
        FastdiffError: t outside the schedule, one seed too many or too few, an image of another size.
    """
    levels = schedule or denoiser.schedule
    if not (t == 0.0 or levels.t_min <= t <= levels.t_max):
        raise FastdiffError(f"the augmentation time must be 0 or lie in [{levels.t_min:g}, {levels.t_max:g}]; given {t:g}")
    # draw 2^32 - 1: the sampler's own draws of the same seed count up from 0
    noise = from_seeds(seeds)(2**32 - 1, image.shape, image.device).to(image.dtype)
    alpha, sigma = (1.0, 0.0) if t == 0.0 else (float(levels.alpha(t)), float(levels.sigma(t)))
    return image_condition(denoiser, alpha * image + sigma * noise).bind(**{name: image.new_full((len(image),), t)})
