"""The independent judge: a small Fashion-MNIST classifier whose features FD-clf and KID-clf are measured in.

The judge only measures. It must never enter a loss, a guidance term or a tuning objective: what has been optimised
against a judge is no longer judged by it. To hold to that, every public method runs without gradients.
Features of this network give FD-clf and KID-clf; they are never to be called FID (see `inception.py` for that one).
"""

import json
import struct
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastdiff.errors import CheckpointError, FastdiffError
from fastdiff.shipped import FASHION_MNIST, read_verified

FEATURES = 48  # few enough that a 2,048-sample covariance is well conditioned and 20,000 rows fit the package
CLASSES = 10
OVERSHOOT = 3.0  # samplers overshoot [-1, 1] a little; 0..255 images exceed this at once


class Judged(NamedTuple):
    """features (n, 48) and logits (n, 10), float32 on the CPU."""

    features: Tensor
    logits: Tensor


def _conv(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU(inplace=True)
    )


class JudgeNet(nn.Module):
    """Five 3x3 convolutions at 28, 14 and 7 pixels, global average (the features), one linear layer; 0.12 M weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(1, 32), nn.MaxPool2d(2), _conv(32, 48), _conv(48, 48), nn.MaxPool2d(2), _conv(48, 96),
            _conv(96, FEATURES), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 1, 28, 28) in [-1, 1] -> features (n, 48), logits (n, 10)."""
        features = self.body(images)
        return features, self.head(features)


class Judge:
    """A frozen JudgeNet. Images are float tensors (n, 1, 28, 28) in [-1, 1], clamped to that range as a viewer would.

    `info` is what the checkpoint says of itself: test accuracy, seed, epochs and the sha256 of the training data.
    """

    def __init__(self, network: JudgeNet, info: dict[str, str] | None = None) -> None:
        self.network = network.eval().requires_grad_(False)
        self.info = dict(info or {})

    def to(self, device: torch.device | str) -> "Judge":
        """Move the network; images follow it, results come back to the CPU."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 500) -> Judged:
        """Features and logits of all images, `batch` at a time. FastdiffError on a wrong shape, dtype or range."""
        _check_images(images)
        if batch < 1:
            raise FastdiffError(f"batch={batch}; allowed: 1 or more")
        weight = self.network.head.weight
        parts = [self.network(chunk.to(weight.device, weight.dtype).clamp(-1.0, 1.0)) for chunk in images.split(batch)]
        return Judged(torch.cat([part[0].cpu() for part in parts]), torch.cat([part[1].cpu() for part in parts]))

    def features(self, images: Tensor) -> Tensor:
        """(n, 1, 28, 28) in [-1, 1] -> (n, 48), the penultimate layer."""
        return self(images).features

    def logits(self, images: Tensor) -> Tensor:
        """(n, 1, 28, 28) in [-1, 1] -> (n, 10)."""
        return self(images).logits


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != (1, 28, 28) or len(images) == 0:
        raise FastdiffError(
            f"images have shape {tuple(images.shape)}; the judge allows (n, 1, 28, 28) with n >= 1: "
            "it knows Fashion-MNIST only, use another feature network for other data"
        )
    if not images.is_floating_point():
        raise FastdiffError(f"images are {images.dtype}; allowed: floats in [-1, 1]; convert bytes by x / 127.5 - 1")
    largest = images.abs().max().item()
    if not largest <= OVERSHOOT:  # also true of NaN
        raise FastdiffError(f"images reach |x| = {largest:g}; allowed: finite values in [-1, 1]; rescale them")


def load_judge(path: str | Path | None = None) -> Judge:
    """The shipped judge, or the one at `path` (made by `train_judge`, its `hashes.json` beside it).

    CheckpointError where the file is missing, differs from its sha256, or does not hold these weights.
    """
    path = FASHION_MNIST / "judge.safetensors" if path is None else Path(path)
    data = read_verified(path)
    network = JudgeNet()
    try:
        network.load_state_dict(safetensors.torch.load(data))
        (size,) = struct.unpack("<Q", data[:8])
        info = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the judge's weights ({error}); reinstall fastdiff") from error
    return Judge(network, info)
