"""Scores of a set of images beyond the paired error, by a judge of the data; each scorer says what it may be called.

`FD-clf` and `KID-clf` are in the features of our own classifier; only features of the published Inception network give FID.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..metrics import floors, frechet_distance, kid, load_inception, load_judge, load_reference, score


class Scorer(Protocol):
    """Scores images in [0, 1], (n, C, H, W), and real data at the same n."""

    name: str

    def score(self, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """Named figures of n generated images."""

    def anchor(self, n: int) -> dict[str, Any]:
        """The same figures for real data against real data."""


class JudgeScorer:
    """The shipped Fashion-MNIST classifier and its reference features."""

    def __init__(self) -> None:
        self.judge, self.reference = load_judge(), load_reference()
        self.name = "judge:fashion-mnist"

    def score(self, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        return asdict(score(images.cpu() * 2 - 1, labels, self.judge, self.reference))

    def anchor(self, n: int) -> dict[str, Any]:
        return asdict(floors(self.reference, n)) | {"class_accuracy": float(self.judge.info["accuracy"])}


class InceptionScorer:
    """FID and KID from the published Inception weights (a file of the user's) against a data set of the user's."""

    def __init__(self, weights: Path, data: Path) -> None:
        from ..training.data import load_images

        self.network = load_inception(weights)
        self.images = load_images(data).x
        self.name = f"inception:{'published' if self.network.published else 'other weights'}"
        self.key = "fid" if self.network.published else "fd_inception"

    def _features(self, images: Tensor) -> np.ndarray:
        return np.concatenate([np.asarray(self.network(chunk)) for chunk in images.split(50)])

    def _pair(self, real: Tensor, fake: Tensor) -> dict[str, Any]:
        a, b = self._features(real), self._features(fake)
        distance = kid(a, b)
        return {"n": len(fake), self.key: frechet_distance(a, b), "kid_inception": distance.value, "kid_error": distance.error}

    def _real(self, n: int, skip: int = 0) -> Tensor:
        if skip + n > len(self.images):
            raise FastdiffError(f"{len(self.images)} real images are too few for n = {n}; give more data or a smaller --n")
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))
        return self.images[order[skip : skip + n]]

    def score(self, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        return self._pair(self._real(len(images)), (images * 255).round().to(torch.uint8).cpu())

    def anchor(self, n: int) -> dict[str, Any]:
        return self._pair(self._real(n), self._real(n, skip=n))


def scorer_for(denoiser: Denoiser) -> Scorer | None:
    """The shipped judge for a model of its data set, else None: paired errors need no judge."""
    trained_on = denoiser.info.get("training", {}).get("data_sha256")
    if trained_on and denoiser.shape == (1, 28, 28):
        judge = JudgeScorer()
        if judge.judge.info.get("data_sha256") == trained_on:
            return judge
    return None
