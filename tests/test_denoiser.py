"""Every prediction type at the one border: a network that is exactly right gives D = x0, whatever it predicts."""

import math
from types import SimpleNamespace

import pytest
import torch

import fastdiff as fd
from fastdiff import prediction as pred
from fastdiff.errors import FastdiffError

SHAPE = (3, 4, 4)
SCHEDULES = {
    "vp": fd.schedule.vp_cosine(),
    "discrete": fd.schedule.vp_from_alphas_cumprod([0.9, 0.7, 0.5, 0.2, 0.05]),
    "flow": fd.schedule.flow(),
    "edm": fd.schedule.edm(sigma_data=0.7),
    "sub_vp": fd.schedule.sub_vp(),
}
G = torch.Generator().manual_seed(0)
X0, EPS = (torch.randn(3, *SHAPE, generator=G, dtype=torch.float64) for _ in range(2))


def closed_form(prediction, x0, eps, alpha, sigma, sigma_data):
    """What a perfect network returns, from the definitions: in EDM's case those of Karras et al. on x/alpha, u = sigma/alpha."""
    if prediction == "edm":
        u = sigma / alpha
        skip, out = sigma_data**2 / (u**2 + sigma_data**2), u * sigma_data / (u**2 + sigma_data**2) ** 0.5
        return (x0 - skip * (x0 + u * eps)) / out
    v = alpha * eps - sigma * x0
    return {"eps": eps, "x0": x0, "v": v, "both": v, "flow": eps - x0, "score": -eps / sigma}[prediction]


def input_scale(prediction, alpha, sigma, sigma_data):
    return 1 / (alpha * ((sigma / alpha) ** 2 + sigma_data**2) ** 0.5) if prediction == "edm" else 1.0


def column(values):
    return torch.as_tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", pred.PREDICTIONS)
@pytest.mark.parametrize("fractions", [0.1, 0.5, 0.93, (0.2, 0.6, 0.9)], ids=str)
def test_a_perfect_network_gives_x0(prediction, schedule, fractions):
    s = SCHEDULES[schedule]
    scale = float(getattr(s, "sigma_data", 0.5))
    span = s.t_max - s.t_min
    t = s.t_min + span * (torch.tensor(fractions, dtype=torch.float64) if isinstance(fractions, tuple) else fractions)
    alpha, sigma = column(s.alpha(t)), column(s.sigma(t))
    x = alpha * X0 + sigma * EPS
    seen = []

    def network(y, c_noise):
        seen.append((y, c_noise))
        return torch.cat([X0, EPS], 1) if prediction == "both" else closed_form(prediction, X0, EPS, alpha, sigma, scale)

    d = fd.Denoiser(network, s, prediction)(x, t)
    assert d.dtype == torch.float64 and d.shape == x.shape
    torch.testing.assert_close(d, X0, rtol=0, atol=3e-12 * max(1.0, float((sigma / alpha).max())))
    (y, c_noise), = seen  # fmt: skip
    torch.testing.assert_close(y, x * input_scale(prediction, alpha, sigma, scale), rtol=1e-13, atol=0)
    assert c_noise.shape == (3,) and c_noise.dtype == torch.float32
    told = torch.log(sigma / alpha).flatten() / 4 if prediction == "edm" else torch.as_tensor(t)
    torch.testing.assert_close(c_noise, told.expand(3).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prediction", pred.PREDICTIONS)
def test_target_is_what_the_definition_says(prediction):
    for alpha, sigma in ((0.6, 0.8), (1.0, 3.0), (0.3, 0.7)):
        ours = pred.target(prediction, X0, EPS, alpha, sigma, 0.7)
        torch.testing.assert_close(ours, closed_form(prediction, X0, EPS, alpha, sigma, 0.7), rtol=1e-12, atol=1e-12)
        c = pred.coefficients(prediction, alpha, sigma, 0.7)
        torch.testing.assert_close(c.c_skip * (alpha * X0 + sigma * EPS) + c.c_out * ours, X0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [fd.schedule.vp_cosine(), fd.schedule.flow(), fd.schedule.ve()], ids=lambda s: s.name)
def test_both_heads_are_the_papers_combination(schedule):
    """Heads that contradict each other: (sigma^2 x0 + alpha^2 (x - sigma eps)/alpha) over alpha^2 + sigma^2 (Salimans and Ho
    2022, section 4), for one time and for one a sample; at full noise the x0 head alone."""
    s, f = schedule, torch.cat([2 * X0 - 1, EPS + 0.3], 1)
    den = fd.Denoiser(lambda y, c: f, s, "both")
    for t in (0.4 * s.t_max, torch.tensor([0.2, 0.4, 0.7], dtype=torch.float64) * s.t_max):
        alpha, sigma = (column(f(torch.as_tensor(t, dtype=torch.float64))) for f in (s.alpha, s.sigma))
        by_eps = (X0 - sigma * f[:, X0.shape[1] :]) / alpha
        want = (sigma**2 * f[:, : X0.shape[1]] + alpha**2 * by_eps) / (alpha**2 + sigma**2)
        torch.testing.assert_close(den(X0, t), want, rtol=1e-10, atol=1e-10)
    if float(s.alpha(s.t_max)) == 0.0:
        torch.testing.assert_close(den(X0, s.t_max), f[:, : X0.shape[1]], rtol=0, atol=1e-12)
    with pytest.raises(FastdiffError, match="x0 and then eps"):
        fd.Denoiser(lambda y, c: y, s, "both")(X0, 0.4 * s.t_max)


@pytest.mark.parametrize("prediction", ["v", "flow", "x0"])
def test_full_noise_and_clean_data_are_finite(prediction):
    s = fd.schedule.flow()
    for t in (1.0, 0.0, torch.tensor([1.0, 0.0, 1.0])):
        alpha, sigma = column(s.alpha(torch.as_tensor(t).double())), column(s.sigma(torch.as_tensor(t).double()))
        den = fd.Denoiser(lambda y, c, a=alpha, s=sigma: closed_form(prediction, X0, EPS, a, s, 0.5), s, prediction)
        torch.testing.assert_close(den(alpha * X0 + sigma * EPS, t), X0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "score"])
