"""Distances against closed forms, scikit-learn and brute force; bootstrap intervals against their stated coverage."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import linalg, stats
from sklearn.metrics.pairwise import polynomial_kernel

from fastdiff.errors import FastdiffError
from fastdiff.metrics import (
    bootstrap,
    bootstrap_mean,
    class_entropy,
    frechet_distance,
    kid,
    paired_bootstrap,
    precision_recall,
    sliced_wasserstein,
)
from fastdiff.metrics.distances import frechet_from_moments, moments


def _spd(rng, size):
    root = rng.standard_normal((size, size))
    return root @ root.T / size + 0.1 * np.eye(size)


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    basis = linalg.qr(rng.standard_normal((6, 6)))[0]
    first, second = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6)
    means = rng.standard_normal((2, 6))
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    found = frechet_from_moments(means[0], basis * first @ basis.T, means[1], basis * second @ basis.T)
    assert found == pytest.approx(expected, rel=1e-12)


def test_frechet_agrees_with_sqrtm_where_covariances_do_not_commute():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((300, 7)) @ _spd(rng, 7), rng.standard_normal((200, 7)) @ _spd(rng, 7) + 0.5
    (mu_a, cov_a), (mu_b, cov_b) = moments(a), moments(b)
    np.testing.assert_allclose(cov_a, np.cov(a.T), rtol=1e-12)
    expected = ((mu_a - mu_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_singular_covariances_stays_real_and_exact():
    rng = np.random.default_rng(2)
    a = rng.standard_normal((5, 20))  # fewer rows than columns
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(a, a + 2.0) == pytest.approx(20 * 4.0, rel=1e-6)
    assert frechet_distance(a, 3.0 * a) == pytest.approx(
        4 * (a.mean(axis=0) ** 2).sum() + 4 * a.var(axis=0, ddof=1).sum(), rel=1e-6
    )


def test_frechet_of_equal_laws_is_biased_in_n_as_documented():
    rng = np.random.default_rng(3)
    small, large = (
        np.mean([frechet_distance(*rng.standard_normal((2, n, 10))) for _ in range(20)]) for n in (100, 1000)
    )
    assert 5.0 < small / large < 20.0  # proportional to 1/n


@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 55), (1500, 1100)])
def test_kid_is_the_u_statistic_of_sklearns_kernel(n, m):
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((n, 5)), rng.standard_normal((m, 5)) * 1.3 + 0.2
    xx, yy, xy = (polynomial_kernel(*pair, degree=3, coef0=1) for pair in ((a, a), (b, b), (a, b)))
    expected = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean()
    assert kid(a, b).value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_kid_is_unbiased_and_its_standard_error_is_the_spread_over_samples(shift):
    rng = np.random.default_rng(5)
    n, width, runs = 120, 4, 400
    found = np.array(
        [kid(rng.standard_normal((n, width)), rng.standard_normal((n, width)) + shift) for _ in range(runs)]
    )
    spread = found[:, 0].std(ddof=1)
    u, v = np.zeros(width), np.full(width, shift)
    truth = _mean_kernel(u, u) + _mean_kernel(v, v) - 2 * _mean_kernel(u, v)
    tolerance = 3.5 * spread / math.sqrt(runs)
    assert abs(found[:, 0].mean() - truth) < tolerance
    assert 0.85 < np.sqrt((found[:, 1] ** 2).mean()) / spread < 1.25
    if shift:
        assert truth > 5 * tolerance  # so the figure that is checked is not rounding


def _mean_kernel(u, v):
    """E of (x.y/d + 1)^3 for x ~ N(u, I), y ~ N(v, I) independent: the first three moments of x.y in closed form."""
    d, uv, uu, vv = len(u), u @ v, u @ u, v @ v
    second, third = uv**2 + uu + vv + d, uv**3 + 3 * uv * (uu + vv + d + 2)
    return 1 + 3 * uv / d + 3 * second / d**2 + third / d**3


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_kid_with_strata_is_unbiased_where_the_plain_one_is_not(shift):
    rng = np.random.default_rng(13)
    centres = 1.5 * rng.standard_normal((4, 3))
    labels = [np.arange(n) % 4 for n in (120, 88)]  # fixed shares, well apart: the case of class-conditional samples
    stratified, plain = [], []
    for _ in range(400):
        a, b = (centres[label] + rng.standard_normal((len(label), 3)) for label in labels)
        stratified.append(kid(a, b + shift, strata_a=labels[0], strata_b=labels[1]))
        plain.append(kid(a, b + shift).value)
    pairs = [(u, v) for u in centres for v in centres]
    truth = np.mean([_mean_kernel(u, v) + _mean_kernel(u + shift, v + shift) - 2 * _mean_kernel(u, v + shift)
                     for u, v in pairs])  # fmt: skip
    found = np.array(stratified)
    spread = found[:, 0].std(ddof=1)
    assert abs(found[:, 0].mean() - truth) < 3.5 * spread / 20
    # cautious where the laws are equal: see _kid_full
    assert 0.85 < np.sqrt((found[:, 1] ** 2).mean()) / spread < (1.2 if shift else 1.5)
    assert np.mean(plain) < truth - 5 * spread / 20
    assert kid(a, b, strata_a=np.zeros(120, int)) == pytest.approx(kid(a, b))  # one class is no strata


def test_kid_over_subsets_agrees_with_the_whole_and_uses_every_row_once():
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((600, 5)), rng.standard_normal((600, 5)) + 0.5
    whole, blocks = kid(a, b), kid(a, b, subsets=6, subset_size=100, seed=1)
    assert abs(whole.value - blocks.value) < 3 * blocks.error
    assert 0.4 < blocks.error / whole.error < 2.5
    assert kid(a, b, subsets=6, subset_size=100, seed=1) == blocks
    assert kid(a, b, subsets=6, subset_size=100, seed=2) != blocks
    twice = kid(a[:200], b[:200], subsets=2, subset_size=200)  # both blocks are the whole sample
    assert twice.value == pytest.approx(kid(a[:200], b[:200]).value, rel=1e-10)
    assert twice.error == pytest.approx(0.0, abs=1e-12)


def test_precision_recall_on_known_configurations():
    rng = np.random.default_rng(7)
    cluster = rng.standard_normal((400, 3))
    assert precision_recall(cluster, cluster) == (1.0, 1.0)
    assert precision_recall(cluster, cluster + 100.0) == (0.0, 0.0)
    both = np.concatenate([cluster[:200], cluster[200:] + 100.0])
    found = precision_recall(both, cluster[:200] * 0.9)  # one of two modes: precise, half recalled
    assert found.precision > 0.95
    assert 0.4 < found.recall <= 0.5
    half_wrong = np.concatenate([cluster[:200], cluster[200:] - 100.0])
    assert precision_recall(cluster[:200], half_wrong).precision == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_agrees_with_brute_force_across_chunks(k):
    rng = np.random.default_rng(8)
    real, fake = rng.standard_normal((1300, 2)) + 1000.0, rng.standard_normal((1100, 2)) * 1.5 + 1001.0

    def covered(points, centres):
        own = np.sqrt(((centres[:, None] - centres[None]) ** 2).sum(-1))
        radius = np.sort(own, axis=1)[:, k]  # column 0 is the row itself
        return (np.sqrt(((points[:, None] - centres[None]) ** 2).sum(-1)) <= radius).any(axis=1).mean()

    assert precision_recall(real, fake, k) == pytest.approx((covered(fake, real), covered(real, fake)), abs=1e-12)


def test_sliced_wasserstein_of_a_shift_and_of_a_scale():
    rng = np.random.default_rng(9)
    a = rng.standard_normal((500, 8))
    shift = np.array([3.0, 0, 0, 0, 0, 0, 0, 4.0])
    assert sliced_wasserstein(a, a) == 0.0
    assert sliced_wasserstein(a, a + shift, projections=5_000) == pytest.approx(5.0 / math.sqrt(8), rel=0.03)
    line = a[:, :1]
    assert sliced_wasserstein(line, 3.0 * line) == pytest.approx(2.0 * np.sqrt((line**2).mean()), rel=1e-12)
    assert sliced_wasserstein(a, 2 * a, seed=1) != sliced_wasserstein(a, 2 * a, seed=2)


def test_sliced_wasserstein_of_unequal_counts():
    rng = np.random.default_rng(10)
    a, b = rng.standard_normal((7, 3)), rng.standard_normal((4, 3)) + 1.0
    repeated = sliced_wasserstein(np.repeat(a, 4, axis=0), np.repeat(b, 7, axis=0))  # the same two laws, 28 rows each
    assert sliced_wasserstein(a, b) == pytest.approx(repeated, rel=1e-12)
    assert sliced_wasserstein(np.repeat(a, 3, axis=0), a) == pytest.approx(0.0, abs=1e-12)


def test_class_entropy():
    assert class_entropy(np.arange(1000) % 8, 8) == pytest.approx(3.0)
    assert class_entropy([4, 4, 4], 10) == 0.0
    assert class_entropy([0, 0, 0, 1], 2) == pytest.approx(stats.entropy([0.75, 0.25], base=2))
    for bad in ([0, 10], [-1, 2], [], [0.5, 1.0]):
        with pytest.raises(FastdiffError):
            class_entropy(bad, 10)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(11)
    inside = {"mean": 0, "median": 0, "paired": 0}
    runs = 120
    for run in range(runs):
        x = rng.exponential(1.0, 80)
        common = 5.0 * rng.standard_normal(80)  # what pairs share must cancel
        mean = bootstrap_mean(x, draws=250, seed=run)
        median = bootstrap(lambda rows, x=x: float(np.median(x[rows])), 80, draws=200, seed=run)
        paired = paired_bootstrap(common + 0.3 + rng.standard_normal(80), common, draws=250, seed=run)
        inside["mean"] += mean.lo <= 1.0 <= mean.hi
        inside["median"] += median.lo <= math.log(2) <= median.hi
        inside["paired"] += paired.lo <= 0.3 <= paired.hi
        assert paired.hi - paired.lo < 1.0  # unpaired it would be about 3
    assert all(0.86 <= count / runs <= 0.99 for count in inside.values()), inside


def test_bootstrap_gives_its_own_statistic_level_and_seed():
    x = np.random.default_rng(12).standard_normal(50)
    wide, narrow = bootstrap_mean(x, level=0.99), bootstrap_mean(x, level=0.5)
    assert wide.lo < narrow.lo < x.mean() < narrow.hi < wide.hi
    assert wide.value == pytest.approx(x.mean())
    assert narrow.hi - narrow.lo == pytest.approx(2 * 0.6745 * x.std() / math.sqrt(50), rel=0.1)
    assert paired_bootstrap(x, x - 1) == pytest.approx((1.0, 1.0, 1.0))
    assert bootstrap_mean(x, seed=1) == bootstrap_mean(x, seed=1) != bootstrap_mean(x, seed=2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: frechet_distance(x, x[:, :2]), "one width"),
        (lambda x: frechet_distance(x[0], x), "flatten"),
        (lambda x: frechet_distance(x[:1], x), "n >= 2"),
        (lambda x: kid(x, np.where(x > 0, np.nan, x)), "NaN"),
        (lambda x: kid(x, x, subsets=1), "at least 2"),
        (lambda x: kid(x, x, subsets=4, subset_size=100), "subset_size=100"),
        (lambda x: kid(x, x, strata_a=[0] * 8 + [1]), "class 1 has one row"),
        (lambda x: kid(x, x, strata_b=[0] * 8), "one for each row"),
        (lambda x: kid(x, x, strata_a=[0] * 9, subsets=2, subset_size=3), "one of the two"),
        (lambda x: precision_recall(x, x, k=9), "k=9"),
        (lambda x: sliced_wasserstein(x, x, projections=0), "projections"),
        (lambda x: frechet_from_moments(x[0], np.eye(4), x[0], np.eye(3)), "one d"),
        (lambda x: paired_bootstrap(x[0], x[0, :2]), "pairs"),
        (lambda x: bootstrap_mean(x[0], draws=5), "draws=5"),
    ],
)
def test_bad_input_is_refused_with_its_reason(call, words):
    with pytest.raises(FastdiffError, match=words):
        call(np.random.default_rng(0).standard_normal((9, 4)))


def test_metrics_import_without_the_test_libraries():
    code = "import sys, fastdiff.metrics; print([m for m in ('sklearn', 'scipy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
