"""Every noise schedule against its closed form, on numpy and torch, there and back."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from fastdiff import schedule as sch
from fastdiff.errors import FastdiffError

LINEAR_BETAS = np.linspace(1e-4, 0.02, 1000)
TABLE = np.cumprod(1 - LINEAR_BETAS)
VP = {
    "vp_linear": sch.vp_linear(),
    "vp_scaled_linear": sch.vp_scaled_linear(),
    "vp_cosine": sch.vp_cosine(),
    "vp_sigmoid": sch.vp_sigmoid(),
    "vp_sigmoid_sharp": sch.vp_sigmoid(start=0.0, end=3.0, tau=0.7),
    "trigflow": sch.trigflow(),
    "discrete": sch.vp_from_alphas_cumprod(TABLE),
    "discrete_zero_snr": sch.vp_from_alphas_cumprod(TABLE).zero_terminal_snr(),
    "shifted_cosine": sch.vp_cosine().shifted(3.0),
    "shifted_discrete": sch.vp_from_alphas_cumprod(TABLE).shifted(2.0),
    "zero_snr_linear": sch.vp_linear().zero_terminal_snr(),
    "zero_snr_scaled_linear": sch.vp_scaled_linear().zero_terminal_snr(),
}
ALL = {
    **VP,
    "sub_vp": sch.sub_vp(),
    "ve": sch.ve(),
    "edm": sch.edm(),
    "flow": sch.flow(),
    "flow_shift": sch.flow(shift=3.0),
    "shifted_flow": sch.flow().shifted(3.0),
    "shifted_ve": sch.ve().shifted(2.0),
}
every = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)


def times(schedule, n=401):
    return np.linspace(schedule.t_min, schedule.t_max, n)


@pytest.mark.parametrize("schedule", VP.values(), ids=VP)
def test_variance_is_preserved(schedule):
    t = times(schedule)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=0, atol=1e-12)


@every
def test_log_snr_falls_strictly(schedule):
    lam = schedule.lam(times(schedule))
    assert np.all(np.diff(lam) < 0)
    assert np.isfinite(lam[:-1]).all()


@every
def test_lam_is_the_log_ratio(schedule):
    t = times(schedule)[1:-1]
    np.testing.assert_allclose(schedule.lam(t), np.log(schedule.alpha(t) / schedule.sigma(t)), rtol=0, atol=1e-12)


@every
def test_time_of_log_snr_inverts(schedule):
    t = times(schedule)[:-1]  # lam is -inf at the last time of some
    back = schedule.t_of_lam(schedule.lam(t))
    np.testing.assert_allclose(back, t, rtol=0, atol=1e-9 * schedule.t_max)
    bisected = sch.NoiseSchedule.t_of_lam(schedule, schedule.lam(t))
    np.testing.assert_allclose(back, bisected, rtol=0, atol=1e-9 * schedule.t_max)
    one = schedule.t_of_lam(float(schedule.lam(t[100])))
    assert isinstance(one, float) and abs(one - t[100]) < 1e-9 * schedule.t_max
    torch.testing.assert_close(schedule.t_of_lam(torch.from_numpy(schedule.lam(t))), torch.from_numpy(back), rtol=0,
                               atol=1e-10 * schedule.t_max)  # fmt: skip


@every
def test_torch_and_numpy_agree(schedule):
    t = times(schedule)
    for of in (schedule.alpha, schedule.sigma):
        out = of(torch.from_numpy(t))
        assert out.dtype == torch.float64
        torch.testing.assert_close(out, torch.from_numpy(np.asarray(of(t))), rtol=1e-12, atol=1e-14)
    assert float(schedule.alpha(float(t[7]))) == pytest.approx(schedule.alpha(t)[7], rel=1e-14)
    assert bool((schedule.alpha(torch.from_numpy(t)) >= 0).all())


@every
def test_config_round_trip(schedule):
    text = json.dumps(schedule.config(), allow_nan=False)
    again = sch.from_config(json.loads(text))
    assert again == schedule and hash(again) == hash(schedule) and type(again) is type(schedule)
    np.testing.assert_array_equal(again.alpha(times(again)), schedule.alpha(times(schedule)))


@every
def test_uniform_time_runs_from_least_to_most_noise(schedule):
    u = np.linspace(0, 1, 101)
    t = schedule.time_of_uniform(u)
    assert np.all(np.diff(t) > 0) and t[-1] == pytest.approx(schedule.t_max, rel=1e-14) and t[0] <= schedule.t_min


def test_linear_and_scaled_linear_integrate_their_beta():
    for schedule, beta in (
        (sch.vp_linear(0.2, 15.0), lambda t: 0.2 + t * 14.8),
        (sch.vp_scaled_linear(0.5, 10.0), lambda t: (0.5**0.5 + t * (10.0**0.5 - 0.5**0.5)) ** 2),
    ):
        for t in (0.01, 0.3, 1.0):
            assert schedule.alpha(t) == pytest.approx(math.exp(-0.5 * quad(beta, 0, t, epsabs=1e-13)[0]), rel=1e-12)


def test_linear_is_the_limit_of_ddpm_betas():
    i = np.array([99, 499, 899])
    np.testing.assert_allclose(sch.vp_linear().alpha((i + 1) / 1000) ** 2, TABLE[i], rtol=0, atol=3e-3)


def test_small_times_keep_their_digits():
    t = 1e-9  # sqrt(1 - alpha^2) would be 0 or wrong in the 8th digit
    assert sch.vp_linear().sigma(t) == pytest.approx(math.sqrt(0.1 * t), rel=1e-7)
    assert sch.vp_cosine().sigma(t) == pytest.approx(
        math.sqrt(2 * math.tan(math.pi / 2 * 0.008 / 1.008) * math.pi / 2 / 1.008 * t), rel=1e-6
    )


@pytest.mark.parametrize("s", [0.0, 0.008, 0.1])
def test_cosine_is_nichol_and_dhariwal(s):
    schedule, t = sch.vp_cosine(s=s, logsnr_min=-12.0, logsnr_max=14.0), np.linspace(0.01, 0.99, 99)

    def f(t):
        return np.cos((t + s) / (1 + s) * np.pi / 2) ** 2

    np.testing.assert_allclose(schedule.alpha(t) ** 2, f(t) / f(0.0), rtol=1e-13)
    assert schedule.lam(schedule.t_min) == pytest.approx(7.0, abs=1e-9)
    assert schedule.lam(schedule.t_max) == pytest.approx(-6.0, abs=1e-9)


def test_sigmoid_is_jabri_et_al():
    start, end, tau = -3.0, 3.0, 0.9
    schedule, t = sch.vp_sigmoid(start, end, tau), np.linspace(0.01, 0.99, 99)

    def logistic(v):
        return 1 / (1 + np.exp(-v))

    v0, v1 = logistic(start / tau), logistic(end / tau)
    expected = (v1 - logistic((t * (end - start) + start) / tau)) / (v1 - v0)
    np.testing.assert_allclose(schedule.alpha(t) ** 2, expected, rtol=1e-12)


def test_sub_vp_ve_edm_flow_and_trigflow_levels():
    t = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(sch.sub_vp().sigma(t), 1 - sch.vp_linear().alpha(t) ** 2, rtol=1e-13)
    np.testing.assert_array_equal(sch.sub_vp().alpha(t), sch.vp_linear().alpha(t))
    for schedule in (sch.ve(), sch.edm()):
        np.testing.assert_array_equal(schedule.sigma(t), t)
        np.testing.assert_array_equal(schedule.alpha(t), np.ones_like(t))
    np.testing.assert_array_equal(sch.flow().alpha(t), 1 - t)
    np.testing.assert_array_equal(sch.flow(shift=3.0).sigma(t), t)
    np.testing.assert_array_equal(sch.trigflow().sigma(t), np.sin(t))
    assert (sch.ve(0.1, 10.0).t_min, sch.ve(0.1, 10.0).t_max) == (0.1, 10.0)
    u = np.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(sch.ve(0.1, 10.0).time_of_uniform(u), [0.1, 1.0, 10.0], rtol=1e-14)
    np.testing.assert_allclose(sch.flow(shift=3.0).time_of_uniform(u), [0.0, 0.75, 1.0], rtol=1e-14)


@pytest.mark.parametrize("table", [TABLE, TABLE.astype(np.float32), torch.from_numpy(TABLE), TABLE.tolist()], ids=type)
def test_discrete_times_are_hit_exactly(table):
    schedule = sch.vp_from_alphas_cumprod(table)
    exact = np.sqrt(np.asarray(table, np.float64))
    np.testing.assert_array_equal(schedule.alpha(np.arange(1000)), exact)
    np.testing.assert_allclose(schedule.alpha(torch.arange(1000)).numpy(), exact, rtol=3e-16)  # torch's sqrt is off by an ulp
    assert schedule.t_max == 999.0 and schedule.t_min == 0.0


def test_discrete_times_interpolate_the_log_snr():
    schedule = sch.vp_from_alphas_cumprod(TABLE)
    lam = 0.5 * np.log(TABLE / (1 - TABLE))
    for i, f in ((0, 0.25), (500, 0.5), (998, 0.9)):
        assert schedule.lam(i + f) == pytest.approx((1 - f) * lam[i] + f * lam[i + 1], abs=1e-12)


@pytest.mark.parametrize("name", [name for name in VP if "zero_snr" in name])
def test_zero_terminal_snr_reaches_zero(name):
    schedule = VP[name]
    base = {"discrete_zero_snr": VP["discrete"]}.get(name) or sch.from_config(schedule.base)
    assert schedule.alpha(schedule.t_max) == 0.0 and schedule.sigma(schedule.t_max) == 1.0
    assert schedule.lam(schedule.t_max) == -math.inf
    assert float(schedule.alpha(schedule.t_min)) == pytest.approx(float(base.alpha(base.t_min)), rel=1e-14)
    assert 0 <= float(schedule.alpha(torch.tensor(schedule.t_max, dtype=torch.float64))) < 1e-15
    t = (schedule.t_min + schedule.t_max) // 2 if "discrete" in name else 0.4  # Lin et al. 2023, algorithm 1
    first, last = float(base.alpha(base.t_min)), float(base.alpha(base.t_max))
    assert float(schedule.alpha(t)) == pytest.approx((float(base.alpha(t)) - last) * first / (first - last), rel=1e-12)


def test_zero_terminal_snr_of_a_table_in_its_last_interval():
    schedule = VP["discrete_zero_snr"]
    assert float(schedule.alpha(998.25)) == pytest.approx(0.75 * float(schedule.alpha(998.0)), rel=1e-12)


@pytest.mark.parametrize("name", ["shifted_cosine", "shifted_discrete", "shifted_flow", "shifted_ve"])
def test_shift_multiplies_sigma_over_alpha(name):
    schedule = ALL[name]
    base = sch.from_config(schedule.base)
    t = times(base)[1:-1]
    ratio = (schedule.sigma(t) / schedule.alpha(t)) / (base.sigma(t) / base.alpha(t))
    np.testing.assert_allclose(ratio, schedule.shift, rtol=1e-12)


def test_shifted_flow_stays_on_its_line_and_edm_keeps_its_data_scale():
    t = times(ALL["shifted_flow"])
    np.testing.assert_allclose(ALL["shifted_flow"].alpha(t) + ALL["shifted_flow"].sigma(t), 1.0, rtol=1e-14)
    assert sch.edm(sigma_data=0.7).shifted(2.0).sigma_data == 0.7


@pytest.mark.parametrize(
    "make",
    [
        lambda: sch.vp_linear(beta_min=-1.0),
        lambda: sch.vp_linear(beta_min=2.0, beta_max=1.0),
        lambda: sch.vp_scaled_linear(beta_max=math.inf),
        lambda: sch.sub_vp(beta_min=-0.1),
        lambda: sch.vp_cosine(logsnr_min=3.0, logsnr_max=-3.0),
        lambda: sch.vp_cosine(logsnr_max=40.0),
        lambda: sch.vp_cosine(s=-0.1),
        lambda: sch.vp_sigmoid(tau=0.0),
        lambda: sch.vp_sigmoid(start=1.0, end=1.0),
        lambda: sch.ve(sigma_min=0.0),
        lambda: sch.ve(sigma_min=2.0, sigma_max=1.0),
        lambda: sch.ve(sigma_max=math.nan),
        lambda: sch.ve(sigma_max="50"),
        lambda: sch.edm(sigma_data=0.0),
        lambda: sch.flow(shift=0.0),
        lambda: sch.flow().shifted(-1.0),
        lambda: sch.flow().shifted(math.inf),
        lambda: sch.vp_from_alphas_cumprod([]),
        lambda: sch.vp_from_alphas_cumprod([0.5]),
        lambda: sch.vp_from_alphas_cumprod([0.5, 0.9]),
        lambda: sch.vp_from_alphas_cumprod([1.0, 0.5]),
        lambda: sch.vp_from_alphas_cumprod([0.5, -0.1]),
        lambda: sch.vp_from_alphas_cumprod([0.9, math.nan, 0.1]),
        lambda: sch.ve().zero_terminal_snr(),
        lambda: sch.flow().zero_terminal_snr(),
        lambda: sch.from_config({"name": "vp_linaer"}),
        lambda: sch.from_config({}),
        lambda: sch.from_config({"name": "flow", "shfit": 3.0}),
    ],
)
def test_bad_parameters_are_one_line_errors(make):
    with pytest.raises(FastdiffError) as caught:
        make()
    assert "\n" not in str(caught.value)
