"""The Triton kernel of attention, in the interpreter against float64 and through the compiler for three GPUs."""

import math

import pytest
import torch
from attention_inputs import DTYPES, draw, guarded, needs_loops, tensors, whole
from gates import compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.kernels import attention as m

# Of the loop over keys for a score, at most, by the head's size, on sm_80 and sm_90 (sm_100 waits in loops of its own).
# An H200 issues 8 in the time in which it makes the score's exponential, and 6 and 10 while it multiplies.
INSTRUCTIONS = {40: 10.5, 80: 12.5}


@pytest.fixture(scope="module")
def kernel():
    from fastdiff.kernels import attention_triton

    return attention_triton


@pytest.fixture
def loop(kernel, monkeypatch):
    """Never one tile, and tiles so small that few keys make several."""
    needs_loops()
    cut = lambda head, queries, keys: kernel.Blocks(16, 16, 0, False, keys % 16 == 0, 4, 2)  # noqa: E731
    monkeypatch.setattr(kernel.Blocks, "of", cut)


def agree(kernel, q, k, v, residual=None, scale=None):
    """Against float64: at most twice torch's own error in that dtype, plus one unit of rounding."""
    got, sums = kernel.forward(q, k, v, residual, scale)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    logs = torch.logsumexp(q.double() @ k.double().mT * factor, -1) / math.log(2)
    if q.shape[3] <= m.BACKWARD:
        torch.testing.assert_close(sums.double(), logs, rtol=1e-5, atol=1e-5)
    exact = m.reference(*(None if x is None else x.double() for x in (q, k, v, residual)), scale)
    own = (m.reference(q, k, v, residual, scale).double() - exact).abs().max()
    assert got.shape == q.shape and got.dtype == q.dtype and got.stride() == m.like(q).stride()
    assert (got.double() - exact).abs().max() <= 2 * own + torch.finfo(q.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [8, 40, 80, 64])
@pytest.mark.parametrize("keys", [16, 19, 35, 48])  # one tile, whole and ragged, and two
def test_all_keys_at_once(kernel, dtype, head, keys):
    agree(kernel, *tensors(1, 2, 19, keys, head, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head", "queries", "keys"), [(8, 16, 16), (40, 20, 37), (160, 5, 33), (72, 17, 48), (24, 9, 32)])
def test_many_tiles(kernel, loop, dtype, head, queries, keys):
    agree(kernel, *tensors(1, 1, queries, keys, head, dtype))


def test_cross_residual_and_scale(kernel):
    q, k, v = tensors(2, 2, 33, 7, 40)
    agree(kernel, q, k, v, draw(2, 2, 33, 40, seed=9, dtype=q.dtype), 0.3)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-46])
@pytest.mark.parametrize("keys", [32, 37])
def test_scales_that_are_negative_or_next_to_nothing(kernel, loop, scale, keys):
    agree(kernel, *tensors(1, 2, 9, keys, 24), scale=scale)


def test_scores_that_would_overflow(kernel, loop):
    """Logits of several hundred, the largest in the last tile: exp of them would be infinite."""
    q, k, v = tensors(1, 1, 4, 40, 16)
    agree(kernel, 30 * q, k * torch.linspace(1, 4, 40).half()[:, None], v)


@pytest.mark.parametrize("length", [16, 9])  # 9 positions side by side are no multiple of 16 bytes: they are copied
def test_fused_projections(kernel, length, monkeypatch):
    """(B, S, 3 H d), and (B, 3 H d, S) in both orders that our U-Nets know; the result lies as the next projection reads it."""
    copies = []
    made = kernel.empty
    monkeypatch.setattr(kernel, "empty", lambda x, first: copies.append(x) or made(x, first))
    rows = draw(2, length, 3 * 2 * 24, seed=1, dtype=torch.float16)
    q, k, v = (x.unflatten(-1, (2, 24)).transpose(1, 2) for x in rows.chunk(3, -1))
    agree(kernel, q, k, v)
    assert not copies and m.like(q).transpose(1, 2).is_contiguous()
    columns = rows.transpose(1, 2).contiguous()
    for parts in (columns.view(2, 3, 2, 24, length).unbind(1), columns.view(2, 2, 3, 24, length).unbind(2)):
        q, k, v = (x.transpose(-1, -2) for x in parts)
        agree(kernel, q, k, v, m.like(q).copy_(v))
        assert m.like(q).transpose(-1, -2).is_contiguous()
    assert bool(copies) == (length == 9)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("length", [16, 9])
