"""Factors kept as tensors: the same bits as the floats they stand for, and only where nobody can tell."""

import pytest
import torch

from fastdiff.scalars import factors, itself

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("w", [1 / 3, -1e-20, 3e38, 1e-46, 0.0, 1.0, 1e300])
def test_the_same_bits(w):
    kept = factors(X)(w)
    assert isinstance(kept, torch.Tensor) and kept is factors(X)(w)
    assert torch.equal((X * kept).view(torch.int32), (X * w).view(torch.int32))


def test_floats_stay_floats_elsewhere():
    for x in (X.double(), X.bfloat16(), X.half(), X.to("meta"), torch.nn.Parameter(X)):
        assert factors(x) is itself


def test_nothing_is_kept_inside_a_trace_or_a_transform():
    seen = []

    def f(x):
        seen.append((factors(x) is itself, torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()))
        return (x * factors(x)(0.321)).sum()

    torch.jit.trace(f, X)
    torch.func.grad(f)(X)
    torch.func.functionalize(f)(X)
    assert sum(inside for _, inside in seen) >= 3 and all(floats == inside for floats, inside in seen)
    assert (X * factors(X)(0.321)).tolist() == (X * 0.321).tolist()


def test_a_factor_made_in_inference_mode_serves_a_gradient():
    with torch.inference_mode():
        factors(X)(0.123)
    x = X.clone().requires_grad_(True)
    (x * factors(x)(0.123)).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(X, 0.123))


def test_a_compiler_sees_floats():
    """A tensor from outside would be an input of the graph, or a constant in an exported file."""

    class Product(torch.nn.Module):
        def forward(self, x):
            return x * factors(x)(0.7)

    exported = torch.export.export(Product(), (X,))
    assert not exported.constants and len(exported.graph_signature.input_specs) == 1
    assert torch.equal(torch.compile(Product(), fullgraph=True, backend="eager")(X), X * 0.7)
