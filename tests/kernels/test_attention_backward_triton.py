"""The Triton kernels of attention's backward, in the interpreter against float64; what they compile to is asked beside the
forward's (test_attention_triton)."""

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import DTYPES, draw, guarded, needs_loops, tensors, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.kernels import attention as m


@pytest.fixture(scope="module")
def kernel():
    needs_loops()
    from fastdiff.kernels import attention_backward_triton

    return attention_backward_triton


@pytest.fixture
def small(kernel, monkeypatch):
    """Tiles so small that few positions make several."""
    for name in ("OF_QUERIES", "OF_KEYS"):
        monkeypatch.setattr(kernel, name, kernel.Blocks(16, 16, 4, 1))


def gradients(q, k, v, dout, scale=None):
    """By torch, in the inputs' dtype."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(F.scaled_dot_product_attention(*leaves, scale=scale), leaves, dout)


def on_tensor_cores(q, k, v, dout, scale=None):
    """What any kernel gives that rounds to the inputs' dtype what meets a matrix (softmax's weights and their gradient), and
    takes the mean gradient from the rounded result (Dao et al. 2022, appendix B.4)."""
    q32, k32, v32, dout32 = (x.float() for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = (q32 @ k32.mT * scale).softmax(-1)
    rounded = p.to(q.dtype).float()
    delta = (dout32 * (rounded @ v32).to(q.dtype).float()).sum(-1, keepdim=True)
    ds = (p * (dout32 @ v32.mT - delta)).to(q.dtype).float() * scale
    return tuple(x.to(q.dtype) for x in (ds @ k32, ds.mT @ q32, rounded.mT @ dout32))


def agree(kernel, q, k, v, dout, scale=None, peer=gradients):
    """Each against float64: at most twice the peer's error, torch's own in that dtype, plus one unit of rounding, and float32's
    of what cancels (all of it where there is one key: torch's own error is 0 then)."""
    from fastdiff.kernels.attention_triton import forward

    out, sums = forward(q, k, v, None, scale)
    got = kernel.backward(dout, q, k, v, out, sums, scale)
    exact = gradients(*(x.double() for x in (q, k, v, dout)), scale)
    largest = (dout.float().abs() @ v.float().abs().mT).max() * max(q.abs().max(), k.abs().max())
    cancelled = torch.finfo(torch.float32).eps * largest
    for x, mine, own, right in zip((q, k, v), got, peer(q, k, v, dout, scale), exact, strict=True):
        assert mine.shape == x.shape and mine.dtype == x.dtype and mine.stride() == m.like(x).stride()
        allowed = 2 * (own.double() - right).abs().max() + torch.finfo(x.dtype).eps * right.abs().max() + cancelled
        assert (mine.double() - right).abs().max() <= allowed


def given_for(batch, heads, queries, keys, head, dtype=torch.float16):
    q, k, v = tensors(batch, heads, queries, keys, head, dtype)
    return q, k, v, draw(batch, heads, queries, head, seed=7, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head", "queries", "keys"), [(8, 16, 16), (40, 20, 37), (80, 37, 5), (128, 17, 33), (72, 19, 48)])
def test_gradients(kernel, small, dtype, head, queries, keys):
    agree(kernel, *given_for(1, 1, queries, keys, head, dtype))


@pytest.mark.parametrize("head", [40, 80])
def test_the_tiles_of_a_gpu(kernel, head):
    agree(kernel, *given_for(1, 2, 70, 70, head), 0.3)


@pytest.mark.parametrize("logit", [300, -300])
def test_scores_that_would_overflow(kernel, small, logit):
    """Far from 0 for every key alike: exp of them would be infinite, or, below, of those beyond the last key. One column of the
    gradient is 60 times a sum that is 0 but for rounding, which torch does not do everywhere on a CPU."""
    q, k, v, dout = given_for(1, 1, 20, 40, 16)
    q[..., 0], k[..., 0] = 20, logit / 5
    agree(kernel, q, k, v, dout, peer=on_tensor_cores)


@pytest.mark.parametrize("length", [16, 9])  # 9 positions side by side are no multiple of 16 bytes: they are copied
def test_views(kernel, small, length):
    """Parts of a fused projection, channels first and last, and a gradient that is one number everywhere."""
    rows = draw(2, length, 3 * 2 * 16, seed=1, dtype=torch.float16)
    q, k, v = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in rows.chunk(3, -1))
    agree(kernel, q, k, v, draw(2, length, 2, 16, seed=2, dtype=torch.float16).transpose(1, 2))
    columns = rows.transpose(1, 2).contiguous()
    q, k, v = (x.transpose(-1, -2) for x in columns.view(2, 3, 2, 16, length).unbind(1))
    agree(kernel, q, k, v, torch.ones((), dtype=torch.float16).expand(2, 2, length, 16))


def test_two_runs_and_a_sample_alone_have_the_same_bits(kernel, small):
    from fastdiff.kernels.attention_triton import forward

    q, k, v, dout = given_for(2, 1, 20, 35, 40)
    out, sums = forward(q, k, v, None, None)
    both = kernel.backward(dout, q, k, v, out, sums, None)
    again = kernel.backward(dout, q, k, v, out, sums, None)
    alone = kernel.backward(*(x[1:] for x in (dout, q, k, v, out, sums)), None)
    for x, y, z in zip(both, again, alone, strict=True):
        assert torch.equal(x, y) and torch.equal(x[1:], z)


def test_no_access_outside(kernel, small, monkeypatch):
    """Every tensor lies between walls of NaN: what is read beyond one poisons a result, what is written breaks a wall."""
    from fastdiff.kernels.attention_triton import forward

    q, k, v, dout = given_for(1, 1, 21, 35, 24)
    walls = [guarded(x) for x in (q, k, v, dout, *forward(q, k, v, None, None))]
    for name, owner in (("like", kernel), ("empty_like", torch)):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda x, make=make: walls.append(guarded(make(x).zero_())) or walls[-1][1])
    q, k, v, dout, out, sums = (inner for _, inner in walls)
    got = kernel.backward(dout, q, k, v, out, sums, None)
    monkeypatch.undo()
    for mine, right in zip(got, gradients(q, k, v, dout), strict=True):
        torch.testing.assert_close(mine, right, rtol=5e-3, atol=5e-3)
    assert len(walls) == 10 and whole(walls)


