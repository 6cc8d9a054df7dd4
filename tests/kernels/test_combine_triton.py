"""The Triton kernel of the sampler's update, in the interpreter against float64 and through the compiler for three GPUs."""

import pytest
import torch
from gates import compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.philox import normals, seed_bits

SEEDS = [0, 2**64 - 1, 12345678901234]


@pytest.fixture
def kernel(monkeypatch):
    """The launcher, on blocks so small that few elements make several."""
    from fastdiff.kernels import combine_triton

    monkeypatch.setattr(combine_triton, "block", lambda inputs: 16)
    return combine_triton


def tensors(count, shape, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).to(dtype if i else torch.float32) for i in range(count)]


def table(outputs, columns):
    return 2 * torch.randn(outputs, columns, generator=torch.Generator().manual_seed(1))


def agree(got, inputs, weights, z=None):
    """Within 2 units of rounding of the sum of the terms' sizes."""
    columns = torch.stack([x.double() for x in inputs] + ([] if z is None else [z.double()]))
    want = torch.einsum("ji,i...->j...", weights.double(), columns)
    size = torch.einsum("ji,i...->j...", weights.abs().double(), columns.abs())
    assert all(y.dtype == torch.float32 and y.is_contiguous() for y in got)
    assert ((torch.stack(got).double() - want).abs() <= 2 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "outputs"), [(1, 1), (3, 2), (16, 8)])
def test_sums(kernel, dtype, count, outputs):
    inputs, weights = tensors(count, (2, 3, 7), dtype), table(outputs, count)
    agree(kernel.forward(inputs, weights, None, 0), inputs, weights)


@settings(max_examples=25)
@given(st.data())
def test_any_shape(data):
    shape = (data.draw(st.integers(1, 3)), *data.draw(st.lists(st.integers(1, 20), max_size=3)))
    count, outputs = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 8))
    dtypes = data.draw(st.lists(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), min_size=count, max_size=count))
    inputs = [x.to(dtype) for x, dtype in zip(tensors(count, shape), dtypes, strict=True)]
    if data.draw(st.booleans()):
        inputs = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    weights = table(outputs, count)
    from fastdiff.kernels import combine_triton

    agree(combine_triton.forward(inputs, weights, None, 0), inputs, weights)


def test_inputs_that_are_views(kernel):
    whole = tensors(2, (4, 6, 2, 3))
    last = whole[1][:2].to(memory_format=torch.channels_last)
    halves = [*whole[0].chunk(2), whole[1][::2], last, whole[0][:1].expand(2, 6, 2, 3)]
    weights = table(2, len(halves))
    agree(kernel.forward(halves, weights, None, 0), halves, weights)
    variance = [x[:, :3] for x in whole]  # the first half of the channels of a network with learned variance
    agree(kernel.forward(variance, weights[:, :2], None, 0), variance, weights[:, :2])


@pytest.mark.parametrize("noise", [False, True])
def test_the_registered_op(as_on_a_gpu, kernel, monkeypatch, noise):
    """As on a GPU: what its fake promises, no results that share memory, and its gradient by the kernel too."""
    ran = []
    run = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *given: ran.append(1) or run(*given))
    inputs, weights = tensors(3, (2, 3, 7), torch.float16), table(2, 3 + noise)
    seeds = seed_bits(SEEDS[:2]) if noise else None
    op = torch.ops.fastdiff.combine
    torch.library.opcheck(op.default, (inputs, weights, seeds, 1), test_utils=("test_schema", "test_faketensor"))
    leaves = [x.requires_grad_() for x in (*inputs, weights)]
    ran.clear()
    out = op(inputs, weights, seeds, 1)
    got = torch.autograd.grad(out[0].sum() + 2 * out[1].sum(), leaves)
    assert len(ran) == 2
    for x, g, by in zip(inputs, got, weights.T, strict=False):
        torch.testing.assert_close(g, torch.full_like(x, (by[0] + 2 * by[1]).item()))
    torch.testing.assert_close(got[3][1, :3], 2 * torch.stack([x.detach().float().sum() for x in inputs]))


@pytest.mark.parametrize("draw", [0, 3, 2**31 - 1])
def test_noise_is_that_of_the_samples_seeds(kernel, draw):
    seeds = seed_bits(SEEDS)
    inputs, weights = tensors(1, (3, 5, 11)), torch.tensor([[0.0, 1.0], [0.5, -2.0]])
    z, mixed = kernel.forward(inputs, weights, seeds, draw)
    right = normals(seeds, draw, 55).view(z.shape)
    torch.testing.assert_close(z, right, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed, 0.5 * inputs[0] - 2 * right, rtol=0, atol=2e-6)
    apart = seeds.repeat_interleave(2)[::2]  # a view
    assert torch.equal(kernel.forward(inputs, weights, apart, draw)[0], z)


def test_noise_over_its_whole_range(kernel):
    """Every quarter turn of Box-Muller's angle, and radii from small to large: 8,192 normals, 1e-6."""
    from fastdiff.kernels import combine_triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combine_triton, "block", lambda inputs: 4096)
        z = combine_triton.forward([torch.zeros(2, 4096)], torch.tensor([[0.0, 1.0]]), seed_bits([5, 6]), 1)[0]
    right = normals(seed_bits([5, 6]), 1, 4096)
    torch.testing.assert_close(z, right, rtol=0, atol=1e-6)
    assert right.abs().max() > 3.5 and right.abs().min() < 1e-3


def test_a_sample_does_not_depend_on_its_neighbours(kernel):
    inputs, weights, seeds = tensors(2, (3, 40)), table(2, 3), seed_bits(SEEDS)
    whole = kernel.forward(inputs, weights, seeds, 2)
    alone = kernel.forward([x[1:2] for x in inputs], weights, seeds[1:2], 2)
    assert all(torch.equal(a, w[1:2]) for a, w in zip(alone, whole, strict=True))


def test_no_access_outside(kernel, monkeypatch):
    """Every tensor lies between walls of NaN: what is read beyond one poisons a result, what is written breaks a wall."""
    walls = [guarded(torch.randn(2, 3, 7)) for _ in range(2)]
    inputs, weights = [inner for _, inner in walls], table(2, 3)
    empty = torch.empty

    def fenced(shape, **options):
        walls.append(guarded(empty(shape, **options)))
        return walls[-1][1]

    monkeypatch.setattr(torch, "empty", fenced)
    seeds = seed_bits([1, 2])
    got = kernel.forward(inputs, weights, seeds, 1)
    monkeypatch.undo()
    agree(got, inputs, weights, normals(seeds, 1, 21).view(2, 3, 7))
    assert len(walls) == 4
    for buffer, _ in walls:
        assert buffer[:64].isnan().all() and buffer[-64:].isnan().all()


def guarded(x):
    buffer = torch.full((x.numel() + 128,), torch.nan)
    inner = buffer[64:-64].view(x.shape)
    return buffer, inner.copy_(x)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_kernel_does_not_spill(everything):
    found = compiled("combine", everything)
    assert all(f["registers"] <= 128 for f in found)  # four programs a multiprocessor
