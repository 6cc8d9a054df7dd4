"""The eager loop: what it may start from, what a sample depends on, what it never does."""

import dataclasses
import math
import weakref

import every
import numpy as np
import pytest
import tiny
import torch
from analytic import BIMODAL, interpret

import fastdiff as fd
from fastdiff.errors import FastdiffError, NonFiniteError
from fastdiff.noise import stacked
from fastdiff.sampling import run

SCHEDULE = fd.schedule.vp_cosine()
SHAPE = (2, 3, 3)
PLANS = [("ddim", {}), ("heun", {}), ("unipc-3", {}), ("lms-4", {}), ("dpmpp-3s", {}), ("ddpm", {}), ("euler", {"s_churn": 20.0})]
plans = pytest.mark.parametrize(("name", "options"), PLANS, ids=[name for name, _ in PLANS])


class Elementwise(fd.Denoiser):
    """The mixture's denoiser in the state's own precision: every element on its own, the time a float."""

    def __init__(self):
        super().__init__(lambda x, t: x, SCHEDULE, "x0", shape=SHAPE)
        self.of = BIMODAL.network(SCHEDULE)

    def __call__(self, x, t):
        return self.of(x, t)


def make(name, options, nfe=6):
    return fd.plan(name, SCHEDULE, nfe, **options)


# ---- a sample depends on its own seed alone


@plans
def test_batch_of_one_and_of_64_agree_to_the_bit(name, options):
    plan, den, seeds = make(name, options), Elementwise(), [*range(61), 2**63, 2**64 - 1, 12345678901234]
    whole = fd.sample(den, plan, seeds=seeds)
    assert whole.shape == (64, *SHAPE) and whole.dtype == torch.float32
    for i in (0, 1, 40, 61, 63):
        assert torch.equal(fd.sample(den, plan, seeds=[seeds[i]])[0], whole[i])
    assert torch.equal(fd.sample(den, plan, seeds=seeds[::-1]), whole.flip(0))
    assert torch.equal(fd.sample(den, plan, seeds=seeds), whole)
    assert len(torch.unique(whole.flatten(1)[:, 0])) == 64


@plans
def test_the_unets_samples_depend_on_their_seeds_to_rounding(name, options):
    """Convolutions choose their order of summation by the batch size: 2e-5 of data in [-1, 1] in float32, over 6 calls."""
    network = tiny.network()
    den = fd.Denoiser(network, SCHEDULE, "v", shape=(1, 8, 8), time=lambda t: 1000 * t).bind(class_labels=torch.zeros(1).long())
    plan = make(name, options)
    whole = fd.sample(den.bind(class_labels=torch.zeros(8).long()), plan, seeds=range(8))
    for i in (0, 5):
        torch.testing.assert_close(fd.sample(den, plan, seeds=[i])[0], whole[i], rtol=2e-5, atol=2e-5)
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_the_start_is_draw_zero_of_the_seed():
    plan = make("ddim", {})
    noise = fd.noise.normal([5, 6], 0, math.prod(SHAPE)).view(2, *SHAPE)
    by_seed = fd.sample(Elementwise(), plan, seeds=[5, 6])
    assert torch.equal(fd.sample(Elementwise(), plan, noise), by_seed)
    assert torch.equal(fd.sample(Elementwise(), plan, start=noise * plan.start[1]), by_seed)


@pytest.mark.parametrize("name", ["ddpm", "euler"])
def test_draws_are_the_seeds_draws_in_order(name):
    plan = make(name, dict(PLANS)[name])
    assert plan.draws >= 4
    seeds = [5, 6]
    noises = np.stack([fd.noise.normal_numpy(seeds, k, math.prod(SHAPE)) for k in range(plan.draws + 1)]).astype(np.float64)
    expected = interpret(plan, BIMODAL.denoise, noises[0] * plan.start[1], noises[1:])[-1]
    found = fd.sample(Elementwise(), plan, seeds=seeds, dtype=torch.float64)
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, rtol=0, atol=1e-5)  # the two backends' normals: 1e-6
    noise = torch.from_numpy(noises[0]).view(2, *SHAPE)
    torch.testing.assert_close(fd.sample(Elementwise(), plan, noise, seeds=seeds, dtype=torch.float64), found, rtol=0, atol=1e-5)


