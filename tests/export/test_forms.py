"""Forms of an engine: the plan as an input, adaptive step size, any height and width, guidance rescale, bf16 and int8. Each goes
through the gate, and is run here by the runtime too."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastdiff as fd
from fastdiff.adaptive import Control
from fastdiff.errors import FastdiffError


class Small(nn.Module):
    """Two convolutions, a norm, time and three classes: a second to trace."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Conv2d(8, 1, 3, padding=1)
        self.classes = nn.Embedding(4, 8)
        self.null_label, self.config = 3, type("Config", (), {"num_classes": 4})()

    def forward(self, x, t, class_labels):
        h = self.norm(self.first(x)) + self.classes(class_labels).to(x.dtype)[:, :, None, None]
        return self.last(torch.sin(h + (3 * t).to(x.dtype).view(-1, 1, 1, 1)))


class Tame(Small):
    """What an eps network on a discrete schedule is like: near x, and smooth over its times, 0 to 999. The other, of random
    weights, turns 500 times between those, and its samples are divided by an alpha of 0.006: a change of the noise by 1e-7 moves
    them by 0.013."""

    def forward(self, x, t, class_labels):
        return x + 0.1 * super().forward(x, t / 1000, class_labels)


NET, TAME = Small().eval().requires_grad_(False), Tame().eval().requires_grad_(False)
LABELS = [0, 2, 1]


def denoiser(schedule=None, prediction="v", scale=1.0, net=NET, **guidance):
    den = fd.Denoiser(net, schedule or fd.schedule.vp_cosine(), prediction, shape=(1, 8, 8))
    if scale != 1.0 or guidance:
        return fd.guide.cfg(den.bind(class_labels=torch.zeros(1, dtype=torch.long)), scale, **guidance)
    return den


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """The network is traced once for each form: schedule, prediction and plan come after that."""
    from fastdiff.export import network

    trace, kept = network.trace, {}

    def known(den, form=None):
        if (den.network, form) not in kept:
            kept[den.network, form] = trace(den, form)
        return replace(kept[den.network, form], denoiser=den)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "trace", known)
        yield


def engine(tmp_path, den, plan, **wish):
    from fastdiff.export.folder import Wish, export
    from fastdiff.export.runtime import Engine

    export(den, plan, tmp_path / "e", Wish(**wish))
    return Engine(tmp_path / "e", provider="cpu", threads=1)


def eager(plan, scale=1.0, shape=(1, 8, 8), den=None, **guidance):
    den = (den or denoiser()).bind(class_labels=torch.tensor(LABELS))
    den = fd.guide.cfg(den, scale, **guidance) if scale != 1.0 else den
    den.shape = shape
    return fd.sample(den, plan, seeds=[4, 5, 6]).numpy()


def pictures(folder, out, *options):
    """What run.py makes of seeds 4 to 6, whose class is 0: the engine names none."""
    line = [sys.executable, folder / "run.py", "--seeds", "4-6", "--out", out, *options]
    subprocess.run(list(map(str, line)), check=True)
    return np.stack([np.asarray(Image.open(p)) for p in sorted(out.glob("seed*.png"))])[:, None] / 255


@pytest.fixture(scope="module")
def any_plan(tmp_path_factory, traced_once):
    den = denoiser(scale=2.0, interval=(0.05, 20.0))
    return engine(tmp_path_factory.mktemp("any"), den, fd.plan("unipc-2", den, 5), plan_input=True, multiple=2)


@pytest.mark.parametrize("solver, nfe", [
    ("unipc-2", 5), ("ddim", 1), ("dpmpp-2m", 9), ("heun", 7), ("ipndm-3", 12), ("deis-tab-3", 4),
])  # fmt: skip
def test_one_engine_runs_many_plans(solver, nfe, any_plan):
    from fastdiff.export.runtime import Ask

    plan = fd.plan(solver, denoiser(), nfe)
    given = None if (solver, nfe) == ("unipc-2", 5) else plan
    want = eager(plan, 2.0, interval=(0.05, 20.0))
    np.testing.assert_allclose(any_plan.sample([4, 5, 6], LABELS, Ask(plan=given)), want, atol=5e-5 * np.abs(want).max())


def test_any_height_and_width(any_plan, tmp_path):
    from fastdiff.export.runtime import Ask

    plan = fd.plan("unipc-2", denoiser(), 5)
    for size in ((4, 10), (12, 2)):
        want = eager(plan, 2.0, (1, *size), interval=(0.05, 20.0))
        np.testing.assert_allclose(any_plan.sample([4, 5, 6], LABELS, Ask(size=size)), want, atol=5e-5)
    by_hand = pictures(any_plan.folder, tmp_path / "o", "--size", 4, 10)
    np.testing.assert_allclose(by_hand, any_plan.images([4, 5, 6], [0, 0, 0], Ask(size=(4, 10))), atol=0.51 / 255)
    with pytest.raises(FastdiffError, match="multiples of 2; given 5x4"):
        any_plan.sample([4], [0], Ask(size=(5, 4)))


