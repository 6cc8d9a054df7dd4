"""sampler.onnx gives what `fd.sample` gives: every solver, guided or not, as a Loop or unrolled, any batch size."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.guide import Guided

LABELS = torch.tensor([0, 1, 2, 0, 1])
CLOSE = 5e-5  # a random network magnifies float32's rounding; what an export may differ by is 1e-4
STOCHASTIC = ["ddpm", "euler-ancestral"]


def engine(traced, plan, guided=None, unroll=False):
    import onnxruntime

    from fastdiff.export.evaluate import contrast_of
    from fastdiff.export.sampler import sampler_model

    model, _ = sampler_model(traced, plan, contrast_of(guided) if guided else None, unroll)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def difference(run, denoiser, plan, labels=LABELS, **feed):
    """The largest difference between engine and eager, relative to the largest value."""
    count = len(labels)
    source, shape = fd.noise.from_seeds(range(count)), (count, *denoiser.shape)
    draws = [source(k, shape, torch.device("cpu")).numpy() for k in range(plan.draws + 1)]
    feed = {"noise": draws[0], "class_labels": labels.numpy(), **feed}
    if plan.draws:
        feed["noises"] = np.stack(draws[1:])
    want = fd.sample(denoiser, plan, seeds=range(count))
    x, images = run.run(None, feed)
    np.testing.assert_allclose(images, denoiser.images(torch.from_numpy(x)).numpy(), atol=1e-6)
    return float(np.abs(x - want.numpy()).max() / max(1.0, float(want.abs().max())))


# the grids of their papers: on the recommended ones a network of random weights multiplies roundings to more than the bound
GRIDS = {"dpm-solver-3s": "uniform_lambda", "dpm-fast": "uniform_lambda", "pndm": "uniform_t"}


@pytest.mark.parametrize("solver", list(fd.list_solvers()))
def test_every_solver(solver, tiny_traced, tiny_denoiser):
    plan = fd.plan(solver, tiny_denoiser, 6, grid=GRIDS.get(solver))
    # eps forms cancel weights that are hundreds of times their sum, and eight float32 roundings of the largest stay
    largest = max(sum(map(abs, w.values)) for row in plan.rows for w in (row.next, row.base))
    close = max(CLOSE, 8 * 2.0**-24 * largest)
    assert difference(engine(tiny_traced, plan), tiny_denoiser.bind(class_labels=LABELS), plan) < close


@pytest.mark.parametrize("solver, options", [
    ("euler", {"s_churn": 40.0}), ("heun", {"s_churn": 40.0}), ("ddim", {"eta": 0.5}), ("ddpm", {}), ("unipc-3", {}),
])  # fmt: skip
@pytest.mark.parametrize("nfe", [1, 2, 3, 12])
def test_options_and_budgets(solver, options, nfe, tiny_traced, tiny_denoiser):
    plan = fd.plan(solver, tiny_denoiser, nfe, **options)
    assert difference(engine(tiny_traced, plan), tiny_denoiser.bind(class_labels=LABELS), plan) < CLOSE


@pytest.mark.parametrize("solver", ["unipc-2", "dpmpp-3s", *STOCHASTIC])
@pytest.mark.parametrize("guided", [False, True])
def test_unrolled(solver, guided, tiny_traced, tiny_denoiser):
    plan = fd.plan(solver, tiny_denoiser, 4)
    den = tiny_denoiser.bind(class_labels=LABELS)
    den = fd.guide.cfg(den, 2.0) if guided else den
    feed = {"guidance_scale": np.array(2.0, np.float32)} if guided else {}
    run = engine(tiny_traced, plan, den if guided else None, unroll=True)
    assert difference(run, den, plan, **feed) < CLOSE


@pytest.mark.parametrize("solver", ["dpmpp-2m", "heun", "euler-ancestral"])
def test_one_engine_serves_every_scale_and_batch(solver, tiny_traced, tiny_denoiser):
    plan = fd.plan(solver, tiny_denoiser, 5)
    run = engine(tiny_traced, plan, fd.guide.cfg(tiny_denoiser.bind(class_labels=LABELS), 2.0))
    for scale in (0.0, 1.0, 1.5, 4.0):
        for labels in (LABELS, LABELS[:1]):
            den = fd.guide.cfg(tiny_denoiser.bind(class_labels=labels), scale)
            assert difference(run, den, plan, labels, guidance_scale=np.array(scale, np.float32)) < CLOSE
    plain = tiny_denoiser.bind(class_labels=LABELS)
    assert difference(run, plain, plan, guidance_scale=np.array(4.0, np.float32)) > 1e-3, "the scale must act"


def test_guidance_acts_in_its_interval_alone(tiny_traced, tiny_denoiser):
    plan = fd.plan("dpmpp-2m", tiny_denoiser, 6)
    scale = {"guidance_scale": np.array(3.0, np.float32)}
    whole = fd.guide.cfg(tiny_denoiser.bind(class_labels=LABELS), 3.0)
    within = fd.guide.cfg(tiny_denoiser.bind(class_labels=LABELS), 3.0, interval=(0.2, 2.0))
    nowhere = fd.guide.cfg(tiny_denoiser.bind(class_labels=LABELS), 3.0, interval=(1e6, 2e6))
    assert difference(engine(tiny_traced, plan, within), within, plan, **scale) < CLOSE
    assert difference(engine(tiny_traced, plan, within), whole, plan, **scale) > 1e-3
    assert difference(engine(tiny_traced, plan, nowhere), nowhere, plan, **scale) < CLOSE


def test_a_negative_condition_of_its_own_is_an_input(tiny_denoiser):
    from fastdiff.export.network import trace

    other = torch.tensor([1, 2, 0, 2, 2])
    den = tiny_denoiser.bind(class_labels=LABELS)
    guided = fd.guide.cfg(den, 2.0, negative={"class_labels": other})
    plan = fd.plan("ddim", den, 3)
    run = engine(trace(den), plan, guided)
    assert [i.name for i in run.get_inputs()] == ["noise", "class_labels", "negative_class_labels", "guidance_scale"]
    feed = {"guidance_scale": np.array(2.0, np.float32), "negative_class_labels": other.numpy()}
    assert difference(run, guided, plan, **feed) < CLOSE


def test_a_learned_plan_is_told_its_own_times(tiny_traced, tiny_denoiser):
    """A tuned plan's row.t is not the time of its level; scalars and c_noise are those of row.t, as in the eager denoiser."""
    plan = fd.plan("unipc-2", tiny_denoiser, 6)
    moved = replace(plan, rows=tuple(replace(r, t=r.t * 0.97) for r in plan.rows))
    run, den = engine(tiny_traced, moved), tiny_denoiser.bind(class_labels=LABELS)
    assert difference(run, den, moved) < CLOSE
    assert difference(run, den, plan) > 1e-3, "the shift must show, or the test says nothing"


