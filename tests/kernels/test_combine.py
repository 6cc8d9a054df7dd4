"""The registered op of the sampler's update on the CPU: what torch.compile, export, ONNX and autograd see. No triton needed."""

import pytest
import torch

from fastdiff import ops
from fastdiff.errors import FastdiffError
from fastdiff.kernels import combine as m
from fastdiff.noise import normal
from fastdiff.philox import seed_bits

op = torch.ops.fastdiff.combine
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def tensors(count, shape=(2, 3, 4), dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for _ in range(count)]


def test_value_and_noise():
    inputs, seeds = tensors(2), seed_bits([7, 2**64 - 1])
    weights = torch.tensor([[2.0, -0.5, 0.25], [0.0, 0.0, 1.0]])
    z = normal([7, 2**64 - 1], 3, 12).view(2, 3, 4)
    y, noise = op(inputs, weights, seeds, 3)
    torch.testing.assert_close(y, 2 * inputs[0] - 0.5 * inputs[1] + 0.25 * z)
    assert torch.equal(noise, z)
    assert torch.equal(ops.combine(inputs, weights, seeds, 3)[0], y)


def test_dtype_is_at_least_float32():
    half = [x.bfloat16() for x in tensors(2)]
    assert op(half, torch.ones(1, 2), None, 0)[0].dtype == torch.float32
    assert op([half[0], tensors(1, dtype=torch.float64)[0]], torch.ones(1, 2), None, 0)[0].dtype == torch.float64


@pytest.mark.parametrize("seeded", [False, True])
def test_gradients_against_finite_differences(seeded):
    inputs = [x.requires_grad_() for x in tensors(3, (2, 2, 2), torch.float64)]
    seeds = seed_bits([1, 2]) if seeded else None
    weights = torch.linspace(-1, 2, 2 * (3 + seeded), dtype=torch.float64).view(2, -1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, *x: op(list(x), w, seeds, 1), (weights, *inputs))
    assert torch.autograd.gradcheck(lambda w, *x: op(list(x), w, seeds, 1)[1], (weights, *inputs))  # one output unused


@pytest.mark.parametrize("utils", [QUICK, pytest.param("test_aot_dispatch_dynamic", marks=pytest.mark.slow)])
def test_opcheck(utils):
    inputs = [x.requires_grad_() for x in tensors(3)]
    torch.library.opcheck(op.default, (inputs, torch.rand(2, 4).requires_grad_(), seed_bits([1, 2]), 1), test_utils=utils)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "1 to 16 tensors"),
        ({"inputs": [torch.ones(2, 3), torch.ones(2, 1)]}, r"of one shape on one device; given \(2, 3\) on cpu, \(2, 1\) on cpu"),
        ({"inputs": [torch.ones(2, 3, dtype=torch.int64)] * 2}, "floating-point tensors"),
        ({"weights": torch.ones(1, 3)}, r"weights must be \(1 to 8, 2\); given \(1, 3\)"),
        ({"weights": torch.ones(9, 2)}, r"given \(9, 2\)"),
        ({"weights": torch.ones(1, 2, dtype=torch.int64)}, "weights must be floating point on cpu"),
        ({"seeds": seed_bits([1]), "weights": torch.ones(1, 3)}, "one int64 seed a sample"),
        ({"draw": -1}, r"draw must lie in \[0, 2\^31\); given -1"),
    ],
)
def test_bad_input_is_one_line(change, message):
    given = {"inputs": [torch.ones(2, 3)] * 2, "weights": torch.ones(1, 2), "seeds": None, "draw": 0, **change}
    with pytest.raises(FastdiffError, match=message):
        ops.combine(**given)


def test_why_not_says_where_the_kernel_runs():
    assert m.why_not([torch.ones(2, 3)]) == "the tensors are on cpu, the kernels run on NVIDIA GPUs"
