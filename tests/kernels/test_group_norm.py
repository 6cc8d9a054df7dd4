"""The registered ops of the GroupNorm family on the CPU: what torch.compile, export, ONNX and autograd see. No triton needed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from group_norm_inputs import arguments, tensor

from fastdiff import ops
from fastdiff.errors import FastdiffError
from fastdiff.kernels import group_norm as m

fused = torch.ops.fastdiff


@pytest.mark.parametrize("affine", ["", "weight", "weight bias", "weight bias scale"])
@pytest.mark.parametrize("silu", [False, True])
def test_gradients_against_finite_differences(affine, silu):
    x, residual = (tensor((2, 6, 2, 3), torch.float64, seed=s).requires_grad_() for s in (0, 1))
    norm = [v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in arguments(x, 3, affine, silu)]
    assert torch.autograd.gradcheck(lambda x, *norm: fused.group_norm(x, *norm)[0], (x, *norm))
    assert torch.autograd.gradcheck(lambda x, r, *norm: fused.add_group_norm(x, r, *norm)[:2], (x, residual, *norm))


def test_gradients_of_an_embedding_against_finite_differences():
    x, added = (tensor(shape, torch.float64, seed=s).requires_grad_() for s, shape in enumerate([(2, 6, 2, 3), (2, 6)]))
    norm = arguments(x, 3)
    assert torch.autograd.gradcheck(lambda x, added: fused.group_norm(x, *norm, added)[0], (x, added))


def test_a_sum_that_nobody_reads_has_no_gradient(monkeypatch):
    """Nor is one of zeros made, and read by the backward."""
    seen = []
    honest = m.backward_reference
    monkeypatch.setattr(m, "backward_reference", lambda *given: seen.append(given[-1]) or honest(*given))
    x = tensor((2, 6, 2, 3)).requires_grad_()
    for used in (slice(0, 1), slice(1, 2), slice(0, 2)):
        outputs = fused.add_group_norm(x, x, *arguments(x, 3))[used]
        sum(y.sum() for y in outputs).backward()
    assert [v is None for v in seen] == [True, False, False]


def test_an_empty_batch_goes_back():
    x = tensor((0, 6, 2, 3)).requires_grad_()
    fused.group_norm(x, *arguments(x, 3))[0].sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (2, 6, 2, 3, 2)])
def test_an_embedding_is_not_spread_out(shape):
    """By the op, and by `ops`, which knows it by its shape."""
    x, ones = tensor(shape), (1,) * (len(shape) - 2)
    embedding, norm = tensor((2, 6), seed=1), arguments(x, 3)
    want = ops.group_norm_silu(x + embedding.view(2, 6, *ones), *norm)
    torch.testing.assert_close(fused.group_norm(x, *norm, embedding)[0], want)
    torch.testing.assert_close(ops.group_norm_silu(x, *norm, residual=embedding.view(2, 6, *ones)), want)


def test_wider_weights_are_not_rounded():
    """As torch does it: bfloat16 in and out, the affine part in float32."""
    x = tensor((2, 6, 4, 4), torch.bfloat16)
    weight, bias = tensor((6,), seed=1), tensor((6,), seed=2)
    exact = F.group_norm(x.double(), 3, weight.double(), bias.double())
    got = ops.group_norm_silu(x, 3, weight, bias, silu=False)
    assert got.dtype == x.dtype and (got.double() - exact).abs().max() <= torch.finfo(x.dtype).eps * exact.abs().max() / 2


def test_forward_mode_derivatives_are_torchs(monkeypatch):
    """A registered op would drop them silently."""
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(ops, "why_torch", lambda device: None)
    x, t = tensor((2, 6, 4, 4)), tensor((2, 6, 4, 4), seed=1)
    assert ops.by_torch(x) and ops.by_torch(x.double().as_subclass(OnGpu)) and not ops.by_torch(x.as_subclass(OnGpu))
    asked = []
    torch.func.jvp(lambda v: asked.append(ops.by_torch(x.as_subclass(OnGpu))) or v, (x,), (t,))
    assert asked == [True]


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (1, 6), (2, 6, 2, 3, 2)])
def test_value_is_torchs(shape):
    x, residual = tensor(shape, seed=0), tensor(shape, seed=1)
    norm = arguments(x, 3, "weight bias scale", True)
    _, weight, bias, eps, scale, shift, _ = norm
    ones = (1,) * (len(shape) - 2)
    y = F.group_norm(x + residual, 3, weight, bias, eps) * (1 + scale.view(*scale.shape, *ones)) + shift.view(*shift.shape, *ones)
    got, total, _, _ = fused.add_group_norm(x, residual, *norm)
    torch.testing.assert_close(got, F.silu(y))
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(ops.group_norm_silu(x + residual, 3, weight, bias, eps, scale, shift), got, rtol=0, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    x, residual, dy = (tensor((2, 6, 3, 5), seed=s, channels_last=channels_last).requires_grad_() for s in range(3))
    norm = [v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in arguments(x, 3, "weight bias scale", True)]
    torch.library.opcheck(fused.group_norm.default, (x, *norm))
    torch.library.opcheck(fused.add_group_norm.default, (x, residual, *norm))
    mean, rstd = m.statistics(x.detach(), m.Norm(*norm))
    plain = [v.detach() if isinstance(v, torch.Tensor) else v for v in (dy, x, mean, rstd, *norm, residual)]
    torch.library.opcheck(fused.group_norm_backward.default, tuple(plain))


class Two(torch.nn.Module):
    """Both ops, as a network has them."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(torch.linspace(0.5, 2, 6)), torch.nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x, scale, shift):
        y, _, _ = fused.group_norm(x, 3, self.weight, self.bias, 1e-5, scale, shift, True)
        z, total, _, _ = fused.add_group_norm(y, x, 2, self.weight, None, 1e-6, None, None, False)
        return z + 2 * total


