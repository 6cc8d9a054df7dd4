"""The Triton kernels of the GroupNorm family, in the interpreter against float64 and through the compiler for three GPUs."""

import functools

import numpy as np
import pytest
import torch
from gates import compiled
from group_norm_inputs import arguments, embedding, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.kernels import group_norm as m

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def kernels():
    from fastdiff.kernels import group_norm_backward_triton, group_norm_triton

    return group_norm_triton, group_norm_backward_triton


@pytest.fixture(params=[1, 2], ids=["one tile", "two tiles"])
def split(request, monkeypatch):
    """Nothing fits on chip and tiles are small, so that few programs make several splits and channel blocks."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 cannot loop up to a loaded number with numpy 2.4 (3.9 can)")
    forward, backward = kernels()
    monkeypatch.setattr(forward, "on_chip", lambda *_: None)
    monkeypatch.setattr(backward, "ONE_READ_BACKWARD", 0)
    small = functools.partial(forward.Split, block_c=4, block_s=32, tiles=request.param)
    monkeypatch.setattr(forward.Split, "of", lambda channels, positions, _: small(channels, positions))


def wide(norm):
    return m.Norm(*(v.double() if isinstance(v, torch.Tensor) else v for v in tuple(norm)))


def error(got, want):
    return (got.double() - want).abs().max().item()


def agree(x, norm, residual=None):
    """Forward and backward against float64: at most twice torch's own error in that dtype, plus one unit of rounding."""
    forward, backward = kernels()
    y, total, mean, rstd = forward.forward(x, norm, residual)
    if residual is None:
        total = x
    else:
        assert torch.equal(total, x + residual) and total.stride() == m.like(x).stride()
    assert y.dtype == x.dtype and y.stride() == m.like(x).stride()
    exact = m.reference(total.double(), wide(norm))
    unit = torch.finfo(x.dtype).eps
    assert error(y, exact) <= 2 * error(m.reference(total, norm), exact) + unit * exact.abs().max().item()
    dy, more = tensor(x.shape, x.dtype, seed=20) - 3, tensor(x.shape, x.dtype, seed=21)
    statistics = m.statistics(total.double(), wide(norm))
    want = m.backward_reference(dy.double(), total.double(), *statistics, wide(norm), more.double())
    own = m.backward_reference(dy, total, *m.statistics(total, norm), norm, more)
    got = backward.backward(dy, total, mean, rstd, norm, more)
    for ours, torchs, right in zip(got, own, want, strict=True):
        scale = torch.finfo(ours.dtype).eps * right.abs().max().item()
        assert error(ours, right) <= 2 * error(torchs, right) + 4 * scale


def norm_of(x, groups, **options):
    return m.Norm(*arguments(x, groups, **options))


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (2, 8, 4, 4), (1, 10, 3, 1)], ids=str)  # the second fills its tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_read(dtype, shape):
    x = tensor(shape, dtype)
    agree(x, norm_of(x, 2), tensor(x.shape, dtype, seed=1))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 6, 9, 11), (1, 8, 8, 8)], ids=str)  # the second fills its tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_split(split, dtype, shape, channels_last):
    x = tensor(shape, dtype, channels_last=channels_last)
    agree(x, norm_of(x, 2), tensor(x.shape, dtype, seed=1))


@pytest.mark.parametrize("affine", ["", "weight", "weight bias"])
def test_without_parts(affine):
    x = tensor((1, 4, 7))
    agree(x, norm_of(x, 2, affine=affine, silu=False))