def test_what_a_plan_as_input_must_fit(any_plan):
    from fastdiff.export.runtime import Ask

    with pytest.raises(FastdiffError, match="has room for 5, 0 and 0: export with this plan and --plan-input"):
        any_plan.sample([4], [0], Ask(plan=fd.plan("ddpm", denoiser(), 3)))
    with pytest.raises(FastdiffError, match="without rtol: export with --adaptive"):
        any_plan.sample([4], [0], Ask(rtol=0.1))


def test_a_stochastic_plan_as_input(tmp_path):
    from fastdiff.export.runtime import Ask

    run = engine(tmp_path, denoiser(), fd.plan("euler-ancestral", denoiser(), 4), plan_input=True)
    for solver, nfe in (("euler-ancestral", 4), ("ddpm", 6), ("dpmpp-2m-sde", 5), ("ddim", 3)):
        plan = fd.plan(solver, denoiser(), nfe)
        np.testing.assert_allclose(run.sample([4, 5, 6], LABELS, Ask(plan=plan)), eager(plan), atol=5e-5)


@pytest.mark.parametrize("schedule, prediction", [
    ("flow", "flow"),  # begins where the log-SNR is infinite
    *(pytest.param(*c, marks=pytest.mark.slow) for c in (("vp_cosine", "v"), ("edm", "edm"), ("discrete", "eps"))),
])  # fmt: skip
def test_adaptive_step_size(schedule, prediction, tmp_path):
    """The same evaluations and samples as the eager sampler with one step size for the batch, at any tolerance."""
    from fastdiff.export.adaptive import SOLVER
    from fastdiff.export.runtime import Ask

    table = fd.schedule.vp_from_alphas_cumprod(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    chosen = table if schedule == "discrete" else getattr(fd.schedule, schedule)()
    den = denoiser(chosen, prediction, net=TAME if prediction == "eps" else NET)
    run = engine(tmp_path, den, Control())
    bound = den.bind(class_labels=torch.tensor(LABELS))
    for tolerance in (1e-2, 1e-3):
        want = fd.sample_adaptive(bound, seeds=[4, 5, 6], rtol=tolerance, atol=tolerance, solver=SOLVER, together=True)
        got = run.sample([4, 5, 6], LABELS, Ask(rtol=tolerance, atol=tolerance))
        assert run.evaluations == int(want.nfe[0]) and len(set(want.nfe.tolist())) == 1
        np.testing.assert_allclose(got, want.x.numpy(), atol=1e-4 * max(1.0, float(want.x.abs().max())))
    assert run.evaluations > 20 and not (tmp_path / "e" / "plan.json").exists()
    np.testing.assert_allclose(pictures(run.folder, tmp_path / "o"), run.images([4, 5, 6], [0, 0, 0]), atol=0.51 / 255)


def test_adaptive_with_guidance_in_an_interval_runs_out(tmp_path):
    from fastdiff.export.adaptive import SOLVER
    from fastdiff.export.runtime import Ask

    den = denoiser(scale=1.2, interval=(0.1, 5.0))
    run = engine(tmp_path, den, Control(max_nfe=20))
    bound = fd.guide.cfg(denoiser().bind(class_labels=torch.tensor(LABELS)), 1.2, interval=(0.1, 5.0))
    with pytest.warns(UserWarning, match="reached max_nfe"):
        want = fd.sample_adaptive(bound, seeds=[4, 5, 6], rtol=1e-4, atol=1e-4, max_nfe=20, solver=SOLVER, together=True)
    got = run.sample([4, 5, 6], LABELS, Ask(rtol=1e-4, atol=1e-4))
    assert run.evaluations == int(want.nfe[0]) <= 20 and bool(want.unfinished.all())
    # where the path is cut depends on every step taken: a change of the noise by 1e-7 moves the eager samples by up to 4e-4
    np.testing.assert_allclose(got, want.x.numpy(), atol=2e-3 * float(want.x.abs().max()))
    assert all(f["own"] > 0 for f in run.manifest["parity"]["sampler"])


def test_guidance_rescale(tmp_path):
    den = denoiser(scale=4.0, rescale=0.7)
    plan = fd.plan("dpmpp-2m", den, 5)
    got = engine(tmp_path, den, plan).sample([4, 5, 6], LABELS)
    np.testing.assert_allclose(got, eager(plan, 4.0, rescale=0.7), atol=5e-5)
    assert np.abs(got - eager(plan, 4.0)).max() > 1e-2, "the rescale must act, or the test says nothing"


def test_bf16_is_written_unverified_and_says_so(tmp_path):
    from onnx import TensorProto, load

    from fastdiff.export.folder import Wish, export

    plan = fd.plan("ddim", denoiser(), 2)
    with pytest.raises(FastdiffError, match="bf16 on CUDA alone, which is not here; --unverified writes"):
        export(denoiser(), plan, tmp_path / "e", Wish(precision="bf16"))
    assert not any(tmp_path.iterdir())
    manifest = export(denoiser(), plan, tmp_path / "e", Wish(precision="bf16", unverified=True))
    assert manifest["verified"] is False and "CUDA alone" in manifest["why"] and manifest["parity"]["sampler"] == []
    kinds = {t.data_type for t in load(tmp_path / "e" / "network.onnx").graph.initializer if len(t.dims) == 4}
    assert kinds == {TensorProto.BFLOAT16}


def test_int8_is_calibrated_on_the_samplers_own_calls(tmp_path):
    from onnx import TensorProto, load

    den = denoiser(scale=2.0)
    plan = fd.plan("dpmpp-2m", den, 6)
    run = engine(tmp_path, den, plan, precision="int8")
    figures = run.manifest["parity"]["sampler"]
    assert all(1e-5 < f["rms"] < 0.05 for f in figures), figures
    graph = load(tmp_path / "e" / "network.onnx").graph
    assert sum(n.op_type == "QuantizeLinear" for n in graph.node) >= 2
    assert TensorProto.INT8 in {t.data_type for t in graph.initializer}
    off = run.sample([4, 5, 6], LABELS) - eager(plan, 2.0)
    assert 1e-4 < np.sqrt(np.mean(off**2)) < 0.05


@pytest.mark.slow
def test_opsets(tmp_path):
    plan = fd.plan("ddim", denoiser(), 2)
    run = engine(tmp_path, denoiser(), plan, opset=22)
    assert run.manifest["opset"] == 22
    np.testing.assert_allclose(run.sample([4, 5, 6], LABELS), eager(plan), atol=5e-5)


def test_a_fixed_engine_takes_no_plan_and_no_size(tmp_path):
    from fastdiff.export.runtime import Ask

    plan = fd.plan("ddim", denoiser(), 2)
    run = engine(tmp_path, denoiser(), plan)
    with pytest.raises(FastdiffError, match="holds one plan; export with --plan-input"):
        run.sample([4], [0], Ask(plan=plan))
    with pytest.raises(FastdiffError, match="makes 8x8 alone; given 16x8: export with --dynamic-size"):
        run.sample([4], [0], Ask(size=(16, 8)))


def test_a_learned_plan_as_input(any_plan):
    from fastdiff.export.runtime import Ask

    plan = fd.plan("ipndm-3", denoiser(), 5)
    moved = replace(plan, rows=tuple(replace(r, t=r.t * 0.98) for r in plan.rows))
    got = any_plan.sample([4, 5, 6], LABELS, Ask(plan=moved))
    np.testing.assert_allclose(got, eager(moved, 2.0, interval=(0.05, 20.0)), atol=5e-5)
    assert json.loads((any_plan.folder / "manifest.json").read_text())["plan_input"]["states"] == 5


FAMILIES = ["ddim", "heun", "lms-3", "dpmpp-2m", "dpmpp-3s", "unipc-2", "deis-tab-3", "ipndm-3", "ddpm", "euler-ancestral",
            "dpmpp-2m-sde"]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("solver", FAMILIES)
def test_parity_by_plan_family(solver, precision):
    """The table of the issue at small size: every family in both precisions at both batch sizes, judged as the gate does."""
    import onnxruntime

    from fastdiff.export import network, parity
    from fastdiff.export.network import Form
    from fastdiff.export.sampler import sampler_model

    den = denoiser()
    plan = fd.plan(solver, den, 5)
    traced = network.trace(den, Form(precision))
    model, _ = sampler_model(traced, plan)
    run = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    subject = parity.Subject(den, plan, traced.conditions, precision, 0, {}, 11)
    for batch in parity.BATCHES:
        found = parity.sampler_figures(run, subject, batch)
        parity.judge("sampler", found, precision)
        assert found["rms"] > 0 and (found["torch_rms"] > 1e-6 if precision == "fp16" else found["max"] < 1e-4)
