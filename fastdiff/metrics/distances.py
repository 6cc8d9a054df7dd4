"""Distances between two samples of feature vectors; numpy, float64 throughout. Rows are samples, columns features.

`frechet_distance` is biased upwards in n, and by an amount that depends on the model (Chong & Forsyth 2020,
1911.07023): compare only values at one and the same n. `kid` is unbiased at any n.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastdiff.errors import FastdiffError

Floats = NDArray[np.float64]
CHUNK = 1024  # rows of a kernel or distance matrix alive at once: 80 MB against 10,000 columns


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


class PrecisionRecall(NamedTuple):
    """Shares in 0..1: of fakes that lie in the real manifold, and of reals that lie in the fake manifold."""

    precision: float
    recall: float


def moments(features: ArrayLike) -> tuple[Floats, Floats]:
    """Mean (d,) and unbiased covariance (d, d) of features (n, d), n >= 2."""
    x = checked(features, "features")
    mean = x.mean(axis=0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Frechet distance of Gaussians fitted to features a (n, d) and b (m, d); Heusel et al. 2017, 1706.08500.

    In squared feature units, biased upwards by about d/n: report it with n, against anchors at the same n.
    """
    x, y = _pair(a, b)
    return frechet_from_moments(*moments(x), *moments(y))


def frechet_from_moments(mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike) -> float:
    """|mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2) for means (d,) and covariances A, B (d, d).

    The root is taken of the symmetric form: its eigenvalues are real by construction, where sqrtm of A B returns
    complex numbers or fails on singular covariances (n < d). Works with published FID statistics (mu, sigma).
    """
    mu_a, mu_b = np.asarray(mean_a, np.float64), np.asarray(mean_b, np.float64)
    first, second = np.asarray(cov_a, np.float64), np.asarray(cov_b, np.float64)
    size = mu_a.shape[0] if mu_a.ndim == 1 else -1
    if mu_b.shape != (size,) or first.shape != (size, size) or second.shape != (size, size):
        raise FastdiffError(
            f"moments have shapes {mu_a.shape}, {first.shape} and {mu_b.shape}, {second.shape}; "
            "allowed: (d,), (d, d) twice with one d; use features of one network"
        )
    if not all(np.isfinite(array).all() for array in (mu_a, mu_b, first, second)):
        raise FastdiffError("moments hold NaN or infinity; allowed: finite values; check the features they come from")
    values, vectors = np.linalg.eigh((first + first.T) / 2)
    root = vectors * np.sqrt(values.clip(min=0.0)) @ vectors.T
    inner = root @ second @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0.0)).sum()
    difference = mu_a - mu_b
    distance = difference @ difference + np.trace(first) + np.trace(second) - 2.0 * cross
    return float(max(distance, 0.0))  # equal samples leave -1e-13 of rounding


