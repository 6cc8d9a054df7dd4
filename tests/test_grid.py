"""Time grids: strictly falling whatever the schedule, and equal to the formulas they are named after."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import grid as grids
from fastdiff import schedule as sch
from fastdiff.errors import FastdiffError

TABLE = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
DISCRETE = sch.vp_from_alphas_cumprod(TABLE)
SCHEDULES = [
    sch.vp_linear(), sch.vp_scaled_linear(), sch.vp_cosine(), sch.vp_sigmoid(), sch.sub_vp(), sch.ve(), sch.edm(),
    sch.flow(), sch.flow(shift=3.0), sch.flow(shift=0.3), sch.trigflow(), DISCRETE, sch.vp_cosine().shifted(2.0),
    sch.flow().shifted(3.0),
    sch.vp_linear().zero_terminal_snr(), DISCRETE.zero_terminal_snr(), DISCRETE.shifted(2.0),
]  # fmt: skip
FAMILIES = [
    ("uniform_t", {}), ("uniform_t", {"spacing": "linspace"}), ("uniform_t", {"spacing": "leading"}), ("quadratic", {}),
    ("uniform_lambda", {}), ("exponential", {}), ("polyexponential", {"rho": 0.7}), ("polyexponential", {"rho": 2.0}),
    ("karras", {}), ("karras", {"rho": 3.0}), ("beta", {}), ("beta", {"a": 1.5, "b": 0.4}),
    ("flow_shift", {"num_tokens": 4096}), ("ays", {}), ("ays", {"table": "svd"}),
    ("sgm_uniform", {}), ("simple", {}), ("kl_optimal", {}), ("cosine", {}), ("linear_quadratic", {}),
    ("linear_quadratic", {"threshold": 0.2}),
]  # fmt: skip
START_AT_ZERO_SNR = [s for s in SCHEDULES if float(s.alpha(s.t_max)) == 0.0]


def times(grid):
    return np.array([n.t for n in grid.nodes])


@settings(max_examples=200)
@given(st.sampled_from(SCHEDULES), st.sampled_from(FAMILIES), st.integers(1, 50), st.sampled_from(["zero", "sigma_min"]))
def test_every_grid_falls_strictly_from_noise_to_its_end(schedule, family, n, end):
    name, options = family
    made = grids.make(name, schedule, n, end, **options)
    assert made.steps == n and len(made.nodes) == n + 1
    assert all(b.lam > a.lam for a, b in itertools.pairwise(made.nodes))
    last = made.nodes[-1]
    if end == "zero":
        assert (last.alpha, last.sigma) == (1.0, 0.0) and made.ends_clean
    else:
        assert last.sigma > 0 and not made.ends_clean
    evaluated = made.nodes[:-1] if end == "zero" else made.nodes
    assert all(b.t < a.t for a, b in itertools.pairwise(evaluated))
    for node in evaluated:
        assert schedule.t_min <= node.t <= schedule.t_max
        assert (node.alpha, node.sigma) == (float(schedule.alpha(node.t)), float(schedule.sigma(node.t)))
    if options.get("spacing") != "leading" and name != "ays":
        assert made.nodes[0].t == schedule.t_max  # to the bit: alpha is 0 there or nowhere
        if end == "sigma_min":
            assert last.t == schedule.t_min


@pytest.mark.parametrize("name", ["karras", "uniform_lambda", "beta", "uniform_t", "quadratic"])
@pytest.mark.parametrize("schedule", [sch.vp_linear(), sch.flow(0.3), sch.edm(), sch.vp_cosine(logsnr_max=2.0)])
def test_many_steps_still_fall(name, schedule):
    for end in ("zero", "sigma_min"):
        assert grids.make(name, schedule, 150, end).steps == 150


@pytest.mark.parametrize("schedule", START_AT_ZERO_SNR, ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["karras", "uniform_lambda", "uniform_t", "beta"])
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_full_noise_is_the_first_node_and_only_it(schedule, name, n):
    nodes = grids.make(name, schedule, n).nodes
    assert nodes[0].alpha == 0.0 and nodes[0].lam == -math.inf and nodes[0].u == math.inf
    assert all(node.alpha > 0 and node.u < 149 for node in nodes[1:]) or name in ("uniform_t", "beta")
    assert all(node.alpha > 0 for node in nodes[1:])


def test_zero_snr_schedules_are_in_the_list():
    assert {s.name for s in START_AT_ZERO_SNR} == {"flow", "shifted", "zero_terminal_snr", "vp_from_alphas_cumprod"}


@pytest.mark.parametrize("rho", [7.0, 3.0])
@pytest.mark.parametrize("schedule", [sch.edm(), sch.vp_cosine(), DISCRETE], ids=lambda s: s.name)
def test_karras_formula(schedule, rho):
    n = 12
    u = [node.u for node in grids.make("karras", schedule, n, rho=rho).nodes[:-1]]
    high, low = (math.exp(-float(schedule.lam(t))) for t in (schedule.t_max, schedule.t_min))
    i = np.arange(n)
    expected = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    np.testing.assert_allclose(u, expected, rtol=1e-9)


def test_polyexponential_and_uniform_lambda_formulas():
    schedule, n = sch.edm(), 9
    u = np.array([node.u for node in grids.make("polyexponential", schedule, n, rho=2.0).nodes[:-1]])
    ramp = np.linspace(1, 0, n) ** 2.0  # k-diffusion, get_sigmas_polyexponential
    np.testing.assert_allclose(u, np.exp(ramp * (math.log(80.0) - math.log(0.002)) + math.log(0.002)), rtol=1e-12)
    lam = [node.lam for node in grids.make("uniform_lambda", schedule, n, "sigma_min").nodes]
    np.testing.assert_allclose(np.diff(lam), (math.log(80.0) - math.log(0.002)) / n, rtol=1e-11)
    np.testing.assert_array_equal(*(times(grids.make(name, schedule, n)) for name in ("exponential", "uniform_lambda")))


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.5, 0.9), (2.0, 0.4), (1.0, 1.0), (3.0, 2.0)])
def test_beta_is_scipys(a, b):
    schedule, n = sch.vp_linear(), 21
    t = times(grids.make("beta", schedule, n, a=a, b=b))[:-1]
    quantiles = scipy.stats.beta.ppf(1 - np.arange(n) / (n - 1), a, b)
    np.testing.assert_allclose(t, 1e-3 + quantiles * (1 - 1e-3), rtol=0, atol=1e-11)


def test_quadratic_and_linspace_formulas():
    schedule = sch.vp_linear()
    t = times(grids.make("quadratic", schedule, 5, "sigma_min"))
    np.testing.assert_allclose(np.diff(np.sqrt(t)), (math.sqrt(1e-3) - 1) / 5, rtol=1e-11)
    t = times(grids.make("uniform_t", schedule, 5, "sigma_min", spacing="linspace"))
    np.testing.assert_allclose(t, np.linspace(1, 1e-3, 6), rtol=1e-13)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 20, 30, 50, 999, 1000])
def test_discrete_times_are_diffusers(n):
    """diffusers 0.42.1, DDIMScheduler.set_timesteps: trailing and leading, integer."""
    trailing = np.round(np.arange(1000, 0, -1000 / n))[:n] - 1
    np.testing.assert_array_equal(times(grids.make("uniform_t", DISCRETE, n, spacing="trailing"))[:-1], trailing)
    leading = (np.arange(0, n) * (1000 // n)).round()[::-1]
    for offset in (0, 1) if n <= 500 else (0,):
        found = times(grids.make("uniform_t", DISCRETE, n, spacing="leading", offset=offset))[:-1]
        np.testing.assert_array_equal(found, leading + offset)


def test_one_evaluation_is_always_at_full_noise():
    for name, options in FAMILIES:
        assert grids.make(name, DISCRETE, 1, **options).nodes[0].t == 999.0


def test_continuous_uniform_times():
    flow = sch.flow(shift=3.0)
    t = times(grids.make("uniform_t", flow, 4))
    u = np.array([1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(t, [*(3 * u / (1 + 2 * u)), 0.0], rtol=1e-14)
    t = times(grids.make("uniform_t", sch.flow(), 4, spacing="leading"))[:-1]
    np.testing.assert_allclose(t, 1e-3 + np.array([3, 2, 1, 0]) / 3 * (0.75 - 1e-3), rtol=1e-14)  # not to t = 0


def test_flow_shift_by_tokens():
    u = 1 - np.arange(4) / 4
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * 768 / 3840)):
        t = times(grids.make("flow_shift", sch.flow(), 4, num_tokens=tokens))[:-1]
        np.testing.assert_allclose(t, math.exp(mu) * u / (1 + (math.exp(mu) - 1) * u), rtol=1e-13)


def test_ays_returns_its_table_within_the_schedule():
    schedule = sch.ve(sigma_min=0.001, sigma_max=1000.0)
    for name, table in grids.AYS_TABLES.items():
        u = [node.u for node in grids.make("ays", schedule, len(table), table=name).nodes[:-1]]
        np.testing.assert_allclose(u, table, rtol=1e-12)
    inside = grids.make("ays", schedule, 21).nodes[1].u  # log-linear in between
    assert inside == pytest.approx(math.sqrt(14.615 * 6.475), rel=1e-12)


@pytest.mark.parametrize("given_times", [[0.9, 0.5, 0.2], (0.9, 0.5, 0.2), np.array([0.9, 0.5, 0.2]),
                                         torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)],
                         ids=type)  # fmt: skip
def test_explicit_times(given_times):
    made = grids.make(given_times, sch.flow(), 3)
    assert times(made).tolist() == [0.9, 0.5, 0.2, 0.0] and made.name == "explicit"
    made = grids.make(given_times, sch.flow(), 2, "sigma_min")
    assert times(made).tolist() == [0.9, 0.5, 0.2] and not made.ends_clean
    assert grids.make(made, sch.flow(), 2) is made


@pytest.mark.parametrize(
    ("grid", "n", "end", "options", "message"),
    [
        ("karas", 5, "zero", {}, "karras"),
        ("uniform", 5, "zero", {}, "uniform_t"),
        ("karras", 5, "zero", {"roh": 7.0}, "no option roh; it takes rho"),
        ("uniform_t", 5, "zero", {"clean": False}, "no option clean"),
        ("uniform_t", 5, "zero", {"spacing": "sideways"}, "trailing, leading, linspace"),
        ("ays", 5, "zero", {"table": "sd3"}, "sd15, sdxl, svd"),
        ("flow_shift", 5, "zero", {}, "num_tokens"),
        ("karras", 0, "zero", {}, "at least one interval"),
        ("karras", 5, "clean", {}, '"zero" or "sigma_min"'),
        ([0.9, 0.5], 3, "zero", {}, "need 3 times; given 2"),
        ([0.9, 0.5], 2, "sigma_min", {}, "need 3 times; given 2"),
        ([[0.9, 0.5]], 2, "zero", {}, "times"),
        ([0.5, 0.9], 2, "zero", {}, "strictly from noise to data; at node 0 time 0.5"),
        ([0.9, 0.5, 0.5], 3, "zero", {}, "at node 1"),
        ([0.9, 0.5, 0.0], 3, "zero", {}, "sigma = 0 already"),
        ([0.9, math.nan], 2, "zero", {}, "nan"),
        ([1.5, 0.5], 2, "zero", {}, "no level"),
        ([0.9, -0.5], 2, "sigma_min", {}, "time"),
        ([0.9, 0.5], 2, "zero", {"rho": 7.0}, "rho"),
    ],
)
def test_mistakes_are_named(grid, n, end, options, message):
    with pytest.raises(FastdiffError, match=message) as caught:
        grids.make(grid, sch.flow(), n, end, **options)
    assert "\n" not in str(caught.value)


def test_a_grid_of_another_length_is_refused():
    with pytest.raises(FastdiffError, match="3 intervals where the plan needs 4"):
        grids.make(grids.make("karras", sch.edm(), 3), sch.edm(), 4)
    with pytest.raises(FastdiffError, match="at least one interval"):
        grids.Grid((grids.Node(1.0, 0.5, 0.5),))


def test_more_discrete_times_than_the_model_has():
    with pytest.raises(FastdiffError, match="strictly from noise to data"):
        grids.make("uniform_t", DISCRETE, 1001)


def test_nodes():
    node = grids.node_at_lam(sch.vp_cosine(), 0.7)
    assert node.lam == pytest.approx(0.7, abs=1e-12) and node.u == pytest.approx(math.exp(-0.7), rel=1e-12)
    assert grids.Node(0.0, 1.0, 0.0).lam == math.inf and grids.Node(0.0, 1.0, 0.0).u == 0.0


def test_sgm_uniform_and_simple_are_comfyuis():
    """Stability's sgm_uniform: n + 1 uniform times without the last; ComfyUI's simple: table[-(1 + int(i T/n))]."""
    for n in (1, 3, 7, 20):
        assert times(grids.make("sgm_uniform", DISCRETE, n))[:-1] == pytest.approx(np.linspace(999, 0, n + 1)[:-1])
        table = list(range(1000))
        assert times(grids.make("simple", DISCRETE, n))[:-1].tolist() == [table[-(1 + int(i * (1000 / n)))] for i in range(n)]
    assert times(grids.make("simple", sch.flow(), 4)).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_kl_optimal_and_cosine_formulas():
    schedule = sch.edm()
    r = np.linspace(0, 1, 9)
    want = np.tan((1 - r) * math.atan(80.0) + r * math.atan(0.002))
    np.testing.assert_allclose(times(grids.make("kl_optimal", schedule, 9))[:-1], want, rtol=1e-9)
    want = 0.002 + 0.5 * (80 - 0.002) * (1 - np.cos(np.pi * (1 - r**0.5)))
    np.testing.assert_allclose(times(grids.make("cosine", schedule, 9))[:-1], want, rtol=1e-9)


@pytest.mark.parametrize(("n", "threshold"), [(2, 0.025), (5, 0.025), (8, 0.1), (30, 0.025)])
def test_linear_quadratic_is_mochis(n, threshold):
    """As its authors define it: two polynomials in i, of which the second is fixed by value and slope where they meet and by 1
    at n; solved here as linear equations."""
    half = n // 2
    slope = threshold / half
    system = np.array([[half**2, half, 1], [2 * half, 1, 0], [n**2, n, 1]])
    a, b, c = np.linalg.solve(system, [threshold, slope, 1.0])
    want = [1 - (slope * i if i < half else a * i * i + b * i + c) for i in range(n)]
    got = times(grids.make("linear_quadratic", sch.flow(), n, threshold=threshold))
    np.testing.assert_allclose(got[:-1], want, rtol=0, atol=1e-12)
    assert got[-1] == 0.0
