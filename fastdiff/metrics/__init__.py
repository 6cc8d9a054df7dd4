"""How good samples are; nothing here enters a loss. `distances`: statistics; `judge`: features; `evaluate`: rows."""

from fastdiff.metrics.distances import (
    Estimate,
    PrecisionRecall,
    class_entropy,
    frechet_distance,
    kid,
    precision_recall,
    sliced_wasserstein,
)
from fastdiff.metrics.evaluate import Scores, floors, require_same_n, score
from fastdiff.metrics.inception import Inception, load_inception
from fastdiff.metrics.intervals import Interval, bootstrap, bootstrap_mean, paired_bootstrap
from fastdiff.metrics.judge import Judge, load_judge
from fastdiff.metrics.reference import Reference, load_reference

__all__ = [
    "Estimate",
    "Inception",
    "Interval",
    "Judge",
    "PrecisionRecall",
    "Reference",
    "Scores",
    "bootstrap",
    "bootstrap_mean",
    "class_entropy",
    "floors",
    "frechet_distance",
    "kid",
    "load_inception",
    "load_judge",
    "load_reference",
    "paired_bootstrap",
    "precision_recall",
    "require_same_n",
    "score",
    "sliced_wasserstein",
]