def test_diffusers_noise_draws_in_order():
    plan = make("ddpm", {})
    g = torch.Generator().manual_seed(3)
    start = torch.randn(4, *SHAPE, generator=g)
    draws = [torch.randn(4, *SHAPE, generator=g) for _ in range(plan.draws)]
    expected = fd.sample(Elementwise(), plan, fd.noise.recorded([start, *draws]), start=start * plan.start[1])
    again = torch.Generator().manual_seed(3)
    start = torch.randn(4, *SHAPE, generator=again)  # the caller draws the start, as a pipeline does
    found = fd.sample(Elementwise(), plan, fd.noise.from_torch(again), start=start * plan.start[1])
    assert torch.equal(found, expected)


# ---- the state


@plans
def test_float64_state(name, options):
    plan = make(name, options)
    rng = np.random.default_rng(0)
    noises = rng.standard_normal((plan.draws + 1, 3, math.prod(SHAPE)))
    source = fd.noise.recorded(list(torch.from_numpy(noises).view(-1, 3, *SHAPE)))
    start = torch.from_numpy(noises[0]).view(3, *SHAPE) * plan.start[1]
    found = fd.sample(Elementwise(), plan, source, start=start, dtype=torch.float64)
    assert found.dtype == torch.float64
    expected = interpret(plan, BIMODAL.denoise, noises[0] * plan.start[1], noises[1:])[-1]
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, rtol=0, atol=1e-12)
    single = fd.sample(Elementwise(), plan, source, start=start)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=0, atol=2e-4)


@plans
def test_a_low_precision_network_leaves_the_state_alone(name, options):
    def network(x, t):
        seen.append((x.dtype, t.dtype))
        return BIMODAL.network(SCHEDULE)(x.float(), float(t[0])).to(torch.bfloat16)

    seen = []
    den = fd.Denoiser(network, SCHEDULE, "x0", shape=SHAPE)
    den._dtype = torch.bfloat16
    out = fd.sample(den, make(name, options), seeds=range(4))
    assert out.dtype == torch.float32 and set(seen) == {(torch.bfloat16, torch.float32)}
    torch.testing.assert_close(out, fd.sample(Elementwise(), make(name, options), seeds=range(4)), rtol=0, atol=0.25)


@plans
def test_inputs_are_not_changed(name, options):
    plan = make(name, options)
    start = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    kept = start.clone()
    fd.sample(Elementwise(), plan, start=start, seeds=range(3))
    fd.sample(lambda x, t: x, plan, start=start, seeds=range(3))  # a network that returns its input itself
    assert torch.equal(start, kept)


@plans
def test_callback_sees_every_row(name, options):
    plan, seen = make(name, options), []
    asked = []

    def watched(x, t):
        asked.append(x.clone())
        return den(x, t)

    den = Elementwise()
    noise = fd.noise.normal(range(2), 0, math.prod(SHAPE)).view(2, *SHAPE)
    out = fd.sample(watched, plan, noise, seeds=range(2), callback=lambda i, y: seen.append((i, y.clone())))
    assert [i for i, _ in seen] == list(range(len(plan.rows)))
    assert torch.equal(seen[-1][1], out)
    for point, (_, y) in zip(asked[1:], seen, strict=False):
        assert torch.equal(point, y)  # what the next row evaluates


@plans
def test_points_that_were_shown_stay_as_they_are(name, options):
    """A callback may keep what it is given: the loop writes over tensors of its own alone."""
    plan, shown = make(name, options, 9), []
    fd.sample(Elementwise(), plan, seeds=range(2), callback=lambda i, y: shown.append((y, y.clone())))
    assert all(torch.equal(y, then) for y, then in shown)


