"""Philox against its published vectors, numpy against torch, and noise that depends on a sample's own seed alone."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.noise import check_seeds, from_seeds, from_torch, normal, normal_numpy, recorded
from fastdiff.philox import MASK, rounds

KNOWN = [  # Random123, kat_vectors: philox4x32 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip
SEEDS = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x299F31D0A4093822]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
@pytest.mark.parametrize("make", [lambda v: np.array([v], np.uint64), lambda v: torch.tensor([v])], ids=["numpy", "torch"])
def test_philox_known_answers(counter, key, words, make):
    with np.errstate(over="ignore"):
        out = rounds([make(c) for c in counter], [make(k) for k in key])
    assert [int(v[0]) for v in out] == list(words)


def reference(seed, draw, i):
    """Element i of a draw from the text alone: plain integers and math, in float64."""
    c = [i // 4 & MASK, i // 4 >> 32, draw & MASK, draw >> 32]
    k = [seed & MASK, seed >> 32]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & MASK, p0 >> 32 ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    a, b = c[:2] if i % 4 < 2 else c[2:]
    radius = math.sqrt(-2 * math.log(((a >> 8) + 1) * 2.0**-24))
    angle = 2 * math.pi * (b >> 8) * 2.0**-24
    return radius * (math.sin(angle) if i % 2 else math.cos(angle))


@pytest.mark.parametrize("draw", [0, 1, 5, 2**32 + 3])
def test_normals_are_box_muller_of_the_words(draw):
    found, exact = normal_numpy(SEEDS, draw, 11), [[reference(s, draw, i) for i in range(11)] for s in SEEDS]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 784, 3072])
def test_numpy_and_torch_agree(count):
    out = normal(SEEDS, 3, count)
    assert out.dtype == torch.float32 and out.shape == (len(SEEDS), count)
    np.testing.assert_allclose(out.numpy(), normal_numpy(SEEDS, 3, count), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [normal, normal_numpy])
def test_element_depends_on_seed_draw_and_place_alone(make):
    whole = np.asarray(make(SEEDS, 2, 1001))
    for count in (1, 2, 5, 64, 1000):
        np.testing.assert_array_equal(np.asarray(make(SEEDS, 2, count)), whole[:, :count])
    for i, seed in enumerate(SEEDS):
        np.testing.assert_array_equal(np.asarray(make([seed], 2, 1001))[0], whole[i])
    np.testing.assert_array_equal(np.asarray(make(SEEDS[::-1], 2, 1001)), whole[::-1])


def test_seeds_and_draws_give_different_numbers():
    rows = np.concatenate([normal_numpy(SEEDS, draw, 8) for draw in (0, 1, 2, 2**32)])
    assert len(np.unique(rows)) == rows.size


def test_moments_and_distribution():
    x = normal_numpy(range(64), 0, 4096).astype(np.float64)
    n = x.size
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert scipy.stats.kstest(x.ravel()[::4], "norm").pvalue > 1e-3
    pairs = np.stack([x[:, :-1].ravel(), x[:, 1:].ravel()])
    assert abs(np.corrcoef(pairs)[0, 1]) < 4 / math.sqrt(n)
    assert abs(np.corrcoef(x[0], x[1])[0, 1]) < 4 / math.sqrt(4096)  # neighbouring seeds
    y = normal_numpy(range(64), 1, 4096).astype(np.float64)
    assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 4 / math.sqrt(n)  # successive draws


def test_extreme_words_stay_finite():
    x = normal_numpy([5], 0, 2**20)
    assert np.isfinite(x).all() and np.abs(x).max() <= math.sqrt(48 * math.log(2)) + 1e-5  # u is at least 2^-24


def test_from_seeds_is_a_source():
    source = from_seeds([3, 2**64 - 1])
    out = source(4, (2, 3, 5, 5), torch.device("cpu"))
    torch.testing.assert_close(out.flatten(1), normal([3, 2**64 - 1], 4, 75), rtol=0, atol=0)
    with pytest.raises(FastdiffError, match="2 seeds for a batch of 3"):
        source(0, (3, 4), torch.device("cpu"))


@pytest.mark.parametrize(
    "seeds",
    [range(3), (0, 1, 2), np.arange(3), np.arange(3, dtype=np.uint64), torch.arange(3), [0.0, 1.0, 2.0], iter([0, 1, 2])],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_any_whole_numbers_are_seeds(seeds):
    torch.testing.assert_close(normal(seeds, 0, 5), normal([0, 1, 2], 0, 5), rtol=0, atol=0)


@pytest.mark.parametrize(
    "seeds", [[], [-1], [2**64], [1.5], [None], ["a"], ["7 8"], 5, None, [math.nan], [math.inf], torch.tensor([[1, 2]])], ids=repr
)
def test_bad_seeds(seeds):
    with pytest.raises(FastdiffError, match="whole numbers from 0 to 2\\^64 - 1"):
        check_seeds(seeds)


# ---- other sources


def test_from_torch_reproduces_torch_randn():
    source = from_torch(torch.Generator().manual_seed(11))
    found = [source(k, (2, 3, 4, 4), torch.device("cpu")) for k in range(3)]
    g = torch.Generator().manual_seed(11)
    for z in found:
        assert torch.equal(z, torch.randn(2, 3, 4, 4, generator=g))


def test_from_torch_without_a_generator_is_the_global_one():
    torch.manual_seed(4)
    found = from_torch()(0, (2, 3), torch.device("cpu"))
    torch.manual_seed(4)
    assert torch.equal(found, torch.randn(2, 3))


def test_one_generator_a_sample():
    source = from_torch([torch.Generator().manual_seed(s) for s in (1, 2)])
    found = [source(k, (2, 3, 4), torch.device("cpu")) for k in range(2)]
    for i, seed in enumerate((1, 2)):
        g = torch.Generator().manual_seed(seed)  # diffusers' randn_tensor draws (1, ...) from each
        for z in found:
            assert torch.equal(z[i : i + 1], torch.randn(1, 3, 4, generator=g))
    with pytest.raises(FastdiffError, match="2 generators for a batch of 3"):
        source(0, (3, 4), torch.device("cpu"))


def test_recorded():
    noises = [torch.full((2, 3), float(k)) for k in range(2)]
    source = recorded(noises)
    assert torch.equal(source(1, (2, 3), torch.device("cpu")), noises[1])
    with pytest.raises(FastdiffError, match="2 noises were recorded; the plan asks for draw 2"):
        source(2, (2, 3), torch.device("cpu"))


def test_public_names():
    assert fd.noise.from_seeds is from_seeds and fd.noise.from_torch is from_torch and fd.noise.recorded is recorded