@pytest.mark.parametrize("schedule", [fd.schedule.flow(), fd.schedule.vp_linear().zero_terminal_snr()], ids=lambda s: s.name)
def test_eps_says_nothing_at_full_noise(prediction, schedule):
    den = fd.Denoiser(lambda x, t: x, schedule, prediction)
    with pytest.raises(FastdiffError, match="does not determine x0 at alpha = 0"):
        den(X0, schedule.t_max)
    assert bool(den(X0, schedule.t_max / 2).isfinite().all())


def test_edm_needs_a_time_where_the_log_snr_is_infinite():
    with pytest.raises(FastdiffError, match="give time="):
        fd.Denoiser(lambda x, t: x, fd.schedule.flow(), "edm")(X0, 1.0)
    assert bool(fd.Denoiser(lambda x, t: x, fd.schedule.flow(), "edm", time=lambda t: 1 - t)(X0, 1.0).isfinite().all())


@pytest.mark.parametrize("t", [0.25, torch.tensor([0.25, 0.5, 0.75])], ids=["float", "tensor"])
def test_time_is_mapped(t):
    seen = []
    den = fd.Denoiser(lambda x, c: seen.append(c) or x, fd.schedule.flow(), "flow", time=lambda t: 1000 * (1 - t))
    den(X0, t)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], (1000 * (1 - torch.as_tensor(t))).expand(3).float())


def test_float_and_tensor_times_agree():
    for name, s in SCHEDULES.items():
        den = fd.Denoiser(lambda x, c: torch.tanh(x) + c.view(-1, 1, 1, 1), s, "v")
        t = 0.3 * s.t_max + 0.7 * s.t_min
        batched = den(X0, torch.full((3,), t, dtype=torch.float64))
        torch.testing.assert_close(den(X0, t), batched, rtol=1e-12, atol=1e-12, msg=name)


# ---- what networks return


RIGHT = X0 * 2


@pytest.mark.parametrize(
    "returned",
    [RIGHT, (RIGHT, X0), [RIGHT], {"sample": RIGHT, "other": X0}, {"prediction": RIGHT}, SimpleNamespace(sample=RIGHT),
     torch.cat([RIGHT, X0], dim=1), (torch.cat([RIGHT, X0], dim=1),)],
    ids=["tensor", "tuple", "list", "dict", "dict without sample", "object", "learned variance", "tuple with variance"],
)  # fmt: skip
def test_the_prediction_is_found(returned):
    assert torch.equal(fd.Denoiser(lambda x, t: returned, SCHEDULES["vp"], "x0")(X0, 0.5), RIGHT)