@pytest.mark.parametrize("added", [False, True])
def test_the_registered_op_goes_back_by_them(as_on_a_gpu, kernel, small, monkeypatch, added):
    """As on a GPU: the op's own forward, autograd and backward, with the kernels behind them."""
    ran = []
    run = kernel.backward
    monkeypatch.setattr(kernel, "backward", lambda *inputs: ran.append(1) or run(*inputs))
    q, k, v, dout = given_for(1, 2, 20, 18, 40)
    residual = (100 * dout).requires_grad_() if added else None  # a result rounded at 100 would give another delta
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = torch.ops.fastdiff.attention(*leaves, residual, None)
    got = torch.autograd.grad(out, [*leaves, *([residual] if added else [])], dout)
    assert ran == [1] and (not added or torch.equal(got[3], dout))
    saved = (dout, q.detach(), k.detach(), v.detach(), *(x.detach() for x in torch.ops.fastdiff.attention(q, k, v, None, None)))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastdiff.attention_backward.default, (*saved, None), test_utils=checks)
    exact = gradients(*(x.detach().double() for x in (q, k, v, dout)))
    for mine, right in zip(got, exact, strict=False):
        assert (mine.double() - right).abs().max() <= 4e-3 * right.abs().max()


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape(kernel, data):
    sizes = [data.draw(st.integers(1, n)) for n in (2, 3, 80, 80)]
    agree(kernel, *given_for(*sizes, 8 * data.draw(st.integers(1, m.BACKWARD // 8)), data.draw(st.sampled_from(DTYPES))))
