"""One row of scores for a set of samples, and the anchor row that real images get.

Samples are compared with as many real train images: n of each, so that every figure has the same n on both sides.
Frechet distance, precision, recall and sliced Wasserstein all depend on n. A table may hold one n only:
`require_same_n` refuses others, and every row carries its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastdiff.errors import FastdiffError
from fastdiff.metrics.distances import class_entropy, frechet_distance, kid, precision_recall, sliced_wasserstein
from fastdiff.metrics.judge import CLASSES, Judge
from fastdiff.metrics.reference import Reference

FD_ROWS = 2048  # below, the bias of the Frechet distance is larger than the differences it should show
NEIGHBOURS = 3
SMALLEST = 2 * CLASSES  # two real images of each class, which the stratified KID-clf needs
MOST_BLOCKS = 16


@dataclass(frozen=True)
class Scores:
    """One row. Not FID: features are those of the judge.

    fd_clf              Frechet distance, None where n < 2048; biased in n
    kid_clf, kid_error  unbiased MMD^2 (stratified by class) and its standard error over draws of both samples
    precision, recall   k = 3, in 0..1
    sliced_wasserstein  of pixels in [-1, 1], over the first min(n, 2048) images
    class_accuracy      share of samples that the judge puts in the class they were asked for; None without labels
    class_entropy       bits, of the classes the judge sees; log2(10) = 3.32 where balanced
    """

    n: int
    fd_clf: float | None
    kid_clf: float
    kid_error: float
    precision: float
    recall: float
    sliced_wasserstein: float
    class_accuracy: float | None
    class_entropy: float


def score(images: Tensor, labels: ArrayLike | Tensor | None, judge: Judge, reference: Reference) -> Scores:
    """Scores of images (n, 1, 28, 28), float in [-1, 1], against n real train images; n in 20..10,000.

    `labels` (n,) are the classes that were asked for, None if unconditional; KID-clf takes their shares as given. The
    real images have balanced classes: ask for balanced ones, or the scores count the difference in shares.
    n = len(images): give every method in one table the same number. FastdiffError on a wrong shape, range, label or n.
    """
    n = len(images)
    _check_n(n, reference)
    features, logits = judge(images)
    if images.min().item() >= 0.0:
        raise FastdiffError("no pixel of any image is below 0: this looks like [0, 1]; allowed: [-1, 1]; use 2 * x - 1")
    predicted = logits.argmax(dim=1).numpy()
    asked = None if labels is None else _labels(labels, n)
    accuracy = None if asked is None else float((predicted == asked).mean())
    pixels = images[: len(reference.train_images)].detach().cpu().clamp(-1.0, 1.0).flatten(1).numpy()
    real = reference.train_features[:n]
    distance = kid(real, features.numpy(), strata_a=reference.train_labels[:n], strata_b=asked)
    share = precision_recall(real, features.numpy(), NEIGHBOURS)
    return Scores(
        n=n,
        fd_clf=frechet_distance(real, features.numpy()) if n >= FD_ROWS else None,
        kid_clf=distance.value,
        kid_error=distance.error,
        precision=share.precision,
        recall=share.recall,
        sliced_wasserstein=sliced_wasserstein(_pixels(reference.train_images[: len(pixels)]), pixels),
        class_accuracy=accuracy,
        class_entropy=class_entropy(predicted, CLASSES),
    )


def floors(reference: Reference, n: int) -> Scores:
    """What n real test images score against n real train images: the anchor that a perfect sampler would reach.

    Means over disjoint blocks of n rows (as many as there are, at most 16); kid_error is that of the mean.
    class_accuracy is None (see `judge.info["accuracy"]`), class_entropy is that of the true labels.
    """
    _check_n(n, reference)
    starts = [block * n for block in range(min(reference.rows // n, MOST_BLOCKS))]
    pairs = [(reference.train_features[i : i + n], reference.test_features[i : i + n]) for i in starts]
    classes = [(reference.train_labels[i : i + n], reference.test_labels[i : i + n]) for i in starts]
    kids = [kid(*pair, strata_a=real, strata_b=fake) for pair, (real, fake) in zip(pairs, classes, strict=True)]
    shares = np.array([precision_recall(real, fake, NEIGHBOURS) for real, fake in pairs])
    train, test = reference.train_images, reference.test_images
    size = min(n, len(train), len(test))
    image_starts = [i for i in starts if i + size <= min(len(train), len(test))]
    pixel_pairs = [(_pixels(train[i : i + size]), _pixels(test[i : i + size])) for i in image_starts]
    return Scores(
        n=n,
        fd_clf=float(np.mean([frechet_distance(*pair) for pair in pairs])) if n >= FD_ROWS else None,
        kid_clf=float(np.mean([value.value for value in kids])),
        kid_error=float(np.sqrt(np.mean([value.error**2 for value in kids]) / len(kids))),
        precision=float(shares[:, 0].mean()),
        recall=float(shares[:, 1].mean()),
        sliced_wasserstein=float(np.mean([sliced_wasserstein(*pair) for pair in pixel_pairs])),
        class_accuracy=None,
        class_entropy=float(np.mean([class_entropy(reference.test_labels[i : i + n], CLASSES) for i in starts])),
    )


def require_same_n(rows: Iterable[Scores]) -> int:
    """The one n of all rows of a table; FastdiffError where they differ or there are none."""
    sizes = sorted({row.n for row in rows})
    if len(sizes) != 1:
        raise FastdiffError(f"rows have n = {sizes}; allowed in one table: one n (scores depend on it); score anew")
    return sizes[0]


def _check_n(n: int, reference: Reference) -> None:
    if not SMALLEST <= n <= reference.rows:
        raise FastdiffError(
            f"n = {n} images; allowed: {SMALLEST}..{reference.rows}, what the reference can set against them"
        )


def _labels(labels: ArrayLike | Tensor, n: int) -> NDArray[np.int64]:
    values = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if values.shape != (n,) or values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= CLASSES:
        raise FastdiffError(f"labels are {values.dtype} {values.shape}; allowed: integers ({n},) in 0..{CLASSES - 1}")
    return values.astype(np.int64)


def _pixels(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(n, 28, 28) bytes -> (n, 784) in [-1, 1]."""
    return images.reshape(len(images), -1) / 127.5 - 1.0