def test_a_base_kept_to_the_side_fits_a_state_in_float16():
    """EDM's sigma falls by 4e4, and with it the weight of UniPC's base: what is kept is not the base over it."""
    den = Elementwise()
    den.of = lambda x, t: 4 + 0.2 * torch.sin(x)
    plan = fd.plan("unipc-2", fd.schedule.edm(), 100)
    narrow, wide = (fd.sample(den, plan, seeds=range(2), dtype=dtype) for dtype in (torch.float16, torch.float32))
    torch.testing.assert_close(narrow.float(), wide, rtol=0, atol=0.1)


def test_a_loop_outside_may_leave_inference_mode_on_the_way():
    from fastdiff.compat.stepper import Stepper

    plan = make("unipc-2", {}, 8)
    x = fd.noise.normal(range(2), 0, math.prod(SHAPE)).view(2, *SHAPE)

    def end(modes):
        stepper, y, den = Stepper(plan), x, Elementwise()
        for row, mode in zip(plan.rows, modes, strict=True):
            with mode():
                y = stepper.step(y, (den(y, row.t), None), lambda: None, torch.float32)
        return y

    mixed = end([torch.inference_mode] * 4 + [torch.no_grad] * 4)
    torch.testing.assert_close(mixed, end([torch.no_grad] * 8), rtol=1e-6, atol=1e-6)


def test_no_gradient_is_kept():
    network = tiny.network().requires_grad_(True)
    den = fd.Denoiser(network, SCHEDULE, "v", shape=(1, 8, 8)).bind(class_labels=torch.zeros(2).long())
    assert not fd.sample(den, make("ddim", {}, 2), seeds=range(2)).requires_grad


def test_the_checkpoints_own_plan_is_the_default():
    den = Elementwise()
    den.plan = make("unipc-2", {})
    assert torch.equal(fd.sample(den, seeds=range(2)), fd.sample(den, den.plan, seeds=range(2)))


# ---- no host sync


class Device(torch.Tensor):
    """A tensor whose values must not be read: everything that would wait for an accelerator raises."""

    READS = frozenset(
        ["item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__",
         "nonzero", "is_nonzero", "equal", "allclose", "masked_select", "unique", "__format__", "__repr__"]
    )  # fmt: skip

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in cls.READS:
            raise AssertionError(f"{func.__name__} reads a tensor's value")
        return super().__torch_function__(func, types, args, kwargs or {})


@every.every
def test_the_loop_never_waits_for_the_device(case):
    """The prediction's conversion included."""
    plan, den, calls = every.make(case), every.denoiser(), 0
    start, noises = every.given(plan, torch.float32)

    def source(draw, shape, device):
        nonlocal calls
        calls += 1
        return noises[draw - 1].as_subclass(Device)

    with every.NoReads():
        out = run(den, plan, start.as_subclass(Device), source, callback=lambda i, y: None)
    assert isinstance(out, Device) and calls == plan.draws
    assert torch.equal(out.as_subclass(torch.Tensor), run(den, plan, start, stacked(noises)))


def test_the_guard_itself_works():
    x = torch.ones(2).as_subclass(Device)
    for read in (bool, float, lambda v: v.sum().item(), lambda v: v.cpu(), lambda v: v.tolist(), lambda v: v[0] > 0 or None):
        with pytest.raises(AssertionError, match="reads a tensor's value"):
            read(x[:1]) if read is not bool else bool(x[0])
    y, w = torch.ones(2), torch.tensor(0.5)
    hidden = (lambda: y.add_(y, alpha=w), lambda: y.new_full((2,), w), lambda: y[y > 0], lambda: y * torch.tensor(2.0), y[0].item)
    for read in hidden:  # inside torch, where no method of the tensor is asked
        with pytest.raises(AssertionError, match="reads a tensor's value"), every.NoReads():
            read()


@plans
def test_dead_history_is_dropped(name, options):
    """When the network is called, no prediction is alive but those that a later row reads."""
    plan, alive, most = make(name, options, nfe=12), [], 0

    def network(x, t):
        nonlocal most
        most = max(most, sum(r() is not None for r in alive))
        out = torch.tanh(x)
        alive.append(weakref.ref(out))
        return out

    noise = torch.randn(2, *SHAPE)
    fd.sample(network, plan, noise, seeds=range(2))
    assert most <= plan.registers - 2  # the base and the new prediction have registers too


