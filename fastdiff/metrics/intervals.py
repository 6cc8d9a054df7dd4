"""Bootstrap intervals: percentile intervals from resampled rows (Efron 1979), numpy float64."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastdiff.errors import FastdiffError


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    value: float
    lo: float
    hi: float


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], n: int, *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval of `statistic(rows)`, rows being n indices drawn with replacement from 0..n-1.

    The value is the statistic of 0..n-1. Meant for means, accuracies, medians and ratios. Not for distances between
    samples (Frechet, KID, precision): repeated rows bias those, so use `kid`'s own standard error or several seeds.
    """
    _check(n, draws, level)
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(0, n, n)) for _ in range(draws)], np.float64)
    return _interval(float(statistic(np.arange(n))), values, level)


def bootstrap_mean(values: ArrayLike, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Percentile interval of the mean of a per-sample array (n,), n >= 2."""
    x = _vector(values, "values")
    _check(len(x), draws, level)
    rng = np.random.default_rng(seed)
    means = np.array([x[rng.integers(0, len(x), len(x))].mean() for _ in range(draws)])
    return _interval(float(x.mean()), means, level)


def paired_bootstrap(a: ArrayLike, b: ArrayLike, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Interval of mean(a - b) for per-sample arrays (n,) of the same samples: a[i] and b[i] share seed and label.

    Whatever both methods share (an easy or a hard seed) cancels in the difference; 0 outside lo..hi is a difference
    at the stated level.
    """
    x, y = _vector(a, "a"), _vector(b, "b")
    if x.shape != y.shape:
        raise FastdiffError(f"a has {len(x)} values and b {len(y)}; allowed: pairs, one of each for the same sample")
    return bootstrap_mean(x - y, draws=draws, seed=seed, level=level)


def _vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise FastdiffError(f"{name} has shape {x.shape}; allowed: finite values (n,), n >= 2, one for each sample")
    return x


def _check(n: int, draws: int, level: float) -> None:
    if n < 2 or draws < 40 or not 0.0 < level < 1.0:
        raise FastdiffError(
            f"n={n}, draws={draws}, level={level}; allowed: n >= 2, draws >= 40 (for its tails), 0 < level < 1"
        )


def _interval(value: float, draws: NDArray[np.float64], level: float) -> Interval:
    lo, hi = np.quantile(draws, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(value, float(lo), float(hi))
