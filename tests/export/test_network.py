"""network.onnx is the denoiser: every schedule, every prediction, any batch size, times to their last digit."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import fastdiff as fd
from fastdiff.errors import FastdiffError

CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
SCHEDULES = {
    **{n: getattr(fd.schedule, n)() for n in ("vp_linear", "vp_scaled_linear", "vp_cosine", "vp_sigmoid", "ve", "edm", "sub_vp",
                                              "flow", "trigflow")},
    "discrete": fd.schedule.vp_from_alphas_cumprod(CUMPROD),
    "shifted": fd.schedule.vp_cosine().shifted(2.0),
    "zero_snr": fd.schedule.vp_linear().zero_terminal_snr(),
}  # fmt: skip


def session(model, tmp_path):
    import onnx
    import onnxruntime

    from fastdiff.export.graph import check

    path = str(tmp_path / "model.onnx")
    onnx.save(model, path)
    check(path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def compare(traced, tmp_path, times, count=3):
    """The largest difference to the eager denoiser, relative to its largest value."""
    from fastdiff.export.network import network_model

    run = session(network_model(traced), tmp_path)
    x = torch.randn(count, *traced.shape, generator=torch.Generator().manual_seed(1))
    feed = {"x": x.numpy(), "t": np.asarray(times, np.float64)}
    bound = traced.denoiser
    if traced.conditions:
        labels = torch.arange(count) % 3
        bound, feed = bound.bind(class_labels=labels), {**feed, "class_labels": labels.numpy()}
    with torch.no_grad():
        want = bound(x, torch.tensor(feed["t"]))
    return float(np.abs(run.run(None, feed)[0] - want.numpy()).max() / want.abs().max())


FEW = [("vp_cosine", "v"), ("edm", "edm"), ("flow", "flow"), ("discrete", "eps")]
ALL = [*((schedule, "eps") for schedule in SCHEDULES), *(("vp_cosine", p) for p in ("edm", "flow", "score", "x0"))]


@pytest.mark.parametrize("schedule, prediction", [
    *FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FEW),
])  # fmt: skip
def test_it_is_the_denoiser(schedule, prediction, tiny_traced, tmp_path):
    s = SCHEDULES[schedule]
    den = fd.Denoiser(tiny_traced.denoiser.network, s, prediction, shape=(1, 8, 8))
    times = np.linspace(s.t_min, s.t_max * (1 - 1e-3), 3)
    assert compare(replace(tiny_traced, denoiser=den), tmp_path, times) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_batch_size(count, tiny_traced, tmp_path):
    assert compare(tiny_traced, tmp_path, np.linspace(0.1, 0.9, count), count) < 5e-6


def test_times_keep_their_digits(tiny_traced, tmp_path):
    """Near full noise an eps-network's x0 hangs on every digit of t, and of the schedule's own numbers: float64 throughout."""
    s = fd.schedule.vp_cosine(logsnr_min=-40.0)
    den = fd.Denoiser(tiny_traced.denoiser.network, s, "eps", shape=(1, 8, 8), time=lambda t: 500.0 + 0 * t)
    t = float(s.t_max)
    levels = [1 / float(s.alpha(v)) for v in (t, float(np.float32(t)))]
    assert abs(levels[1] / levels[0] - 1) > 1e-3, "rounding the time must matter here, or the test says nothing"
    assert compare(replace(tiny_traced, denoiser=den), tmp_path, [t] * 3) < 1e-5


def test_learned_variance_is_left_out(tmp_path):
    from fastdiff.export.network import trace

    traced = trace(fd.Denoiser(Small(2).eval(), fd.schedule.vp_linear(), "eps", shape=(1, 8, 8), time=lambda t: 999 * t))
    assert not traced.conditions
    assert compare(traced, tmp_path, [0.1, 0.5, 0.9]) < 5e-6


@pytest.mark.parametrize("target, opset, norm", [
    ("onnxruntime", 20, "InstanceNormalization"), ("tensorrt", 21, "GroupNormalization"),
])  # fmt: skip
def test_each_target_has_its_opset_and_norm(target, opset, norm):
    from fastdiff.export.network import Form, trace

    model = trace(fd.Denoiser(Small(), fd.schedule.vp_cosine(), "v", shape=(1, 8, 8)), Form(target=target)).model
    assert model.opset_import[0].version == opset
    assert norm in {node.op_type for node in model.graph.node}


def test_half_keeps_the_norms_in_float32():
    from onnx import TensorProto

    from fastdiff.export.network import Form, trace

    den = fd.Denoiser(Small(), fd.schedule.vp_cosine(), "v", shape=(1, 8, 8))
    traced = trace(den, Form("fp16"))
    weights = {t.name: t for t in traced.model.graph.initializer}
    convolutions = [weights[n.input[1]] for n in traced.model.graph.node if n.op_type == "Conv"]
    assert convolutions and all(w.data_type == TensorProto.FLOAT16 for w in convolutions)
    norms = [weights[n.input[1]] for n in traced.model.graph.node if n.op_type == "InstanceNormalization"]
    assert norms and all(scale.data_type == TensorProto.FLOAT for scale in norms), "a norm's input and scale have one type"
    assert den.network.conv.weight.dtype == torch.float32, "the caller's network is left alone"


class Small(nn.Module):
    """A network without classes that takes a second to trace."""

    def __init__(self, factor=1):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.out = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Conv2d(8, factor, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, t):
        h = self.conv(x) + (t * 1e-3).to(x.dtype).view(-1, 1, 1, 1)
        return self.out(self.drop(self.norm(h)))


class Fickle(nn.Module):
    def forward(self, x, t):
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_exported_is_one_line_with_the_place():
    from fastdiff.export.network import trace

    den = fd.Denoiser(Fickle(), fd.schedule.vp_cosine(), "v", shape=(1, 8, 8))
    with pytest.raises(FastdiffError, match=r"cannot be exported: .*test_network.py, line \d+: return x if float") as found:
        trace(den)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("change, words", [
    ({"precision": "int4"}, "fp32 or fp16"), ({"target": "abacus"}, "onnxruntime or tensorrt"),
])  # fmt: skip
def test_unknown_words_are_refused(change, words, tiny_denoiser):
    from fastdiff.export.network import Form, trace

    with pytest.raises(FastdiffError, match=words):
        trace(tiny_denoiser, Form(**change))


def test_a_denoiser_without_a_shape_or_of_half_weights_is_refused(tiny_denoiser):
    from fastdiff.export.network import trace

    with pytest.raises(FastdiffError, match="shape="):
        trace(fd.Denoiser(tiny_denoiser.network, tiny_denoiser.schedule, "v"))
    half = fd.Denoiser(tiny.network().half(), tiny_denoiser.schedule, "v", shape=(1, 8, 8))
    with pytest.raises(FastdiffError, match="float32 weights"):
        trace(half)


def test_a_network_keeps_its_mode(tiny_denoiser):
    from fastdiff.export.network import trace

    net = Small().train()
    model = trace(fd.Denoiser(net, tiny_denoiser.schedule, "v", shape=(1, 8, 8))).model
    assert net.training and net.norm.training
    assert not [node for node in model.graph.node if node.op_type in ("Dropout", "RandomUniform")]