def test_output_picks():
    den = fd.Denoiser(lambda x, t: {"a": X0, "b": RIGHT}, SCHEDULES["vp"], "x0", output=lambda out: out["b"])
    assert torch.equal(den(X0, 0.5), RIGHT)


@pytest.mark.parametrize("returned", [None, (), {}, 3.0, SimpleNamespace(x=X0), [None]], ids=repr)
def test_no_tensor_is_an_error(returned):
    with pytest.raises(FastdiffError, match="pass output="):
        fd.Denoiser(lambda x, t: returned, SCHEDULES["vp"], "x0")(X0, 0.5)


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (3, 6, 4), (1, 3, 4, 4), (3, 3, 4, 5)])
def test_another_shape_is_an_error(shape):
    with pytest.raises(FastdiffError, match=r"returned shape .* for an input of \(3, 3, 4, 4\)"):
        fd.Denoiser(lambda x, t: torch.zeros(shape), SCHEDULES["vp"], "eps")(X0, 0.5)


# ---- conditioning, dtype, images


def test_bind_passes_by_name_and_copies():
    seen = []
    den = fd.Denoiser(lambda x, t, **cond: seen.append(cond) or x, SCHEDULES["vp"], "x0")
    one = den.bind(class_labels=1)
    two = one.bind(text="b").bind(class_labels=2)
    for d in (den, one, two):
        d(X0, 0.5)
    assert seen == [{}, {"class_labels": 1}, {"class_labels": 2, "text": "b"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_network_gets_its_own_dtype_and_the_state_keeps_its(dtype):
    network = torch.nn.Conv2d(3, 3, 1).to(dtype)
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = network

        def forward(self, x, t):
            seen.append((x.dtype, t.dtype))
            return self.conv(x)

    den = fd.Denoiser(Net(), SCHEDULES["vp"], "v")
    with torch.no_grad():
        for t in (0.5, torch.full((3,), 0.5)):
            for state in (torch.float32, torch.float64):
                assert den(X0.to(state), t).dtype == state
    assert set(seen) == {(dtype, torch.float32)} and den.dtype == dtype
    assert den.to(dtype=torch.float32).dtype == torch.float32 and den.device == torch.device("cpu")


def test_a_callable_without_parameters_gets_the_states_dtype():
    seen = []
    den = fd.Denoiser(lambda x, t: seen.append(x.dtype) or x, SCHEDULES["vp"], "x0")
    den(X0, 0.5), den(X0.float(), 0.5)
    assert seen == [torch.float64, torch.float32] and den.dtype is None


@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)])
def test_images_map_the_data_range_to_unit(data_range):
    low, high = data_range
    den = fd.Denoiser(lambda x, t: x, SCHEDULES["vp"], "x0", data_range=data_range)
    x = torch.tensor([low - 5, low, (low + high) / 2, high, high + 5], dtype=torch.float64)
    out = den.images(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"prediction": "epsilon"}, "eps, x0, v, flow, score, edm"), ({"data_range": (1.0, -1.0)}, "lowest, highest"),
     ({"data_range": (0.0, 0.0)}, "lowest, highest")],
)  # fmt: skip
def test_mistakes_are_named(fields, message):
    with pytest.raises(FastdiffError, match=message):
        fd.Denoiser(lambda x, t: x, SCHEDULES["vp"], **fields)


def test_unknown_predictions():
    for call in (pred.coefficients, lambda name, *levels: pred.target(name, X0, EPS, *levels)):
        with pytest.raises(FastdiffError, match="unknown prediction 'epsilon'"):
            call("epsilon", 0.6, 0.8)


def test_edm_default_data_scale_is_the_schedules():
    assert fd.Denoiser(lambda x, t: x, SCHEDULES["edm"], "edm").sigma_data == 0.7
    assert fd.Denoiser(lambda x, t: x, SCHEDULES["vp"], "edm").sigma_data == 0.5
    s = fd.schedule.edm(sigma_min=0.01, sigma_max=10.0)
    out = fd.Denoiser(lambda x, c: torch.zeros_like(x), s, "edm")(X0, 2.0)
    torch.testing.assert_close(out, X0 * (0.25 / (4 + 0.25)), rtol=1e-13, atol=0)
    assert math.isclose(pred.coefficients("edm", 1.0, 2.0).c_out, 2 * 0.5 / math.sqrt(4.25))