def test_the_registered_op_gives_what_its_fake_promises(as_on_a_gpu, length, columns):
    """As on a GPU: shapes, strides, and no result that shares memory with an input or another one."""
    q, k, v = tensors(2, 2, length, length, 24)
    if columns:
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    for residual in (None, m.like(q).copy_(v), v[:1].expand(2, -1, -1, -1)):
        inputs = (q, k, v, residual, None)
        torch.library.opcheck(torch.ops.fastdiff.attention.default, inputs, test_utils=("test_schema", "test_faketensor"))


def test_views_that_16_bytes_do_not_fit(kernel):
    """An odd offset, an odd step from row to row, a key for all samples, and positions side by side beside elements."""
    wide = draw(2, 3, 16, 35, seed=1, dtype=torch.float16)
    q, k, v = wide[..., 1:25], wide[..., 2:26], wide[:1, ..., :24].expand(2, -1, -1, -1)
    agree(kernel, q, k, v)
    agree(kernel, q.transpose(2, 3).contiguous().transpose(2, 3), k, v.contiguous())


def test_a_sample_does_not_depend_on_its_neighbours(kernel):
    q, k, v = tensors(2, 1, 12, 12, 40)
    whole, _ = kernel.forward(q, k, v, None, None)
    assert torch.equal(kernel.forward(q[1:], k[1:], v[1:], None, None)[0], whole[1:])


@pytest.mark.parametrize("cut", [False, True])
def test_no_access_outside(kernel, cut, request, monkeypatch):
    """Every tensor lies between walls of NaN: what is read beyond one poisons a result, what is written breaks a wall."""
    if cut:
        request.getfixturevalue("loop")
    walls = [guarded(x) for x in tensors(1, 1, 21, 35, 24)]
    monkeypatch.setattr(kernel, "like", lambda q: walls.append(guarded(torch.zeros_like(q))) or walls[-1][1])
    monkeypatch.setattr(kernel, "sums_like", lambda q, runs: walls.append(guarded(torch.zeros(q.shape[:3]))) or walls[-1][1])
    q, k, v = (inner for _, inner in walls)
    out, _ = kernel.forward(q, k, v, None, None)
    torch.testing.assert_close(out, m.reference(q, k, v), rtol=2e-3, atol=2e-3)
    assert len(walls) == 5 and whole(walls)


@pytest.mark.parametrize(
    ("head", "held"), [(8, 16), (16, 16), (24, 32), (40, 48), (64, 64), (72, 80), (80, 80), (112, 128), (160, 160), (200, 256)]
)
def test_parts_hold_a_head_with_little_to_spare(kernel, head, held):
    assert sum(kernel.parts_of_head(head)) == held


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape(kernel, data):
    sizes = [data.draw(st.integers(1, n)) for n in (2, 3, 80, 80)]
    agree(kernel, *tensors(*sizes, 8 * data.draw(st.integers(1, 32)), data.draw(st.sampled_from(DTYPES))))


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_kernel_does_not_spill(everything):
    """99 KB of shared memory are what a program may have on the smallest of these GPUs (sm_86)."""
    found = compiled("attention", everything)
    assert all(f["shared"] <= 99 * 1024 and f["narrow"] == 0 for f in found)  # no load of two bytes
    at_sites = [f for f in found if f["elements"] and f["sm"] < 100]
    assert len(at_sites) == (2 * 2 if everything else 2)
    for f in at_sites:
        assert 0 < f["loop"] / f["elements"] <= INSTRUCTIONS[int(f["kernel"].split()[1])], f
