"""The shipped reference: what real Fashion-MNIST looks like to the judge."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdiff.errors import CheckpointError
from fastdiff.metrics.judge import CLASSES, FEATURES
from fastdiff.shipped import FASHION_MNIST, read_verified


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images seen by the judge, in a seeded random order with the classes in turn.

    So the first n rows of a half are a fair sample with balanced classes, for any n.

    Features are (10000, 48) float16, labels (10000,) uint8 in 0..9, images (2048, 28, 28) uint8 of the first rows.
    The train half is what samples are compared with; the test half stands in for a perfect sampler (`floors`).
    """

    train_features: NDArray[np.float16]
    train_labels: NDArray[np.uint8]
    train_images: NDArray[np.uint8]
    test_features: NDArray[np.float16]
    test_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]

    def __post_init__(self) -> None:
        for half in ("train", "test"):
            features, labels, images = (getattr(self, f"{half}_{name}") for name in ("features", "labels", "images"))
            rows = len(features)
            if features.dtype != np.float16 or features.shape != (rows, FEATURES) or not np.isfinite(features).all():
                raise CheckpointError(
                    f"{half}_features is {features.dtype} {features.shape}; wanted float16 (n, {FEATURES})"
                )
            if labels.dtype != np.uint8 or labels.shape != (rows,) or labels.max() >= CLASSES:
                raise CheckpointError(f"{half}_labels is {labels.dtype} {labels.shape}; wanted uint8 ({rows},) in 0..9")
            if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or len(images) > rows:
                raise CheckpointError(f"{half}_images is {images.dtype} {images.shape}; wanted uint8 (n, 28, 28)")

    @property
    def rows(self) -> int:
        """The largest n both halves can give: 10,000 as shipped."""
        return min(len(self.train_features), len(self.test_features))


def load_reference(path: str | Path | None = None) -> Reference:
    """The shipped reference, or the one at `path` (made by `train_judge`, its `hashes.json` beside it).

    CheckpointError where the file is missing, differs from its sha256, or does not hold these arrays.
    """
    path = FASHION_MNIST / "reference.npz" if path is None else Path(path)
    data = read_verified(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Reference(**{name: arrays[name] for name in Reference.__dataclass_fields__})
    except (KeyError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} does not hold the reference ({error}); reinstall fastdiff") from error
