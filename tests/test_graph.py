"""The captured loop's bookkeeping, on the CPU: the loop that a GPU would replay, called through the same buffers and table."""

import every
import pytest
import torch

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.fused import matrices
from fastdiff.graph import Captured, Layout, Moment
from fastdiff.noise import stacked
from fastdiff.sampling import run

CPU = torch.device("cpu")


def captured(den, plan, device=CPU):
    """Where a GPU would replay kernels, the loop over the buffers itself."""
    return Captured(den, plan, device, record=lambda loop: loop)


def eager(den, plan, start, noises):
    return run(den, plan, start, stacked(noises))


@every.every
def test_every_plan_runs_through_its_table(case):
    """In float64 the table is exact. In float32 a row rounds elsewhere than the eager loop: at most twice its error."""
    plan, den = every.make(case), every.denoiser()
    start, noises = every.given(plan)
    loop = captured(den, plan)
    double = eager(den, plan, start, noises)
    scale = max(1.0, float(double.abs().max()))
    assert (loop.execute(start, noises) - double).abs().max() <= 1e-12 * scale

    single, found = eager(den, plan, start.float(), noises.float()), loop.execute(start.float(), noises.float())
    assert found.dtype == torch.float32
    assert (found - double).abs().max() <= 2e-6 * scale + 2 * (single - double).abs().max()
    assert set(loop.captures) == {(tuple(start.shape), torch.float64), (tuple(start.shape), torch.float32)}
    assert not [t for t in den.levels if isinstance(t, Moment)]  # the denoiser is left as it was


ONE_LAYOUT = [case for case in every.CASES if case not in ("dpmpp-2s-grid", "dpmpp-3s-grid", "tcd", "consistency", "noise first")]


@pytest.mark.parametrize("case", ONE_LAYOUT)
def test_another_plan_of_the_solver_needs_no_new_capture(case):
    den, first, second = every.denoiser(), every.make(case, grid="karras"), every.make(case, grid="uniform_t")
    records = []

    def record(loop):
        records.append(loop)
        return loop

    loop = Captured(den, first, CPU, record)
    start, noises = every.given(first)
    one = loop.execute(start, noises)
    loop.use(second)
    start, noises = every.given(second)
    two = loop.execute(start, noises)
    expected = eager(den, second, start, noises)
    torch.testing.assert_close(two, expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))
    assert len(records) == len(loop.captures) == 1
    loop.use(first)
    start, noises = every.given(first)
    assert torch.equal(loop.execute(start, noises), one) and not torch.equal(one, two)


@every.every
def test_nothing_in_the_loop_waits_for_the_host_or_comes_from_it(case):
    """What a capture would not allow."""
    plan, den = every.make(case), every.denoiser()
    start, noises = every.given(plan)
    loop = captured(den, plan)
    wanted = loop.execute(start, noises)
    (only,) = loop.captures.values()
    only.out.zero_()
    with every.NoReads():
        only.replay()
    assert torch.equal(only.out, wanted)


@pytest.mark.parametrize("case", ["unipc-3", "lms-4", "ddpm learned", "noise first"])
def test_it_runs_on_tensors_that_have_no_values(case):
    plan = every.make(case)
    start, noises = (v.to("meta") for v in every.given(plan))
    assert captured(every.denoiser(), plan, torch.device("meta")).execute(start, noises).shape == start.shape