def agree_with_added(shape, dtype, channels_last=False):
    """An embedding, a number a sample and channel: as if x had been that much larger, never rounded in between."""
    forward, _ = kernels()
    x = tensor(shape, dtype, channels_last=channels_last)
    norm = norm_of(x, 2)._replace(added=embedding(x))
    y, _, mean, rstd = forward.forward(x, norm)
    exact = m.reference(x.double(), wide(norm))
    assert error(y, exact) <= 2 * error(m.reference(x, norm), exact) + torch.finfo(dtype).eps * exact.abs().max().item()
    for got, right in zip((mean, rstd), m.statistics(x.double(), wide(norm)), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (2, 8, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_embedding(dtype, shape):
    agree_with_added(shape, dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_embedding_in_splits(split, dtype, channels_last):
    agree_with_added((2, 6, 9, 11), dtype, channels_last)


def test_positions_of_an_attention_block_stay_channels_last():
    x = tensor((1, 7, 4)).transpose(1, 2)
    agree(x, norm_of(x, 2))
    assert m.like(x).stride() == x.stride() and m.like(x.contiguous()).is_contiguous()


def test_video_in_channels_last():
    x = tensor((1, 4, 2, 3, 3), channels_last=True)
    agree(x, norm_of(x, 2))


def test_inputs_that_are_views():
    whole = tensor((2, 8, 4, 5))
    for x in (whole[:, 2:6], whole[:, :4, ::2], whole[:, :4].transpose(2, 3), whole[:, :4, :, :1].expand(-1, -1, -1, 2)):
        agree(x, norm_of(x, 2))
    x = tensor((2, 4, 4, 5))
    agree(x, norm_of(x, 2), tensor((2, 4, 1, 5), seed=3).expand_as(x))


def test_no_access_outside():
    no_access_outside()


def test_no_access_outside_of_splits(split):
    no_access_outside()


def no_access_outside():
    """Every tensor lies between walls of NaN: what is read beyond one poisons a result, what is written breaks a wall."""
    forward, backward = kernels()
    shapes = [(1, 6, 5, 7), (1, 6, 5, 7), (6,), (1, 6), (1, 6, 5, 7)]
    walls = [guarded(tensor(s, seed=i)) for i, s in enumerate(shapes)]
    x, residual, weight, added, dy = (inner for _, inner in walls)
    norm = m.Norm(2, weight, weight, 1e-5, added, added, True)
    embedded = norm._replace(added=added)

    def fenced(make):
        def made(*given, **options):
            walls.append(guarded(make(*given, **options)))
            return walls[-1][1]

        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", fenced(torch.empty_like))  # results
        patch.setattr(torch, "empty", fenced(torch.empty))  # statistics, workspaces
        y, total, mean, rstd = forward.forward(x, norm, residual)
        z = forward.forward(x, embedded)[0]
        found = backward.backward(dy, total, mean, rstd, norm, residual)
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, m.reference(total, norm))
    torch.testing.assert_close(z, m.reference(x, embedded))
    wanted = m.backward_reference(dy, total, mean, rstd, norm, residual)
    for got, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, right)
    assert len(walls) >= 5 + 2 + 2 + 1 + 2 + 3  # given; y, total and statistics; z and its own; dx, p, q
    for buffer, inner in walls:
        edge = (buffer.numel() - inner.numel()) // 2
        assert buffer[:edge].isnan().all() and buffer[-edge:].isnan().all()


def guarded(x):
    buffer = torch.full((x.numel() + 256,), torch.nan)
    inner = buffer[128:-128].view(x.shape)
    return buffer, inner.copy_(x)


def test_a_sample_does_not_depend_on_its_neighbours():
    alone_and_among_others()


def test_a_sample_in_splits_does_not_depend_on_its_neighbours(split):
    alone_and_among_others()


def alone_and_among_others():
    forward, _ = kernels()
    x = tensor((2, 4, 6, 6))
    both = forward.forward(x, norm_of(x, 2, affine="weight"))[0]
    assert torch.equal(forward.forward(x[1:], norm_of(x[1:], 2, affine="weight"))[0], both[1:])


@pytest.mark.parametrize("residual", [False, True])
def test_the_registered_op_goes_back_by_them(as_on_a_gpu, residual):
    """As on a GPU: the op's own forward, autograd and backward, with the kernels behind them; torch refuses results that share
    memory, with an input or with each other."""
    x = tensor((2, 6, 5, 4))
    inputs = [x, *([tensor(x.shape, seed=1)] if residual else []), *arguments(x, 2)]
    op = torch.ops.fastdiff.add_group_norm if residual else torch.ops.fastdiff.group_norm
    torch.library.opcheck(op.default, inputs, test_utils=("test_schema", "test_faketensor"))
    leaves = [v.requires_grad_() for v in inputs if isinstance(v, torch.Tensor)]
    got = torch.autograd.grad(op(*inputs)[0].square().sum(), leaves)
    wide = [v.detach().double().requires_grad_() if isinstance(v, torch.Tensor) else v for v in inputs]
    total, rest = (wide[0] + wide[1], wide[2:]) if residual else (wide[0], wide[1:])
    loss = m.reference(total, m.Norm(*rest)).square().sum()
    right = torch.autograd.grad(loss, [v for v in wide if isinstance(v, torch.Tensor)])
    for mine, exact in zip(got, right, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("positions", "channels_last", "want"),
    [
        (4096, False, (1, 4096, 1)), (1024, False, (4, 1024, 1)), (9216, False, (2, 2048, 1)), (4225, False, (4, 1024, 1)),
        (512 * 512, False, (1, 4096, 1)), (512 * 512, True, (64, 64, 16)), (2048 * 2048, False, (1, 4096, 4)),
    ],
)  # fmt: skip
def test_tiles_are_filled_and_a_channel_has_few_splits(positions, channels_last, want):
    cut = kernels()[0].Split.of(320, positions, channels_last)
    assert (cut.block_c, cut.block_s, cut.tiles) == want and cut.grid(3, cut.tiles)[0] <= 256


def test_statistics_survive_a_large_mean(split):
    """E[x^2] - E[x]^2 in float32 would leave nothing of a variance of 4 beside a mean of 10,000."""
    x = tensor((1, 4, 10, 10)) + 10_000
    forward, _ = kernels()
    _, _, mean, rstd = forward.forward(x, norm_of(x, 2))
    exact = m.statistics(x.double(), norm_of(x, 2))
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), exact[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("channels", "held"), [(1, 1), (3, 3), (7, 8), (10, 10), (20, 20), (30, 32), (40, 40), (80, 80)])
def test_parts_hold_a_group_with_little_to_spare(channels, held):
    from fastdiff.kernels.tile_triton import parts

    assert sum(parts(channels)) == held


