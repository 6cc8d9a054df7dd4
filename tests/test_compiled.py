"""The whole loop as one graph: torch.compile without a break, and torch.export, for every solver."""

import every
import pytest
import torch

import fastdiff as fd
from fastdiff.compiled import Sampler
from fastdiff.errors import FastdiffError
from fastdiff.noise import stacked
from fastdiff.sampling import run

FAST = ("unipc-2", "ddpm learned", "noise first")  # a predictor-corrector, learned variance, a noise before the first row
CALLS = 3
some = pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in every.CASES]
)


def make(case):
    return every.make(case, nfe=CALLS, **({"grid": [0.9, 0.5, 0.2]} if case == "noise first" else {}))


def given(plan):
    return every.given(plan, torch.float32)


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()


@torch.no_grad()
@some
def test_the_loop_compiles_as_one_graph(case):
    """Under fullgraph=True a break is an error; graph by graph the same operations, so the same bits."""
    plan, den = make(case), every.denoiser()
    start, noises = given(plan)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    found = fd.compile(den, plan, backend=backend).execute(start, noises)
    assert torch.equal(found, run(den, plan, start, stacked(noises)))
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if node.target is torch.tanh]  # one in each call of the network
    assert len(calls) == plan.nfe == CALLS


@torch.no_grad()
@some
def test_the_loop_exports(case):
    plan, den = make(case), every.denoiser()
    start, noises = given(plan)
    program = torch.export.export(Sampler(den, plan), (start, noises))
    wanted = run(den, plan, start, stacked(noises))
    assert torch.equal(program.module()(start, noises), wanted)
    other = torch.flip(start, (0,))  # the inputs are read, not baked in
    assert torch.equal(program.module()(other, noises), run(den, plan, other, stacked(noises)))


class Weighted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(2, 2, 1).requires_grad_(False)

    def forward(self, x, t, shift=0.0):
        return torch.tanh(self.inner(x)) * torch.cos(t).view(-1, 1, 1, 1) + shift


@torch.no_grad()
def test_an_exported_sampler_holds_each_network_once_and_takes_any_batch():
    den = every.denoiser(network=Weighted())
    guided = fd.guide.cfg(den, 2.0, {"shift": 0.3}, {"shift": 0.0}, interval=(0.1, 10.0))
    plan = make("unipc-2")
    batch = torch.export.Dim("batch", min=2)
    start, noises = given(plan)
    program = torch.export.export(Sampler(guided, plan), (start, noises), dynamic_shapes=({0: batch}, {1: batch}))
    assert sorted(program.state_dict) == ["networks.0.inner.bias", "networks.0.inner.weight"]
    for x in (start, torch.cat([start, start])):
        torch.testing.assert_close(program.module()(x, x.new_empty(0, *x.shape)), run(guided, plan, x), rtol=0, atol=1e-6)


def test_it_is_called_as_sample_and_compiled_once():
    den, plan = every.denoiser(network=Weighted()), make("ddpm")
    fast = fd.compile(den, plan, backend="aot_eager")
    torch.testing.assert_close(fast(seeds=range(3)), fd.sample(den, plan, seeds=range(3)), rtol=0, atol=1e-6)
    fd.sample(den, every.make("unipc-2"), seeds=[0])  # the denoiser learns of other times
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(
            fast(seeds=range(3, 6), brownian=True), fd.sample(den, plan, seeds=range(3, 6), brownian=True), rtol=0, atol=1e-6
        )


@pytest.mark.slow
def test_more_plans_than_torch_keeps_graphs_of_one_function():
    den = every.denoiser()
    for case in list(every.CASES)[:10]:
        plan = every.make(case, nfe=2)
        assert torch.equal(fd.compile(den, plan, backend="eager")(seeds=[0, 1]), fd.sample(den, plan, seeds=[0, 1]))


@pytest.mark.slow
def test_inductor():
    den, plan = every.denoiser(network=Weighted()), make("unipc-2")
    torch.testing.assert_close(fd.compile(den, plan)(seeds=range(3)), fd.sample(den, plan, seeds=range(3)), rtol=1e-5, atol=1e-5)


def test_mistakes_are_named():
    den, plan = every.denoiser(), make("ddpm")
    start, noises = given(plan)
    with pytest.raises(FastdiffError, match="plan ddpm draws 2 noises; given 0"):
        Sampler(den, plan)(start)
    with pytest.raises(FastdiffError, match="draws 2 noises; given 1"):
        Sampler(den, plan)(start, noises[:1])
    with pytest.raises(FastdiffError, match="no plan given"):
        fd.compile(den)
    with pytest.raises(FastdiffError, match="nothing to start from"):
        fd.compile(den, plan, backend="eager")()