# ---- mistakes


X0 = Elementwise()
NOISE = torch.zeros(2, *SHAPE)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X0,), {"seeds": range(2)}, "no plan given"),
        ((X0, "ddim"), {}, "nothing to start from"),
        ((X0, "ddim", NOISE), {"start": NOISE}, "not both"),
        ((X0, "ddim", fd.noise.from_seeds([1, 2])), {"seeds": [1, 2]}, "not both"),
        ((X0, "ddim", fd.noise.from_seeds([1, 2])), {}, "give noise= or start="),
        ((BIMODAL.network(SCHEDULE), "ddim"), {"seeds": [1]}, "shape"),
        ((fd.Denoiser(lambda x, t: x, SCHEDULE, "x0"), "ddim"), {"seeds": [1]}, "shape"),
        ((X0, "ddim", torch.zeros(2, 3, 3)), {}, r"\(B, 2, 3, 3\) is wanted; given \(2, 3, 3\)"),
        ((X0, "ddim", torch.zeros(2, 2, 4, 4)), {}, r"is wanted; given \(2, 2, 4, 4\)"),
        ((X0, "ddim"), {"start": NOISE.int()}, "floating point"),
        ((X0, "ddpm", NOISE), {}, "draws 5 noises"),
        ((X0, "ddim", NOISE), {"seeds": [1, 2, 3]}, "3 seeds for a batch of 2"),
        ((X0, "ddim"), {"seeds": []}, "one or more whole numbers"),
        ((X0, "ddim"), {"seeds": [1.5]}, "whole numbers"),
        ((X0, "ddim"), {"seeds": 3}, "whole numbers"),
    ],
)
def test_mistakes_are_named(args, options, message):
    args = [make(a, {}) if isinstance(a, str) else a for a in args]
    with pytest.raises(FastdiffError, match=message) as caught:
        fd.sample(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 3, 5])
def test_a_bad_prediction_names_its_row_and_time(row, value):
    plan = make("unipc-2", {})

    def network(x, t):
        d = torch.tanh(x)
        if t == plan.rows[row].t:
            d[1] = value
        return d

    with pytest.raises(NonFiniteError, match=rf"row {row} of 6 \(t = {plan.rows[row].t:g}\) for 1 of 3 samples"):
        fd.sample(network, plan, torch.ones(3, *SHAPE))


def test_a_bad_prediction_after_rows_without_a_call_is_counted_right():
    plan = make("ddim", {})
    idle = dataclasses.replace(plan.rows[0], store=(), next=fd.plans.IDENTITY, base=fd.plans.IDENTITY)
    longer = dataclasses.replace(plan, rows=(idle, *plan.rows))
    assert longer.nfe == plan.nfe
    with pytest.raises(NonFiniteError, match="row 1 of 7"):
        fd.sample(lambda x, t: x * math.nan, longer, torch.ones(3, *SHAPE))


def test_a_bad_start_and_an_overflow_are_told_apart():
    with pytest.raises(NonFiniteError, match="the start holds"):
        fd.sample(X0, make("ddim", {}), torch.full((1, *SHAPE), math.nan))
    doubling = [fd.Row(1.0 - i / 2, 0.0, 1.0, fd.Weights(2.0), fd.plans.IDENTITY) for i in range(2)]
    big = fd.Plan("big", tuple(doubling), (0.0, 1.0), (1.0, 0.0), mean="waived: a test", spread="waived: a test")
    with pytest.raises(NonFiniteError, match=r"plan big overflowed torch.float16, every prediction being finite"):
        fd.sample(lambda x, t: x.clamp(-1, 1), big, torch.full((1, 4), 4e4), dtype=torch.float16)


def test_large_but_finite_samples_are_returned():
    """The cheap check sums the result: a sum that overflows is not an error."""
    plan = fd.plan("ddim", fd.schedule.edm(), 1)
    out = fd.sample(lambda x, t: torch.full_like(x, 3e38), plan, torch.zeros(4, 4))
    assert bool((out == 3e38).all())