@pytest.mark.parametrize("schedule, prediction", [("edm", "edm"), ("flow", "flow"), ("ve", "eps"), ("zero_snr", "v")])
def test_other_schedules(schedule, prediction, tiny_traced):
    zero = fd.schedule.vp_linear().zero_terminal_snr()
    s = zero if schedule == "zero_snr" else getattr(fd.schedule, schedule)()
    den = fd.Denoiser(tiny_traced.denoiser.network, s, prediction, shape=(1, 8, 8))
    plan = fd.plan("unipc-2", den, 5)
    assert difference(engine(replace(tiny_traced, denoiser=den), plan), den.bind(class_labels=LABELS), plan) < CLOSE


def test_two_outputs_are_joined_as_in_the_denoiser():
    import onnxruntime

    from fastdiff.export.graph import FLOAT, Graph, joined, value, weight_tensor
    from fastdiff.prediction import coefficients
    from fastdiff.prediction import joined as wanted

    f = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    for alpha, sigma in ((0.6, 0.8), (0.0, 1.0), (1.0, 3.0)):
        c, g = coefficients("both", alpha, sigma), Graph()
        g.add("Identity", joined(g, "f", weight_tensor(g, c.c_skip), weight_tensor(g, c.c_out)), into=["v"])
        model = g.model("joined", [value("f", FLOAT, (2, 6, 3, 3))], [value("v", FLOAT, (2, 3, 3, 3))], 20)
        run = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        want = wanted(f[:, :3], f[:, 3:], c).numpy()
        np.testing.assert_allclose(run.run(None, {"f": f.numpy()})[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_network_of_two_outputs():
    """x0 and eps in one call, joined in the graph, guided too; network.onnx takes a time of each sample's own."""
    import onnxruntime

    from fastdiff.export.network import network_model, trace

    net = tiny.network(out_channels=2)
    den = fd.Denoiser(net, fd.schedule.vp_cosine(), "both", shape=(1, 8, 8), time=lambda t: 1000 * t)
    traced, plan, bound = trace(den), fd.plan("unipc-2", den, 4), den.bind(class_labels=LABELS)
    assert difference(engine(traced, plan), bound, plan) < CLOSE
    guided = fd.guide.cfg(bound, 2.0)
    assert difference(engine(traced, plan, guided), guided, plan, guidance_scale=np.array(2.0, np.float32)) < CLOSE
    run = onnxruntime.InferenceSession(network_model(traced).SerializeToString(), providers=["CPUExecutionProvider"])
    x, t = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1)), np.linspace(0.1, 0.9, 5)
    got = run.run(None, {"x": x.numpy(), "t": t, "class_labels": LABELS.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, bound(x, torch.tensor(t)).numpy(), atol=1e-5)


def test_the_graph_holds_the_weights_once_and_little_else(tiny_traced, tiny_denoiser):
    from fastdiff.export.sampler import sampler_model

    weights = sum(len(t.raw_data) for t in tiny_traced.model.graph.initializer)
    for unroll in (False, True):
        model, columns = sampler_model(tiny_traced, fd.plan("unipc-2", tiny_denoiser, 8), unroll=unroll)
        assert weights < model.ByteSize() < weights + 600_000
        assert columns.values.shape[0] == 8 and columns.values.dtype == np.float32


def test_what_an_engine_cannot_hold_is_refused(tiny_traced, tiny_denoiser):
    from fastdiff.export.evaluate import contrast_of
    from fastdiff.export.sampler import sampler_model

    with pytest.raises(FastdiffError, match="at most 8, given 9"):
        sampler_model(tiny_traced, fd.plan("ddim", tiny_denoiser, 9), unroll=True)
    den = tiny_denoiser.bind(class_labels=LABELS)
    with pytest.raises(FastdiffError, match="no guidance inside guidance"):
        inner = fd.guide.cfg(den, 2.0)
        contrast_of(Guided(inner, inner.negative, 2.0, (0.0, float("inf")), 0.0))
    plus = fd.guide.cfgpp(den, 0.5, fd.plan("ddim", den, 4))
    for guided in (fd.guide.apg(den, 2.0), plus, fd.guide.cfg(fd.guide.clip(den), 2.0)):
        with pytest.raises(FastdiffError, match="apg or cfgpp"):
            contrast_of(guided)
    with pytest.raises(FastdiffError, match="same names and different values"):
        contrast_of(fd.guide.cfg(tiny_denoiser, 2.0, negative={"class_labels": LABELS}))