def test_it_is_called_as_sample_and_a_capture_serves_a_shape_and_dtype():
    den, plan = every.denoiser(), every.make("ddpm")
    loop = captured(den, plan)
    wanted = fd.sample(den, plan, seeds=range(3))
    torch.testing.assert_close(loop(seeds=range(3)), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loop(seeds=range(3), brownian=True), fd.sample(den, plan, seeds=range(3), brownian=True),
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    again, other = loop(seeds=range(3)), loop(seeds=[7, 8, 9])
    assert torch.equal(loop(seeds=range(3)), again) and not torch.equal(again, other)  # a result is no buffer
    assert len(loop.captures) == 1
    loop(seeds=[1])
    loop(seeds=range(3), dtype=torch.float64)
    assert [(shape[0], dtype) for shape, dtype in loop.captures] == [(3, torch.float32), (1, torch.float32), (3, torch.float64)]


def test_a_condition_changed_in_place_is_seen():
    def network(x, t, shift):
        return torch.tanh(x) + shift.view(-1, 1, 1, 1)

    shift = torch.zeros(2)
    den = every.denoiser(network=network).bind(shift=shift)
    plan = every.make("dpmpp-2m")
    loop = captured(den, plan)
    before = loop(seeds=[0, 1])
    shift.fill_(0.3)
    torch.testing.assert_close(loop(seeds=[0, 1]), fd.sample(den, plan, seeds=[0, 1]), rtol=1e-5, atol=1e-5)
    assert (loop(seeds=[0, 1]) - before).abs().max() > 0.05


def shifted(shift):
    return every.denoiser(network=lambda x, t, shift: torch.tanh(x + t.view(-1, 1, 1, 1)) + shift).bind(shift=shift)


GUIDED = {
    "cfg": lambda plan: fd.guide.cfg(shifted(0.2), 3.0, negative={"shift": 0.0}),
    "interval": lambda plan: fd.guide.cfg(shifted(0.2), 3.0, negative={"shift": 0.0}, interval=(0.3, 3.0)),
    "composed": lambda plan: fd.guide.compose(shifted(0.2), [{"shift": 0.2}, {"shift": 0.4}], [1.5, 0.5], {"shift": 0.0}),
    "clip": lambda plan: fd.guide.clip(shifted(0.2)),
    "cfgpp": lambda plan: fd.guide.cfgpp(shifted(0.2), 0.6, plan, negative={"shift": 0.0}),
    "loss": lambda plan: fd.guide.loss(shifted(0.2), lambda x: x.square().flatten(1).sum(1), 0.1),
    "autoguidance": lambda plan: fd.guide.autoguidance(  # two networks of two prediction types: two levels a call
        shifted(0.2), fd.Denoiser(lambda x, t: x * 0.5, every.SCHEDULES["vp_cosine"], "eps", shape=every.SHAPE), 2.0
    ),
    "both": lambda plan: fd.Denoiser(  # no guidance, but a network of two outputs
        lambda x, t: torch.cat([torch.tanh(x), torch.cos(x + t.view(-1, 1, 1, 1))], 1), every.SCHEDULES["vp_cosine"], "both",
        shape=every.SHAPE,
    ),
}
LEVELS_ALONE = ("cfg", "composed", "clip", "autoguidance", "both")  # take nothing else from the time


@pytest.mark.parametrize("kind", GUIDED)
def test_guidance_is_captured(kind):
    plan, other = every.make("unipc-2", grid="karras"), every.make("unipc-2", grid="uniform_t")
    den = GUIDED[kind](plan)
    loop = captured(den, plan)
    start, noises = every.given(plan)
    torch.testing.assert_close(loop.execute(start, noises), eager(den, plan, start, noises), rtol=0, atol=1e-12)
    if kind in LEVELS_ALONE:
        loop.use(other)
        start, noises = every.given(other)
        torch.testing.assert_close(loop.execute(start, noises), eager(den, other, start, noises), rtol=0, atol=1e-12)
    else:
        with pytest.raises(FastdiffError, match="differs in where guidance acts"):
            loop.use(other)
        assert loop.plan is plan
        torch.testing.assert_close(loop.execute(start, noises), eager(den, plan, start, noises), rtol=0, atol=1e-12)


def test_a_denoiser_that_is_any_callable_keeps_its_times():
    def curved(x, t):
        return torch.sin(x + t)

    plan = every.make("dpmpp-3m")
    loop = captured(curved, plan)
    start, noises = every.given(plan)
    torch.testing.assert_close(loop.execute(start, noises), eager(curved, plan, start, noises), rtol=0, atol=1e-12)
    with pytest.raises(FastdiffError, match="takes from the times"):
        loop.use(every.make("dpmpp-3m", grid="karras"))


def test_the_table_holds_the_weights_and_then_the_levels():
    plan, den = every.make("ddim", nfe=2), every.denoiser()
    layout, table = Layout.of(den, plan)
    steps = matrices(plan, den)
    levels = [v for row in plan.rows for c, told in [den.level(row.t)] for v in (*c, told)]
    assert table == [w for step in steps for w in step.weights.ravel()] + levels
    assert layout.rows == tuple(step.row for step in steps) and layout.choices == ((), ())


def test_mistakes_are_named():
    den, plan = every.denoiser(), every.make("unipc-2")
    loop = captured(den, plan)
    kept = loop(seeds=[0])
    message = r"captured for 6 rows \(unipc-2\); plan unipc-2 has 8: capture it anew"
    for wrong, expected in (
        (every.make("unipc-2", nfe=8), message),
        (every.make("unipc-3"), "unipc-3 differs in what its rows sum, keep or draw"),
        (every.make("ddpm"), "ddpm differs in what its rows sum"),
    ):
        with pytest.raises(FastdiffError, match=expected) as caught:
            loop.use(wrong)
        assert "\n" not in str(caught.value) and loop.plan is plan
    assert torch.equal(loop(seeds=[0]), kept)
    with pytest.raises(FastdiffError, match=r"float32 or float64; given torch\.float16"):
        loop(seeds=[0], dtype=torch.float16)
    with pytest.raises(FastdiffError, match="no plan given"):
        captured(den, None)


def test_without_a_gpu_it_is_an_error_to_ask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FastdiffError, match="needs an NVIDIA GPU, and torch sees none"):
        fd.capture(every.denoiser(), every.make("ddim"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(FastdiffError, match="it is on cpu: move it first"):
        fd.capture(every.denoiser(), every.make("ddim"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="replaying a CUDA graph needs an NVIDIA GPU")
@pytest.mark.parametrize("case", ["ddim", "heun churn", "unipc-3", "lms-4", "ddpm", "noise first"])
def test_the_captured_graph_on_a_gpu(case):
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 2, 3, padding=1))
    network.to("cuda").requires_grad_(False)
    den = fd.Denoiser(Timed(network), every.SCHEDULES["vp_cosine"], "v", shape=every.SHAPE)
    plan = every.make(case)
    loop = fd.capture(den, plan)
    for seeds in (range(3), range(3, 6)):
        torch.testing.assert_close(loop(seeds=seeds), fd.sample(den, plan, seeds=seeds), rtol=1e-3, atol=1e-3)


class Timed(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t):
        return self.network(x) * torch.cos(t).view(-1, 1, 1, 1)
