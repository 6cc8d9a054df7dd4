"""The registered op of attention on the CPU: what torch.compile, export, ONNX and autograd see. No triton needed."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff import ops
from fastdiff.errors import FastdiffError
from fastdiff.kernels import attention as m

fused = torch.ops.fastdiff
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def op(*given):
    return fused.attention(*given)[0]


def tensors(queries=5, keys=3, head=4, dtype=torch.float32, batch=2):
    random = torch.Generator().manual_seed(0)
    lengths = (queries, keys, keys, queries)
    return [torch.randn(batch, 2, n, head, generator=random, dtype=torch.float64).to(dtype) for n in lengths]


def test_value_layout_and_scale():
    q, k, v, residual = tensors()
    want = F.scaled_dot_product_attention(q, k, v, scale=0.7) + residual
    got = op(q, k, v, residual, 0.7)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ops.attention(q, k, v, residual, 0.7), want)
    torch.testing.assert_close(ops.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert got.transpose(1, 2).is_contiguous()  # (B, S, H d), as a projection reads it


def test_gradients_against_finite_differences():
    given = [x.requires_grad_() for x in tensors(3, 2, 2, torch.float64, batch=1)]
    assert torch.autograd.gradcheck(lambda *x: op(*x, 0.7), given)


def test_the_backward_op_is_what_autograd_finds():
    """The op that stands for the kernels, by its formulas; where torch runs there are no sums to save."""
    q, k, v, dout = tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, sums = fused.attention(*leaves, None, 0.7)
    assert sums.shape == (0,) and not sums.requires_grad
    got = fused.attention_backward(dout, *(x.detach() for x in leaves), out.detach(), sums, 0.7)
    torch.testing.assert_close(got, torch.autograd.grad(out, leaves, dout))
    assert [x.stride() for x in got] == [m.like(x).stride() for x in (q, k, v)]


def test_heads_that_the_backward_leaves_to_torch(monkeypatch):
    monkeypatch.setattr(m, "missing_triton", lambda device: None)
    q, k, v, dout = tensors(head=136, dtype=torch.float16)
    assert m.why_not(q, k, v) is None and "heads up to 128; given 136" in m.why_not_backward(dout, q, k, v)
    assert m.why_not_backward(*(x[..., :128] for x in (dout, q, k, v))) is None


@pytest.mark.parametrize("utils", [QUICK, pytest.param("test_aot_dispatch_dynamic", marks=pytest.mark.slow)])
def test_opcheck(utils):
    torch.library.opcheck(fused.attention.default, (*(x.requires_grad_() for x in tensors()), 0.7), test_utils=utils)
    q, k, v, dout = tensors()
    given = (dout, q, k, v, dout, torch.empty(0), 0.7)
    torch.library.opcheck(fused.attention_backward.default, given, test_utils=utils)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5, 4), (2, 5, 4), (2, 5, 4)), r"q \(B, heads, S, d\), and k and v"),
        (((2, 2, 5, 4), (2, 2, 3, 4), (2, 2, 5, 4)), r"given \(2, 2, 5, 4\), \(2, 2, 3, 4\), \(2, 2, 5, 4\)"),
        (((2, 2, 5, 4), (2, 2, 3, 8), (2, 2, 3, 8)), "needs q"),
        (((2, 2, 5, 4), (2, 2, 0, 4), (2, 2, 0, 4)), "at least one key"),
    ],
)
def test_bad_shapes_are_one_line(shapes, message):
    for device in ("cpu", "meta"):
        with pytest.raises(FastdiffError, match=message):
            op(*(torch.ones(s, device=device) for s in shapes), None, None)


def test_bad_dtypes_are_one_line():
    q, k, v, residual = tensors()
    with pytest.raises(FastdiffError, match=r"one floating-point dtype; given torch.float32, torch.float16, torch.float32"):
        op(q, k.half(), v, None, None)
    with pytest.raises(FastdiffError, match=r"\(2, 2, 5, 4\) torch.float32 on cpu; given \(2, 2, 5, 4\) torch.float16 on cpu"):
        op(q, k, v, residual.half(), None)
    with pytest.raises(FastdiffError, match="q, k and v on one device; given meta, cpu, meta"):
        op(q.to("meta"), k, v.to("meta"), None, None)


def test_dispatch_is_by_measurement_alone(monkeypatch):
    q, k, v, _ = tensors(77, 100, 40)
    assert m.site(q, k, 90) == (90, 40, 128, 128, 4)
    assert not m.FASTER and not m.faster(q, k, v)  # nothing was measured yet: torch, by rule
    monkeypatch.setattr(m, "FASTER", frozenset({m.site(q, k, 90)}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not m.faster(q, k, v)  # on the CPU the kernel does not run
    monkeypatch.setattr(m, "why_not", lambda *tensors: None)
    assert m.faster(q, k, v) and not m.faster(q[:, :1], k[:, :1], v[:, :1])