def kid(
    a: ArrayLike,
    b: ArrayLike,
    *,
    strata_a: ArrayLike | None = None,
    strata_b: ArrayLike | None = None,
    subsets: int = 0,
    subset_size: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Unbiased MMD^2 with the kernel (x.y/d + 1)^3 of features a (n, d), b (m, d); Binkowski et al. 2018, 1801.01401.

    subsets=0 (default): the estimate from all pairs of the whole samples, with the standard error of `_kid_full`.
    subsets >= 2: the mean over blocks of `subset_size` rows drawn without repeats until the rows run out, as the
    paper does; the error is their standard deviation / sqrt(subsets), honest while subsets * subset_size <= n, m and
    too small beyond, since blocks then share rows. The value can be negative: it is unbiased, zero for equal laws.

    strata: integer class labels (n,), (m,), where a sample was drawn class by class with fixed shares, not row by row.
    Its rows then hold fewer pairs of one class than independent rows do, which the plain estimate reads as a
    negative distance (-0.0017 between real halves of 2,048). Not together with subsets.
    """
    x, y = _pair(a, b)
    if subsets == 0:
        return _kid_full(x, y, _one_hot(strata_a, len(x)), _one_hot(strata_b, len(y)))
    if strata_a is not None or strata_b is not None:
        raise FastdiffError(f"strata with subsets={subsets}; allowed: one of the two, since blocks break the shares")
    if subsets < 2 or not 2 <= subset_size <= min(len(x), len(y)):
        raise FastdiffError(
            f"subsets={subsets}, subset_size={subset_size} of {len(x)} and {len(y)} rows; "
            "allowed: 0 or at least 2 subsets, of 2 rows up to the smaller sample"
        )
    rng = np.random.default_rng(seed)
    rows_x, rows_y = (_blocks(len(sample), subsets, subset_size, rng) for sample in (x, y))
    plain = _one_hot(None, subset_size)
    values = np.array([_kid_full(x[i], y[j], plain, plain).value for i, j in zip(rows_x, rows_y, strict=True)])
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(subsets)))


def _blocks(count: int, blocks: int, size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """`blocks` index arrays of `size`; a row comes back only when all whole blocks of a shuffle are used."""
    found: list[NDArray[np.int64]] = []
    while len(found) < blocks:
        order = rng.permutation(count)
        found.extend(order[start : start + size] for start in range(0, count - size + 1, size))
    return found[:blocks]


def _one_hot(strata: ArrayLike | None, n: int) -> Floats:
    """(n, classes) of 0 and 1; one class of all rows for None."""
    if strata is None:
        return np.ones((n, 1))
    labels = np.asarray(strata)
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise FastdiffError(f"strata are {labels.dtype} {labels.shape}; allowed: integers ({n},), one for each row")
    names, where, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        raise FastdiffError(f"class {names[counts.argmin()]} has one row; allowed: 2 or more of each; use more rows")
    return np.eye(len(names))[where]


def _kid_full(x: Floats, y: Floats, in_x: Floats, in_y: Floats) -> Estimate:
    """The U-statistic over all pairs and its standard error; in_x (n, c), in_y (m, c) are one-hot strata.

    Var = V1 + V2 (Hoeffding): V1 from the row means h_i of the kernel, V2 from its doubly centred part, the only one
    left where both laws are equal. The plug-in variance of the row means estimates V1 + 2 V2, so V2 is taken off; the
    floor at V2 makes the error up to 1.35 times too large (measured) where both laws are equal, and right elsewhere.
    With strata, means over pairs are taken class by class, and variances are those within classes.
    """
    n, m = len(x), len(y)
    size_x, size_y = in_x.sum(axis=0), in_y.sum(axis=0)
    sums_xx, square_xx = _kernel_rows(x, in_x)
    sums_yy, square_yy = _kernel_rows(y, in_y)
    sums_xy, sums_yx, square_xy = _kernel_cross(x, y, in_x, in_y)
    others_x, others_y = size_x - in_x, size_y - in_y  # a row is not its own pair
    rows_xx, rows_yy = sums_xx / others_x, sums_yy / others_y
    rows_xy, rows_yx = sums_xy / size_y, sums_yx / size_x
    share_x, share_y = size_x / n, size_y / m
    influence_x, influence_y = rows_xx @ share_x - rows_xy @ share_y, rows_yy @ share_y - rows_yx @ share_x
    value = (rows_xx @ share_x).mean() + (rows_yy @ share_y).mean() - 2.0 * (rows_xy @ share_y).mean()
    plug_in = 4.0 * _within(influence_x, in_x) / n**2 + 4.0 * _within(influence_y, in_y) / m**2
    left_x = _centred(square_xx, rows_xx, rows_xx, others_x, others_x, in_x) / (n * (n - 1))
    left_y = _centred(square_yy, rows_yy, rows_yy, others_y, others_y, in_y) / (m * (m - 1))
    all_x, all_y = np.broadcast_to(size_x, rows_yx.shape), np.broadcast_to(size_y, rows_xy.shape)
    left_xy = _centred(square_xy, rows_xy, rows_yx, all_y, all_x, in_x) / (n * m)
    second = 2.0 * left_x / (n * (n - 1)) + 2.0 * left_y / (m * (m - 1)) + 4.0 * left_xy / (n * m)
    return Estimate(float(value), float(np.sqrt(max(plug_in - second, second))))


def _within(values: Floats, groups: Floats) -> float:
    """Sum over rows of the unbiased variance of `values` (n,) within the row's class."""
    sizes = groups.sum(axis=0)
    residual = values - groups @ (values @ groups / sizes)
    return float((residual**2) @ groups @ (sizes / (sizes - 1)))


def _centred(squares: float, rows: Floats, columns: Floats, per_row: Floats, per_column: Floats, in_x: Floats) -> float:
    """Sum of squares of a kernel matrix less its class-wise row means (n, cy) and column means (m, cx).

    per_row (n, cy) and per_column (m, cx) count the pairs behind each mean: one less where a row meets its own class.
    """
    pairs = in_x.T @ per_row
    means = in_x.T @ (rows * per_row) / pairs
    total = squares - (rows**2 * per_row).sum() - (columns**2 * per_column).sum() + (means**2 * pairs).sum()
    return max(float(total), 0.0)


def _kernel(x: Floats, y: Floats) -> Floats:
    base = x @ y.T / x.shape[1] + 1.0
    return np.asarray(base * base * base)  # eight times faster than ** 3


def _kernel_rows(x: Floats, groups: Floats) -> tuple[Floats, float]:
    """Sums of k(x_i, x_j), j != i, over the classes of j, (n, c); and the sum of k^2 over i != j."""
    sums, squares = np.empty(groups.shape), 0.0
    for start in range(0, len(x), CHUNK):
        block = _kernel(x[start : start + CHUNK], x)
        rows = np.arange(len(block))
        block[rows, start + rows] = 0.0
        sums[start : start + CHUNK] = block @ groups
        squares += float(np.vdot(block, block))
    return sums, squares


def _kernel_cross(x: Floats, y: Floats, in_x: Floats, in_y: Floats) -> tuple[Floats, Floats, float]:
    """Sums of k(x_i, y_j) over the classes of j, (n, cy), and of i, (m, cx); and the sum of k^2."""
    rows, columns, squares = np.empty((len(x), in_y.shape[1])), np.zeros((len(y), in_x.shape[1])), 0.0
    for start in range(0, len(x), CHUNK):
        block = _kernel(x[start : start + CHUNK], y)
        rows[start : start + CHUNK] = block @ in_y
        columns += block.T @ in_x[start : start + CHUNK]
        squares += float(np.vdot(block, block))
    return rows, columns, squares


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of features real (n, d), fake (m, d); Kynkaanniemi et al. 2019, 1904.06991.

    A point lies in a manifold if it is within the distance of some sample of it to that sample's k-th neighbour.
    Both shares depend on n and m: keep n = m, and the same n in one table.
    """
    x, y = _pair(real, fake)
    if not 1 <= k < min(len(x), len(y)):
        raise FastdiffError(f"k={k} with {len(x)} real and {len(y)} fake rows; allowed: 1 up to the rows less one")
    centre = x.mean(axis=0)  # a common shift changes no distance and keeps |x|^2 - 2 x.y + |y|^2 accurate
    x, y = x - centre, y - centre
    radius_x, radius_y = _neighbour_radius(x, k), _neighbour_radius(y, k)
    return PrecisionRecall(_covered(y, x, radius_x), _covered(x, y, radius_y))


def _squared_distances(x: Floats, y: Floats) -> Floats:
    squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)[None, :] - 2.0 * (x @ y.T)
    return np.asarray(squares.clip(min=0.0))


def _neighbour_radius(x: Floats, k: int) -> Floats:
    """Squared distance of every row to its k-th nearest other row, (n,)."""
    radius = np.empty(len(x))
    for start in range(0, len(x), CHUNK):
        block = _squared_distances(x[start : start + CHUNK], x)
        rows = np.arange(len(block))
        block[rows, start + rows] = np.inf  # a row is not its own neighbour
        radius[start : start + CHUNK] = np.partition(block, k - 1, axis=1)[:, k - 1]
    return radius


def _covered(points: Floats, centres: Floats, radius: Floats) -> float:
    """Share of points within the (squared) radius of at least one centre."""
    inside = 0
    for start in range(0, len(points), CHUNK):
        near = _squared_distances(points[start : start + CHUNK], centres) <= radius[None, :]
        inside += int(near.any(axis=1).sum())
    return inside / len(points)


def sliced_wasserstein(a: ArrayLike, b: ArrayLike, projections: int = 256, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance of samples a (n, d), b (m, d), in their own units; Rabin et al. 2011.

    The root of the mean over random unit directions of the exact squared 1-D W2; a shift by v gives |v|/sqrt(d) in
    expectation. n and m may differ. Biased upwards at finite n: compare at one n.
    """
    x, y = _pair(a, b)
    if projections < 1:
        raise FastdiffError(f"projections={projections}; allowed: 1 or more")
    directions = np.random.default_rng(seed).standard_normal((x.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    lines_x, lines_y = np.sort(x @ directions, axis=0), np.sort(y @ directions, axis=0)
    n, m = len(x), len(y)
    # both quantile functions are steps; between two breakpoints (in units of 1/(n m)) each is one order statistic
    breaks = np.union1d(np.arange(1, n + 1, dtype=np.int64) * m, np.arange(1, m + 1, dtype=np.int64) * n)
    widths = np.diff(breaks, prepend=0)
    gaps = lines_x[(breaks - 1) // m] - lines_y[(breaks - 1) // n]
    return float(np.sqrt((widths @ gaps**2).mean() / (n * m)))


def class_entropy(labels: ArrayLike, classes: int) -> float:
    """Entropy in bits of the histogram of labels (n,) in 0..classes-1; log2(classes) where all are equally common."""
    values = np.asarray(labels)
    if values.ndim != 1 or values.size == 0 or not np.issubdtype(values.dtype, np.integer):
        raise FastdiffError(f"labels are {values.dtype} of shape {values.shape}; allowed: integers (n,), n >= 1")
    if values.min() < 0 or values.max() >= classes:
        raise FastdiffError(f"labels span {values.min()}..{values.max()}; allowed: 0..{classes - 1}")
    shares = np.bincount(values, minlength=classes) / values.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum() + 0.0)  # + 0.0: one class gives 0, not -0


def checked(features: ArrayLike, name: str) -> Floats:
    """`features` as a finite float64 (n >= 2, d >= 1) array, or a FastdiffError that names it."""
    x = np.asarray(features)
    if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1 or x.dtype.kind not in "fiu":
        raise FastdiffError(
            f"{name} is {x.dtype} of shape {x.shape}; allowed: real (n, d), n >= 2; flatten images to rows first"
        )
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise FastdiffError(f"{name} holds NaN or infinity; allowed: finite values; check the images it comes from")
    return x


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    x, y = checked(a, "the first sample"), checked(b, "the second sample")
    if x.shape[1] != y.shape[1]:
        raise FastdiffError(f"samples have {x.shape[1]} and {y.shape[1]} features; allowed: one width, of one network")
    return x, y
