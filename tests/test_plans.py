"""Plans: every solver's table passes its own check, a wrong one does not, files keep every bit, and the compiled program
computes what the rows say."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from analytic import BIMODAL, interpret, result
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff as fd
from fastdiff import program
from fastdiff.errors import FastdiffError, PlanError
from fastdiff.plans import IDENTITY, Plan, Row, Weights
from fastdiff.sampling import run

TABLE = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
SCHEDULES = {
    "vp_linear": fd.schedule.vp_linear(),
    "vp_cosine": fd.schedule.vp_cosine(),
    "discrete": fd.schedule.vp_from_alphas_cumprod(TABLE),
    "discrete_zero_snr": fd.schedule.vp_from_alphas_cumprod(TABLE).zero_terminal_snr(),
    "sub_vp": fd.schedule.sub_vp(),
    "ve": fd.schedule.ve(),
    "edm": fd.schedule.edm(),
    "flow": fd.schedule.flow(shift=3.0),
    "trigflow": fd.schedule.trigflow(),
    "zero_snr": fd.schedule.vp_linear().zero_terminal_snr(),
    "shifted": fd.schedule.vp_cosine().shifted(2.0),
}
GRIDS = ("uniform_t", "quadratic", "uniform_lambda", "karras", "beta", "ays")
# they declare it, and are tested in solvers/test_small_n.py and test_langevin.py
INEXACT = {"euler-maruyama", "consistency", "predictor-corrector", "annealed-langevin"}
# What a plan's check forgives as rounding, relative to its start, on random grids of 1 to 11 steps. eps = (x - alpha D)/sigma is
# a difference of terms that grow as 1/sigma, and weights on it grow with the order and, where they are those of equal steps, with
# how unequal the steps are: about ten times what was seen, by name. All others stay below FORGIVEN
FORGIVEN = 1e-10
ON_EPS = {
    1e-9: ("lms-1", "ipndm-1", "deis-tab-1", "deis-log-rho-1"),
    1e-8: ("lms-2", "lms-3", "ipndm-2", "deis-tab-2", "deis-log-rho-2", "dpm-solver-2m"),
    1e-7: ("lms-4", "ipndm-3", "deis-tab-3", "deis-log-rho-3", "dpm-solver-3m", "dpm-solver-3s", "dpm-fast", "rk4", "plms",
           "gradient-estimation"),
    1e-6: ("ipndm-4", "deis-tab-4", "dpm-2"),
    5e-5: ("dpm-2-ancestral", "pndm"),
}  # fmt: skip
VARIANTS = [(name, {}) for name in fd.list_solvers() if name not in INEXACT] + [
    ("ddim", {"eta": 0.4}), ("ddim", {"eta": 1.0}), ("euler-ancestral", {"eta": 0.5}), ("ddpm", {"variance": "large"}),
    ("predictor-corrector", {"corrections": 0}),
    ("euler", {"s_churn": 20.0}), ("euler", {"s_churn": 20.0, "s_noise": 1.003}),
    ("heun", {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0}),
    ("dpmpp-2m", {"lower_final": False}), ("dpmpp-3m", {"lower_final": True}),
    ("unipc-4", {"start": "rk"}), ("unipc-2", {"variant": "bh1"}), ("dpmpp-3m", {"start": "rk"}), ("lms-4", {"start": "rk"}),
    ("deis-tab-4", {"start": "rk"}), ("ipndm-4", {"start": "rk"}), ("dpm-2", {"s_churn": 20.0}),
    ("dpm-2-ancestral", {"eta": 0.4}), ("dpmpp-sde", {"eta": 0.4}), ("dpmpp-sde", {"one_path": False}),
    ("dpmpp-2m-sde", {"eta": 2.0}), ("sa-solver", {"predictor": 3, "corrector": 4, "tau": 0.5}),
    ("sa-solver", {"corrector": 0}), ("sa-solver-pece", {"tau_min": 0.1, "tau_max": 2.0}), ("tcd", {"gamma": 0.0}),
    ("restart", {"repeats": 2, "length": 1}),
    ("unipc-2", {"correct": False}), ("unipc-3", {"lower_final": False}), ("unipc-3", {"lower_final": True}),
]  # fmt: skip
BUDGETS = (1, 2, 3, 5, 8, 20)
EXACT = [(name, o) for name, o in VARIANTS if "s_noise" not in o and o.get("variance") != "large"]  # the others waive the spread
variants = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v))


@settings(max_examples=300)
@given(
    st.sampled_from(VARIANTS), st.sampled_from(sorted(SCHEDULES)), st.sampled_from(GRIDS),
    st.sampled_from(["zero", "sigma_min"]), st.sampled_from(BUDGETS),
)  # fmt: skip
def test_every_table_keeps_mean_and_spread(variant, schedule, grid, end, nfe):
    plan = fd.plan(variant[0], SCHEDULES[schedule], nfe, grid=grid, end=end, **variant[1])  # it checks itself
    assert plan.nfe == nfe
    assert (plan.end == (1.0, 0.0)) == (end == "zero")
    assert plan.mean == "exact"
    assert plan.spread == "exact" or variant[1].get("variance") == "large" or "s_noise" in variant[1]


@settings(max_examples=120)
@given(
    st.sampled_from(VARIANTS), st.sampled_from(sorted(SCHEDULES)), st.sampled_from(["zero", "sigma_min"]),
    st.lists(st.floats(0.2, 1.0), min_size=1, max_size=11),
)  # fmt: skip
def test_random_grids_pass_too(variant, schedule, end, gaps):
    s = SCHEDULES[schedule]
    low, high = max(float(s.lam(s.t_max)), -4.0), min(float(s.lam(s.t_min)), 5.0)
    lams = low + np.cumsum([0.0, *gaps]) / sum(gaps) * (high - low)
    times = [s.t_max] if float(s.alpha(s.t_max)) == 0.0 else []
    times += [min(max(float(s.t_of_lam(lam)), s.t_min), s.t_max) for lam in lams]
    steps = len(times) - (end == "sigma_min")
    plan = fd.plan(variant[0], s, steps=steps, grid=times, end=end, **variant[1])
    moments = plan.moments()
    assert len(moments) == len(plan.rows) + 1 and all(math.isfinite(v) for m in moments for v in m)
    # the check has teeth: what it forgives as rounding stays small
    forgiven = next((bound for bound, names in ON_EPS.items() if variant[0] in names), FORGIVEN)
    assert all(rounding < forgiven * max(1.0, plan.start[1]) for _, _, rounding in moments)


MODERATE = {
    "ve": fd.schedule.ve(sigma_min=0.1, sigma_max=10.0),
    "vp": fd.schedule.vp_cosine(logsnr_min=-4.0, logsnr_max=5.0),
}


def bumped(weights, place, factor):
    kind, j = place
    if kind == "x":
        return dataclasses.replace(weights, x=weights.x * factor)
    values = list(getattr(weights, kind))
    values[j] *= factor
    return dataclasses.replace(weights, **{kind: tuple(values)})


def factors(w, level):
    """A change of 1e-9 of the weight, or of 4e-12 of the level where that is more: the check's tolerance is 1e-12 of it."""
    share = max(1e-9, 4e-12 * math.hypot(*level) / abs(w))
    return 1 + share, 1 - share