def inputs(batch):
    return tensor((batch, 6, 3, 5), seed=0), tensor((batch, 6), seed=1), tensor((batch, 6), seed=2)


def test_export_keeps_the_ops_for_any_batch():
    batch = torch.export.Dim("batch", min=1)
    net = Two()
    program = torch.export.export(net, inputs(2), dynamic_shapes=[{0: batch}] * 3)
    called = [str(n.target) for n in program.run_decompositions().graph.nodes if "fastdiff" in str(n.target)]
    assert called == ["fastdiff.group_norm.default", "fastdiff.add_group_norm.default"]
    torch.testing.assert_close(program.module()(*inputs(5)), net(*inputs(5)))


@pytest.mark.parametrize("opset", [20, 21])
def test_onnx(opset):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    batch = torch.export.Dim("batch", min=1)
    net = Two().eval()
    program = torch.onnx.export(
        net, inputs(2), dynamo=True, opset_version=opset, dynamic_shapes=[{0: batch}] * 3, verbose=False,
        custom_translation_table=ops.onnx_table(),
    )  # fmt: skip
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for size in (2, 5):
        given = inputs(size)
        got = session.run(None, {n: v.numpy() for n, v in zip(names, given, strict=True)})[0]
        np.testing.assert_allclose(got, net(*given).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_compile_sees_one_op():
    graphs = []

    def backend(graph, _):
        graphs.append([n.target for n in graph.graph.nodes if "fastdiff" in str(n.target)])
        return graph

    net = Two()
    torch.testing.assert_close(torch.compile(net, backend=backend, fullgraph=True)(*inputs(2)), net(*inputs(2)))
    assert [len(g) for g in graphs] == [2]


@pytest.mark.parametrize(
    ("shape", "groups", "change", "message"),
    [
        ((2, 6, 3), 4, {}, r"C divisible by groups, in floating point; given \(2, 6, 3\) torch.float32, 4 groups"),
        ((6,), 3, {}, "needs \\(B, C"),
        ((2, 6, 3), 3, {"weight": torch.ones(5)}, r"weight must have the shape \(6,\) on \w+; given \(5,\)"),
        ((2, 6, 3), 3, {"scale": torch.ones(2, 6)}, "scale and shift together"),
        ((2, 6, 3), 3, {"scale": torch.ones(6), "shift": torch.ones(6)}, r"scale must have the shape \(2, 6\)"),
    ],
)
def test_bad_input_is_one_line(shape, groups, change, message):
    given = {"weight": None, "bias": None, "eps": 1e-5, "scale": None, "shift": None, "silu": True, **change}
    for device in ("cpu", "meta"):
        moved = [v.to(device) if isinstance(v, torch.Tensor) else v for v in given.values()]
        for call in (fused.group_norm, ops.group_norm_silu):
            with pytest.raises(FastdiffError, match=message):
                call(torch.ones(shape, device=device), groups, *moved)


def test_tensors_on_other_devices_are_refused():
    with pytest.raises(FastdiffError, match=r"weight must have the shape \(6,\) on meta; given \(6,\) on cpu"):
        fused.group_norm(torch.ones(2, 6, 3, device="meta"), 3, torch.ones(6), None, 1e-5, None, None, True)


def test_a_residual_of_another_shape_is_refused():
    x = torch.ones(2, 6, 3)
    with pytest.raises(FastdiffError, match=r"\(2, 6, 3\) torch.float32 on cpu; given \(2, 6, 1\) torch.float32 on cpu"):
        fused.add_group_norm(x, torch.ones(2, 6, 1), 3, None, None, 1e-5, None, None, True)


def test_why_not_says_where_the_kernels_run():
    norm = m.Norm(3, None, None, 1e-5)
    assert m.why_not(torch.ones(2, 6), norm) == "the tensors are on cpu, the kernels run on NVIDIA GPUs"


@pytest.mark.parametrize(("shape", "reason"), [((65_536, 3), "65,535 samples"), ((0, 3), "empty"), ((1, 3, 1, 2**30), "2^31")])
def test_why_not_says_what_the_kernels_do_not_take(shape, reason, monkeypatch):
    monkeypatch.setattr(m, "missing_triton", lambda device: None)
    assert reason in m.why_not(torch.empty(1).expand(shape), m.Norm(3, None, None, 1e-5))
    assert "float64" in m.why_not(torch.ones(1, 3).double(), m.Norm(3, None, None, 1e-5))
    assert m.why_not(torch.ones(1, 3), m.Norm(3, None, None, 1e-5)) is None


def test_an_empty_batch():
    assert fused.group_norm(torch.ones(0, 6, 4, 4), 3, None, None, 1e-5, None, None, True)[0].shape == (0, 6, 4, 4)