@pytest.mark.slow
@settings(max_examples=25)
@given(st.data())
def test_any_shape(data):
    groups, per_group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    shape = (data.draw(st.integers(1, 2)), groups * per_group, *data.draw(st.lists(st.integers(1, 9), max_size=3)))
    dtype = data.draw(st.sampled_from(DTYPES))
    x = tensor(shape, dtype, channels_last=len(shape) > 3 and data.draw(st.booleans()))
    norm = norm_of(x, groups, affine=data.draw(st.sampled_from(["", "weight bias", "weight bias scale"])))
    residual = tensor(shape, dtype, seed=1) if data.draw(st.booleans()) else None
    if per_group * x[0, 0].numel() > 1:  # a variance of one value is noise over zero
        agree(x, norm, residual)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_kernels_do_not_spill(everything):
    """sm_80, sm_90 and sm_100, without a GPU: registers within what the block's threads may have, 48 KB, no local memory; what
    is timed, in few instructions (on sm_90, unless everything is asked for)."""
    found = compiled("group_norm", everything)
    assert len({f["kernel"].split()[0] for f in found}) == 8
    assert all(f["shared"] <= 48 * 1024 for f in found)
    at_sites = [f for f in found if f["elements"]]
    assert len(at_sites) == (3 * 15 if everything else 15)
    for f in at_sites:
        assert 0 < f["instructions"] / f["elements"] <= f["most"], f
