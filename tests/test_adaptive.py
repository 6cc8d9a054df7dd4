"""Adaptive steps: error follows the tolerance, every sample has its own steps, and limits are kept."""

import math
import warnings

import numpy as np
import pytest
import tiny
import torch
from analytic import BIMODAL, GAUSSIAN

import fastdiff as fd
from fastdiff.adaptive import subset
from fastdiff.errors import FastdiffError, NonFiniteError

SCHEDULES = {
    "vp": fd.schedule.vp_cosine(),
    "edm": fd.schedule.edm(),
    "flow": fd.schedule.flow(),
    "zero_snr": fd.schedule.vp_linear().zero_terminal_snr(),
}
SHAPE = (6,)
NOISE = torch.from_numpy(np.random.default_rng(0).standard_normal((5, *SHAPE)))


class Elementwise(fd.Denoiser):
    """The mixture's own denoiser at float and tensor times; it counts the samples it was asked for."""

    def __init__(self, schedule, data=BIMODAL):
        super().__init__(lambda x, t: x, schedule, "x0", shape=SHAPE)
        self.of = data.network(schedule)
        self.asked = 0

    def __call__(self, x, t):
        self.asked += len(x)
        return self.of(x, t)


def endpoint(schedule, data, noise, end):
    """E[x0 | x at the last level] on the exact trajectory: what the last evaluation returns."""
    start = (float(schedule.alpha(schedule.t_max)), float(schedule.sigma(schedule.t_max)))
    return data.denoise(data.flow(noise.ravel() * start[1], start, end), *end).reshape(noise.shape)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_error_falls_with_the_tolerance(schedule):
    s = SCHEDULES[schedule]
    end = (float(s.alpha(s.t_min)), float(s.sigma(s.t_min)))
    for data in (GAUSSIAN, BIMODAL):
        exact = endpoint(s, data, NOISE.numpy(), end)
        found, costs = [], []
        for tol in (1e-1, 1e-2, 1e-3, 1e-4):
            out = fd.sample_adaptive(Elementwise(s, data), NOISE, rtol=tol, atol=tol, max_nfe=3000, dtype=torch.float64)
            assert not bool(out.unfinished.any())
            found.append(float(np.sqrt(np.mean((out.x.numpy() - exact) ** 2))))
            costs.append(float(out.nfe.double().mean()))
        assert all(e <= tol for e, tol in zip(found, (1e-1, 1e-2, 1e-3, 1e-4), strict=True))
        assert found[3] < 0.05 * found[0]
        assert costs == sorted(costs) and costs[3] > 2 * costs[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_sample_has_its_own_steps_and_its_own_bits(schedule):
    s = SCHEDULES[schedule]
    scales = torch.tensor([0.0, 0.1, 1.0, 3.0, 8.0], dtype=torch.float64)[:, None]
    noise = NOISE * scales
    tight = {"rtol": 1e-3, "atol": 1e-3, "dtype": torch.float64}
    together = fd.sample_adaptive(Elementwise(s), noise, **tight)
    assert len(set(together.nfe.tolist())) > 1
    for i in range(5):
        alone = fd.sample_adaptive(Elementwise(s), noise[i : i + 1], **tight)
        assert torch.equal(alone.x[0], together.x[i]) and int(alone.nfe[0]) == int(together.nfe[i])
        for name in ("accepted", "rejected", "unfinished"):
            assert getattr(alone, name).item() == getattr(together, name)[i].item(), name
    back = fd.sample_adaptive(Elementwise(s), noise.flip(0), **tight)
    assert torch.equal(back.x.flip(0), together.x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeds_give_the_same_samples_in_any_batch(dtype):
    s = SCHEDULES["vp"]
    whole = fd.sample_adaptive(Elementwise(s), seeds=range(9), dtype=dtype)
    assert whole.x.dtype == dtype and whole.x.shape == (9, *SHAPE)
    for i in (0, 4, 8):
        assert torch.equal(fd.sample_adaptive(Elementwise(s), seeds=[i], dtype=dtype).x[0], whole.x[i])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nfe_counts_what_each_sample_was_asked_for(schedule):
    den = Elementwise(SCHEDULES[schedule])
    out = fd.sample_adaptive(den, NOISE, solver="dpmpp-23")
    assert int(out.nfe.sum()) == den.asked
    x, nfe = out
    assert x is out.x and nfe.dtype == torch.int64 and out.unfinished.dtype == torch.bool
    outside = 1 + (float(den.schedule.alpha(den.schedule.t_max)) == 0.0)  # at the end, and away from alpha = 0
    assert set(((nfe - outside) % 3).tolist()) == {0}  # three calls a step


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_accepted_and_rejected_steps_are_counted_by_sample(schedule):
    """Three calls each; and the accepted ones are those after which the sample is asked at another log-SNR."""
    s, asked = SCHEDULES[schedule], [[] for _ in NOISE]

    class Watched(Elementwise):
        def __call__(self, x, t):
            if isinstance(t, torch.Tensor):
                for i in range(len(asked)):
                    asked[i].extend(t[self.index == i].tolist())
            return super().__call__(x, t)

        index = torch.arange(len(NOISE))

        def subset(self, index, batch):
            self.index = index
            return self

    den = Watched(s)
    out = fd.sample_adaptive(den, NOISE, solver="dpmpp-23", rtol=1e-4, atol=1e-4, dtype=torch.float64)
    assert out.accepted.dtype == out.rejected.dtype == torch.int64 and len(set(out.accepted.tolist())) > 1
    outside = 1 + (float(s.alpha(s.t_max)) == 0.0)
    assert torch.equal(out.nfe, 3 * (out.accepted + out.rejected) + outside)
    assert int(out.rejected.min()) > 0, "first steps this long are refused at this tolerance"
    for times, accepted in zip(asked, out.accepted.tolist(), strict=True):
        starts = times[: len(times) - 1 : 3]  # the first evaluation of every attempt; the last of all is the prediction
        assert len(set(starts)) == accepted, "an attempt after a rejected one starts from the same place"


def test_a_unet_in_a_batch_takes_the_steps_it_takes_alone(tmp_path):
    """Within rounding, which convolutions do differently at another batch size. In float64: this network of drawn weights is
    rough in t, and float32's rounding, which moves the step sizes too, was seen to move a pixel by 3e-3."""
    den = fd.load(tiny.checkpoint(tmp_path / "a.safetensors")).to(dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    options = {"rtol": 0.3, "atol": 0.3, "dtype": torch.float64}
    whole = fd.sample_adaptive(den.bind(class_labels=labels), seeds=[0, 1, 2], **options)
    for i in range(3):
        alone = fd.sample_adaptive(den.bind(class_labels=labels[i : i + 1]), seeds=[i], **options)
        torch.testing.assert_close(alone.x[0], whole.x[i], rtol=0, atol=1e-5)
        assert int(alone.accepted[0]) == int(whole.accepted[i]) and int(alone.nfe[0]) == int(whole.nfe[i])
    assert len(set(whole.nfe.tolist())) > 1, "they leave the batch one by one"


@pytest.mark.parametrize("max_nfe", [5, 6, 7, 10, 23])
@pytest.mark.parametrize("schedule", ["vp", "flow"])
def test_max_nfe_is_never_passed_and_is_flagged(schedule, max_nfe):
    den = Elementwise(SCHEDULES[schedule])
    with pytest.warns(UserWarning, match=rf"5 of 5 samples reached max_nfe = {max_nfe}"):
        out = fd.sample_adaptive(den, NOISE, rtol=1e-6, atol=1e-6, max_nfe=max_nfe)
    assert bool(out.unfinished.all()) and int(out.nfe.max()) <= max_nfe
    assert bool(out.x.isfinite().all()) and float(out.x.abs().max()) < 3  # a prediction, not a noisy state


def test_only_the_unfinished_are_flagged():
    den = Elementwise(SCHEDULES["vp"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        costs = fd.sample_adaptive(den, NOISE * torch.tensor([0.0, 0, 1, 3, 8])[:, None]).nfe
    limit = int(costs.max()) - 1
    with pytest.warns(UserWarning, match="reached max_nfe"):
        out = fd.sample_adaptive(den, NOISE * torch.tensor([0.0, 0, 1, 3, 8])[:, None], max_nfe=limit)
    assert torch.equal(out.unfinished, costs > limit)


def test_the_result_is_the_denoised_last_level():
    """One sample of Gaussian data in closed form, at a tight tolerance."""
    s = fd.schedule.vp_cosine(logsnr_min=-4.0, logsnr_max=8.0)
    end = (float(s.alpha(s.t_min)), float(s.sigma(s.t_min)))
    out = fd.sample_adaptive(Elementwise(s, GAUSSIAN), NOISE, rtol=1e-7, atol=1e-7, max_nfe=5000, dtype=torch.float64)
    np.testing.assert_allclose(out.x.numpy(), endpoint(s, GAUSSIAN, NOISE.numpy(), end), rtol=0, atol=1e-6)


def test_full_noise_start_is_one_exact_first_order_step():
    s, asked = SCHEDULES["flow"], []
    den = Elementwise(s)

    class Watched(Elementwise):
        def __call__(self, x, t):
            asked.append(t)
            return den(x, t)

    fd.sample_adaptive(Watched(s), NOISE)
    assert asked[0] == 1.0 and isinstance(asked[1], torch.Tensor)
    lam = -math.log(float(s.sigma(asked[1][0]) / s.alpha(asked[1][0])))
    assert lam == pytest.approx(fd.grid.LAM_START, abs=1e-9)


# ---- conditioning


def network(x, t, class_labels, bias=0.0):
    assert len(class_labels) == len(x)
    return torch.tanh(x + class_labels.view(-1, 1)) + bias


def test_bound_labels_follow_their_samples():
    s, labels = SCHEDULES["vp"], torch.tensor([0.0, 3.0, -2.0, 1.0, 0.5], dtype=torch.float64)
    den = fd.Denoiser(network, s, "x0", shape=SHAPE).bind(class_labels=labels, bias=0.1)
    whole = fd.sample_adaptive(den, NOISE, dtype=torch.float64)
    assert len(set(whole.nfe.tolist())) > 1  # some leave early: the rest must keep their own labels
    for i in range(5):
        alone = fd.sample_adaptive(den.bind(class_labels=labels[i : i + 1]), NOISE[i : i + 1], dtype=torch.float64)
        torch.testing.assert_close(alone.x[0], whole.x[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.3, 3.0)], ids=str)
def test_guided_labels_follow_their_samples(interval):
    s, labels = SCHEDULES["vp"], torch.tensor([0.0, 3.0, -2.0, 1.0, 0.5], dtype=torch.float64)

    def guided(rows):
        den = fd.Denoiser(network, s, "x0", shape=SHAPE)
        cond, negative = {"class_labels": labels[rows]}, {"class_labels": torch.full_like(labels[rows], 0.2)}
        return fd.guide.cfg(den, 2.0, cond, negative, interval=interval)

    whole = fd.sample_adaptive(guided(slice(None)), NOISE, dtype=torch.float64)
    assert len(set(whole.nfe.tolist())) > 1
    for i in range(5):
        alone = fd.sample_adaptive(guided(slice(i, i + 1)), NOISE[i : i + 1], dtype=torch.float64)
        torch.testing.assert_close(alone.x[0], whole.x[i], rtol=0, atol=1e-12)


def test_subset_cuts_only_what_belongs_to_samples():
    table, labels = torch.zeros(7, 2), torch.arange(3)
    den = fd.Denoiser(network, SCHEDULES["vp"], "x0").bind(class_labels=labels, table=table, scale=torch.tensor(2.0), text="a")
    cut = subset(den, torch.tensor([2, 0]), 3)
    assert cut.cond["class_labels"].tolist() == [2, 0] and cut.cond["table"] is table and cut.cond["text"] == "a"
    assert subset(den, torch.arange(3), 3) is den and den.cond["class_labels"] is labels


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0.0}, "rtol and atol must be positive"),
        ({"rtol": -1e-2}, "rtol and atol must be positive"),
        ({"rtol": math.nan}, "rtol and atol must be positive"),
        ({"atol": 0.0}, "rtol and atol must be positive"),
        ({"max_nfe": 2}, "max_nfe must be at least 3"),
        ({"max_nfe": 4, "solver": "dpmpp-23"}, "max_nfe must be at least 5"),
        ({"noise": None}, "nothing to start from"),
        ({"start": NOISE}, "not both"),
        ({"seeds": [1, 2]}, "2 seeds for a batch of 5"),
        ({"noise": torch.zeros(2, 7)}, "is wanted"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(FastdiffError, match=message):
        fd.sample_adaptive(Elementwise(SCHEDULES["vp"]), **{"noise": NOISE, **options})


@pytest.mark.parametrize("schedule", ["vp", "flow"])
def test_a_bad_prediction_is_an_error(schedule):
    den = fd.Denoiser(lambda x, t: x * math.nan, SCHEDULES[schedule], "x0", shape=SHAPE)
    with pytest.raises(NonFiniteError, match="NaN or infinity at log-SNR"):
        fd.sample_adaptive(den, NOISE)


def test_eps_networks_cannot_start_at_full_noise():
    den = fd.Denoiser(lambda x, t: x, SCHEDULES["flow"], "eps", shape=SHAPE)
    with pytest.raises(FastdiffError, match="does not determine x0"):
        fd.sample_adaptive(den, NOISE)
