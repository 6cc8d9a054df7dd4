"""Guidance: the formula, and exactly the network calls that it needs."""

import math

import pytest
import torch

import fastdiff as fd
from fastdiff.errors import FastdiffError

SCHEDULE = fd.schedule.vp_cosine()
X = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Network:
    """x0 = tanh(x) + label/10, elementwise; it counts its calls and notes the labels."""

    null_label = 9

    def __init__(self):
        self.labels = []

    def __call__(self, x, t, class_labels=None, text=0.0):
        self.labels.append(class_labels)
        return torch.tanh(x) * (1 + text) + class_labels.view(-1, 1, 1, 1) / 10


def labels(*values):
    return torch.tensor(values or (0, 1, 2, 3), dtype=torch.float64)


def guided(scale, **options):
    network = Network()
    den = fd.Denoiser(network, SCHEDULE, "x0").bind(class_labels=labels())
    return fd.guide.cfg(den, scale, **options), network


def positive_and_negative():
    return torch.tanh(X) + labels().view(-1, 1, 1, 1) / 10, torch.tanh(X) + 0.9


TIMES = [0.5, torch.full((4,), 0.5)]


@pytest.mark.parametrize("t", TIMES, ids=["float", "tensor"])
@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
def test_formula(scale, t):
    g, network = guided(scale)
    d, n = positive_and_negative()
    torch.testing.assert_close(g(X, t), n + scale * (d - n), rtol=1e-12, atol=1e-12)
    assert len(network.labels) == g.calls == g.calls_at(0.5) == 2


@pytest.mark.parametrize("t", TIMES, ids=["float", "tensor"])
@pytest.mark.parametrize(("scale", "which"), [(1.0, 0), (0.0, 1)])
def test_a_network_times_zero_is_not_called(scale, which, t):
    g, network = guided(scale)
    torch.testing.assert_close(g(X, t), positive_and_negative()[which], rtol=0, atol=0)
    assert len(network.labels) == g.calls == g.calls_at(0.5) == 1


def test_the_null_class_is_the_default_negative():
    g, network = guided(3.0)
    g(X, 0.5)
    assert [v.tolist() for v in network.labels] == [[0, 1, 2, 3], [9, 9, 9, 9]]


def test_given_conditions():
    network = Network()
    den = fd.Denoiser(network, SCHEDULE, "x0")
    g = fd.guide.cfg(den, 2.0, cond={"class_labels": labels(1, 1, 1, 1)}, negative={"class_labels": labels(5, 5, 5, 5)})
    g(X, 0.5)
    assert [v.tolist() for v in network.labels] == [[1] * 4, [5] * 4]
    assert "class_labels" not in den.cond


@pytest.mark.parametrize("interval", [(0.3, 2.0), (0.0, 2.0), (0.3, math.inf)], ids=str)
def test_interval_is_half_open_in_sigma_over_alpha(interval):
    g, network = guided(4.0, interval=interval)
    d, n = positive_and_negative()
    low, high = interval
    ratios = [0.1, 0.29, 0.31, 1.0, 1.99, 2.01, 50.0]
    times = [SCHEDULE.t_of_lam(-math.log(u)) for u in ratios]
    outs = []
    for u, t in zip(ratios, times, strict=True):
        network.labels.clear()
        inside = low < u <= high
        outs.append(g(X, t))
        torch.testing.assert_close(outs[-1], n + 4 * (d - n) if inside else d, rtol=1e-12, atol=1e-12)
        assert len(network.labels) == g.calls_at(t) == 1 + inside
    mixed = g(X, torch.tensor([times[0], times[3], times[4], times[6]], dtype=torch.float64))
    for i, k in enumerate((0, 3, 4, 6)):  # each sample by its own level
        torch.testing.assert_close(mixed[i], outs[k][i], rtol=0, atol=1e-15)


def test_interval_ends():
    flow = fd.schedule.flow()
    den = fd.Denoiser(Network(), flow, "x0").bind(class_labels=labels())
    g = fd.guide.cfg(den, 2.0, interval=(0.25, 1.0))
    assert [g.calls_at(t) for t in (0.2, 0.2000001, 0.5, 0.5000001, 1.0)] == [1, 2, 2, 1, 1]
    assert fd.guide.cfg(den, 2.0, interval=(0.25, math.inf)).calls_at(1.0) == 2  # alpha = 0 lies in an open interval


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_is_lin_et_al(rescale):
    g, _ = guided(5.0, rescale=rescale)
    d, n = positive_and_negative()
    out = n + 5 * (d - n)
    scaled = out * (d.flatten(1).std(1) / out.flatten(1).std(1)).view(-1, 1, 1, 1)  # eq. 15-16, per sample
    torch.testing.assert_close(g(X, 0.5), rescale * scaled + (1 - rescale) * out, rtol=1e-12, atol=1e-12)


def test_sampling_counts_two_calls_where_guidance_acts():
    for options, scale in (({}, 3.0), ({"interval": (0.2, 5.0)}, 3.0), ({}, 1.0)):
        g, network = guided(scale, **options)
        plan = fd.plan("unipc-2", g, 8)
        fd.sample(g, plan, X, dtype=torch.float64)
        assert len(network.labels) == sum(g.calls_at(row.t) for row in plan.rows)
        assert len(network.labels) == {3.0: 16, 1.0: 8}[scale] or options


def test_a_guided_denoiser_is_a_denoiser():
    g, _ = guided(3.0)
    g.positive.plan = fd.plan("ddim", SCHEDULE, 2)
    assert isinstance(g, fd.Denoiser) and g.schedule is SCHEDULE and g.plan is None
    assert fd.guide.cfg(g.positive, 2.0).plan is None


def test_bind_reaches_both_sides_but_not_what_they_differ_in():
    g, _ = guided(2.0)
    text = g.bind(text=1.0)
    d, n = (torch.tanh(X) * 2 + v for v in (labels().view(-1, 1, 1, 1) / 10, 0.9))
    torch.testing.assert_close(text(X, 0.5), n + 2 * (d - n), rtol=1e-12, atol=1e-12)
    with pytest.raises(FastdiffError, match="contrasts class_labels"):
        g.bind(class_labels=labels(5, 6, 7, 8))


@pytest.mark.parametrize(
    "options",
    [{"scale": -1.0}, {"scale": math.nan}, {"scale": math.inf}, {"scale": 2.0, "rescale": 1.5}, {"scale": 2.0, "rescale": -0.1},
     {"scale": 2.0, "rescale": math.nan}, {"scale": 2.0, "interval": (2.0, 1.0)}, {"scale": 2.0, "interval": (1.0, 1.0)}],
    ids=str,
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(FastdiffError, match="guidance needs scale >= 0"):
        guided(**options)


def test_a_missing_negative_is_named():
    den = fd.Denoiser(lambda x, t, **c: x, SCHEDULE, "x0")
    for wrong in (den, den.bind(class_labels=labels()), fd.Denoiser(Network(), SCHEDULE, "x0")):
        with pytest.raises(FastdiffError, match="needs negative="):
            fd.guide.cfg(wrong, 2.0)