def places(weights):
    out = [(("x", 0), weights.x)] if weights.x else []
    return out + [((kind, j), w) for kind in ("h", "z") for j, w in enumerate(getattr(weights, kind)) if w]


@pytest.mark.parametrize("schedule", MODERATE)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize(("name", "options"), EXACT, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_any_wrong_weight_is_refused(name, options, schedule, end):
    plan = fd.plan(name, MODERATE[schedule], 6, grid="karras", end=end, **options)
    assert plan.mean == plan.spread == "exact"
    tried = 0
    levels = [(row.alpha, row.sigma) for row in plan.rows] + [plan.end]
    for i, row in enumerate(plan.rows):
        for place, w in places(row.next):
            for factor in factors(w, levels[i + 1]):
                wrong = dataclasses.replace(row, next=bumped(row.next, place, factor))
                with pytest.raises(PlanError, match=rf"plan {plan.name.split('(')[0]}"):
                    dataclasses.replace(plan, rows=(*plan.rows[:i], wrong, *plan.rows[i + 1 :]))
                tried += 1
    assert tried >= 2 * len(plan.rows)


@pytest.mark.parametrize("name", ["unipc-2", "unipc-3", "heun", "dpmpp-2m", "dpmpp-3s"])
def test_wrong_bases_are_refused(name):
    plan = fd.plan(name, MODERATE["vp"], steps=6, end="sigma_min")
    for i, row in enumerate(plan.rows[:-1]):  # nothing builds on the last base
        for place, w in places(row.base):
            wrong = dataclasses.replace(row, base=bumped(row.base, place, factors(w, (1.0, 0.0))[0]))
            with pytest.raises(PlanError):
                dataclasses.replace(plan, rows=(*plan.rows[:i], wrong, *plan.rows[i + 1 :]))


def test_the_check_names_the_row_and_what_it_found():
    plan = fd.plan("ddim", MODERATE["vp"], 4)
    wrong = dataclasses.replace(plan.rows[1], next=plan.rows[1].next.scaled(1.01))
    with pytest.raises(PlanError, match=r"plan ddim, row 2 \(t = .*mean of .* where alpha is"):
        dataclasses.replace(plan, rows=(plan.rows[0], wrong, *plan.rows[2:]))
    dataclasses.replace(plan, rows=(plan.rows[0], wrong, *plan.rows[2:]), mean="waived: a test", spread="order 1")
    for field, level in (("start", (0.5, 0.5)), ("end", (1.0, 0.1))):
        with pytest.raises(PlanError):
            dataclasses.replace(plan, **{field: level})


def same(a, b):
    """Bit for bit: == tells neither -0.0 from 0.0 nor what repr shows."""
    return repr(a) == repr(b)


@pytest.mark.parametrize("schedule", ["vp_cosine", "flow", "edm"])
@variants
def test_files_keep_every_bit(name, options, schedule, tmp_path):
    plan = fd.plan(name, SCHEDULES[schedule], 7, **options)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan and same(again, plan)
    assert again.to_json() == plan.to_json() == (tmp_path / "plan.json").read_text().rstrip("\n")


def plan_json(**changes):
    data = json.loads(fd.plan("dpmpp-2m", MODERATE["vp"], 3).to_json())
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = data
        for key in parents:
            target = target[int(key) if key.isdigit() else key]
        target[int(last) if last.isdigit() else last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "3", '"plan"', "{}", '{"format": 1}', "[" * 100_000,
        plan_json(format=2), plan_json(format="1"), plan_json(rows=[]), plan_json(rows={}), plan_json(rows=None),
        plan_json(rows__1={}), plan_json(rows__1=[1, 2]), plan_json(surprise=1), plan_json(rows__0__t="noon"),
        plan_json(rows__0__t=math.nan), plan_json(rows__0__sigma=math.inf), plan_json(rows__0__alpha=None),
        plan_json(rows__1__next__x=math.nan), plan_json(rows__1__next__h=[1.0, math.inf]),
        plan_json(rows__0__next__h=[0.1, 0.1]), plan_json(rows__0__next__z=[0.1]), plan_json(rows__0__next__h=1.0),
        plan_json(rows__0__store=[[0.0]]), plan_json(rows__0__store=[[0.0, math.nan]]), plan_json(rows__0__store=1),
        plan_json(rows__0__draw="sometimes"), plan_json(rows__0__draw=[0.5]), plan_json(rows__0__draw=["a", "b"]),
        plan_json(rows__0__var=[0.0]),
        plan_json(start=[1.0]), plan_json(start=None), plan_json(end=[1.0, math.nan]), plan_json(end=["a", "b"]),
        plan_json(first={"x": 1.0}), plan_json(first__h=[1.0]), plan_json(first__z=[0.1, 0.1]),
        plan_json(first__x=math.inf), plan_json(mean="about"), plan_json(spread=3), plan_json(order="two"),
        plan_json(stochastic="no"), plan_json(name=7),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_malformed_files_are_plan_errors(text):
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_plan_errors(tmp_path):
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(PlanError, match="not text"):
        Plan.load(tmp_path / "binary.json")


def test_structure_errors():
    good = Row(1.0, 0.0, 1.0, Weights(0.0, (1.0,)), IDENTITY)
    Plan("tiny", (good,), (0.0, 1.0), (1.0, 0.0))
    for message, rows, more in (
        ("no rows", (), {}),
        ("2 history entries of 1", (dataclasses.replace(good, next=Weights(0.0, (1.0, 0.0))),), {}),
        ("1 noises of 0", (dataclasses.replace(good, next=Weights(0.0, (1.0,), (0.0,))),), {}),
        ("not finite", (dataclasses.replace(good, base=Weights(math.inf)),), {}),
        ("`first`", (good,), {"first": Weights(1.0, (1.0,))}),
        ('"exact"', (good,), {"mean": "roughly"}),
    ):
        with pytest.raises(PlanError, match=message):
            Plan("tiny", rows, (0.0, 1.0), (1.0, 0.0), **more)


# ---- the compiled program


def execute(plan, denoise, start, noises=()):
    """The program on registers, where every register holds NaN before its first and after its last use."""
    draws, nan = iter(noises), np.full(np.shape(start), np.nan)
    registers = [nan] * plan.registers
    level = {row.t: (row.alpha, row.sigma) for row in plan.rows}

    def total(terms):
        return sum(w * registers[r] for r, w in terms)

    y = registers[0] = np.asarray(start)
    assert len(plan.program.steps) == len(plan.rows)
    for step in plan.program.all:
        d = denoise(y, *level[step.t]) if step.call else nan
        for r in step.keeps:
            registers[r] = d
        for r, p, q in step.stores:
            registers[r] = (0.0 if p is None else p * y) + (0.0 if q is None else q * d)
        if step.draw is not None:
            registers[step.draw] = next(draws)
        base = total(step.base) if step.base else registers[0]
        if step.onto:
            registers[0] = base
        y = total(step.next)
        registers[0] = y if step.base is None else base
        for r in step.free:
            registers[r] = nan
    assert all(np.isnan(v).all() for v in registers[1:])  # nothing is kept beyond the end
    return y


def test_a_predictor_starts_from_the_corrected_state_where_that_is_shorter():
    """UniPC-2: x, D and the one before it instead of the old base and three predictions; no such step where nothing cancels."""
    steps = fd.plan("unipc-2", SCHEDULES["vp_cosine"], 8, end="sigma_min", lower_final=False).program.steps
    assert [(step.onto, len(step.next), len(step.base or ())) for step in steps[2:-1]] == [(True, 3, 4)] * 5
    assert not any(step.onto for step in fd.plan("dpmpp-2m", SCHEDULES["vp_cosine"], 8).program.steps)


def test_a_base_of_the_executors_own_keeps_its_weight_to_the_side():
    """UniPC-2's corrected base is the executor's from the second correction on: there its weight is 1, exactly."""
    steps = fd.plan("unipc-2", SCHEDULES["vp_cosine"], 8, end="sigma_min", lower_final=False).program.steps
    assert [step.own for step in steps] == [False] * 2 + [True] * 5 + [False]
    assert all(step.base[0] == (0, 1.0) for step in steps if step.own)


def test_what_is_kept_to_the_side_stays_within_bounds(monkeypatch):
    """Where the factor of the base would leave them the base takes it back, and the program says what the rows say."""
    plan = fd.plan("unipc-2", SCHEDULES["edm"], 9, end="sigma_min", lower_final=False)
    monkeypatch.setattr(program, "FAR", 4.0)  # the base falls by 4e4 in all
    own = [step.own for step in plan.program.steps]
    assert any(own[2:-1]) and not all(own[2:-1])
    start = np.array([0.3, -1.1, 0.4]) * plan.start[1]
    expected = result(plan, BIMODAL.denoise, start)
    np.testing.assert_allclose(execute(plan, BIMODAL.denoise, start), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("schedule", ["vp_cosine", "flow", "edm"])
@variants
def test_program_computes_what_the_rows_say(name, options, schedule, end):
    for nfe in (1, 4, 9):
        plan = fd.plan(name, SCHEDULES[schedule], nfe, end=end, **options)
        rng = np.random.default_rng(nfe)
        noises = rng.standard_normal((1 + plan.draws, 5))
        start = noises[0] * plan.start[1]
        expected = result(plan, BIMODAL.denoise, start, noises[1:])
        # PNDM's Runge-Kutta start and equal-step weights multiply terms of 1e5 here: 1e-8 of rounding, its table says
        bound = 1e-11 + plan.moments()[-1][2] * (name == "pndm")
        np.testing.assert_allclose(execute(plan, BIMODAL.denoise, start, noises[1:]), expected, rtol=0, atol=bound)
        level = {row.t: (row.alpha, row.sigma) for row in plan.rows}
        out = run(
            lambda y, t, level=level: torch.from_numpy(BIMODAL.denoise(y.numpy(), *level[t])),
            plan, torch.from_numpy(start), fd.noise.recorded(torch.from_numpy(noises)),
        )  # fmt: skip
        np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=bound)


def random_plan(rng):
    """Any table at all: several stored pairs, rows without a call, draws that are used late or never, rises of the base."""
    rows, stored, drawn = [], 0, int(rng.integers(2))
    first = Weights(0.7, (), (0.5,) * drawn)

    def weights():
        def some(n):
            values = np.where(rng.random(n) < 0.4, 0.0, rng.standard_normal(n))
            return tuple(values[: int(rng.integers(n + 1))].tolist())

        return Weights(float(rng.choice([0.0, 1.0, rng.standard_normal()])), some(stored), some(drawn))

    for i in range(int(rng.integers(1, 9))):
        pairs = [(float(rng.choice([0.0, 0.5])), float(rng.choice([0.0, 1.0, -0.8]))) for _ in range(rng.integers(3))]
        draw = (0.0, 1.0) if rng.random() < 0.5 else None
        stored, drawn = stored + len(pairs), drawn + (draw is not None)
        nxt = weights()
        base = nxt if rng.random() < 0.3 else IDENTITY if rng.random() < 0.4 else weights()
        rows.append(Row(10.0 - i, 0.6, 0.8, nxt, base, tuple(pairs), draw))
    waived = {"mean": "waived: random", "spread": "waived: random"}
    return Plan("random", tuple(rows), (0.6, 0.8), (1.0, 0.0), first, stochastic=True, **waived)


@pytest.mark.parametrize("seed", range(150))
def test_any_table_compiles_to_the_same_result(seed):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng)
    start, noises = rng.standard_normal(4), rng.standard_normal((plan.draws + 1, 4))

    def denoise(y, alpha, sigma):
        return np.tanh(alpha * y) + 0.1

    points = interpret(plan, denoise, start, noises[1:])
    scale = max(1.0, *(np.abs(p).max() for p in points))
    np.testing.assert_allclose(execute(plan, denoise, start, noises[1:]), points[-1], rtol=0, atol=1e-12 * scale)
    seen = []
    out = run(
        lambda y, t: torch.tanh(0.6 * y) + 0.1, plan, torch.from_numpy(start), fd.noise.recorded(torch.from_numpy(noises)),
        callback=lambda i, y: seen.append(y.clone()),
    )  # fmt: skip
    np.testing.assert_allclose(out.numpy(), points[-1], rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(torch.stack(seen).numpy(), points[1:], rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize(
    ("name", "registers"),
    [("ddim", 2), ("euler", 2), ("ddpm", 3), ("heun", 3), ("dpmpp-2s", 2), ("dpmpp-3s", 3), ("dpmpp-2m", 3),
     ("dpmpp-3m", 4), ("unipc-1", 3), ("unipc-2", 4), ("unipc-3", 5), ("lms-4", 5), ("ipndm-4", 5)],
)  # fmt: skip
def test_registers_do_not_grow_with_the_steps(name, registers):
    """The base, and the history that a later row reads: at most 5 tensors for what the registry holds."""
    assert fd.plan(name, MODERATE["vp"], steps=12, end="sigma_min").registers == registers
    assert fd.plan(name, MODERATE["vp"], steps=60, end="sigma_min").registers == registers


def test_nfe_counts_calls_and_draws_count_noises():
    plan = fd.plan("euler", fd.schedule.edm(), 8, s_churn=20.0)
    assert (plan.nfe, plan.draws, bool(plan.first.z)) == (8, 7, False)  # no level above the model's own
    low = fd.plan("euler", fd.schedule.edm(sigma_max=200.0), 8, grid=[80, 40, 20, 10, 5, 2, 1, 0.1], s_churn=20.0)
    assert (low.draws, len(low.first.z)) == (8, 1)
    idle = dataclasses.replace(plan.rows[0], store=((1.0, 0.0),))
    assert plan.rows[0].calls and not idle.calls


# ---- plan(): the public way to a table


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("dpm2m", MODERATE["vp"], 5), {}, "did you mean .*dpmpp-2m"),
        (("zzz", MODERATE["vp"], 5), {}, "unknown solver 'zzz'"),
        (("ddim", MODERATE["vp"], 5), {"ate": 1.0}, "no option ate; it takes eta"),
        (("dpmpp-2m", MODERATE["vp"], 5), {"published": True}, "no option published"),
        (("heun", MODERATE["vp"], 5), {"counts": (1,)}, "no option counts"),
        (("ddim", MODERATE["vp"], 5), {"eta": 1.5}, r"eta must lie in \[0, 1\]"),
        (("ddim", MODERATE["vp"], 5), {"eta": math.nan}, r"eta must lie in \[0, 1\]"),
        (("ddpm", MODERATE["vp"], 5), {"variance": "medium"}, '"small", "large" or "learned"'),
        (("euler", MODERATE["vp"], 5), {"s_churn": -1.0}, "s_churn >= 0"),
        (("euler", MODERATE["vp"], 5), {"s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin <= s_tmax"),
        (("ddim", MODERATE["vp"]), {}, "either nfe= .* or steps="),
        (("ddim", MODERATE["vp"], 5), {"steps": 5}, "either nfe= .* or steps="),
        (("ddim", MODERATE["vp"], 0), {}, "at least 1; given 0"),
        (("ddim", MODERATE["vp"], 2.5), {}, "whole number"),
        (("ddim", MODERATE["vp"], True), {}, "whole number"),
        (("ddim", "cosine", 5), {}, "NoiseSchedule or a denoiser"),
        (("ddim", MODERATE["vp"], 5), {"end": "one"}, "end must be"),
        (("ddim", MODERATE["vp"], 5), {"grid": "karos"}, "did you mean karras"),
        (("ddim", MODERATE["vp"], 5), {"grid": []}, "need 5 times; given 0"),
        (("ddim", MODERATE["vp"], 2), {"grid": [0.9, 0.5], "grid_options": {"rho": 3}}, "rho"),
        (("ddim", MODERATE["vp"], 5), {"grid_options": {"rho": 3}}, "no option rho"),
    ],
)
def test_mistakes_are_named(args, options, message):
    with pytest.raises(FastdiffError, match=message) as caught:
        fd.plan(*args, **options)
    assert "\n" not in str(caught.value)


def test_aliases_and_case():
    for info in fd.list_solvers().values():
        for alias in info.aliases:
            assert fd.plan(alias, MODERATE["vp"], 5) == fd.plan(info.name, MODERATE["vp"], 5)
    assert fd.plan("UniPC-2", MODERATE["vp"], 5).name == "unipc-2"


def test_every_info_agrees_with_its_plans():
    for name, info in fd.list_solvers().items():
        plan = fd.plan(name, MODERATE["vp"], steps=20, end="sigma_min")
        assert (plan.name, plan.order, plan.stochastic) == (name, info.order, info.stochastic)
        # starts, no second look, a repeat, one prediction at the end
        first = {"plms": 1, "pndm": 9, "sa-solver-pece": -1, "restart": 4, "annealed-langevin": -2}.get(name, 0)
        assert plan.nfe == 20 * info.nfe_per_step + first
        assert all(isinstance(key, str) for key in info.options)


def test_a_denoiser_stands_for_its_schedule():
    den = fd.Denoiser(lambda x, t: x, MODERATE["vp"], "x0")
    assert fd.plan("ddim", den, 3) == fd.plan("ddim", MODERATE["vp"], 3)


@pytest.mark.parametrize("name", ["heun", "dpmpp-2s", "dpmpp-3s"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_a_given_grid_decides_its_own_end(name, end):
    made = fd.grid.make("karras", MODERATE["vp"], 4, end)
    plan = fd.plan(name, MODERATE["vp"], steps=4, grid=made)
    assert plan == fd.plan(name, MODERATE["vp"], steps=4, grid="karras", end=end)
