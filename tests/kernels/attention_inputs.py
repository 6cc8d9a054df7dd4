"""What the tests of attention's kernels share: inputs, walls around them, and what an old interpreter cannot do."""

import numpy as np
import pytest
import torch

DTYPES = [torch.float16, torch.bfloat16]


def draw(*shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(batch, heads, queries, keys, head, dtype=torch.float16):
    sizes = (queries, keys, keys)
    return [draw(batch, heads, n, head, seed=i, dtype=dtype) for i, n in enumerate(sizes)]


def guarded(x):
    """A copy between walls of NaN: the whole buffer, and the copy in it."""
    buffer = torch.full((x.numel() + 1024,), torch.nan, dtype=x.dtype)
    inner = buffer[512:-512].view(x.shape)
    return buffer, inner.copy_(x)


def whole(walls):
    """Whether nobody wrote on them."""
    return all(bool(buffer[:512].isnan().all() and buffer[-512:].isnan().all()) for buffer, _ in walls)


def needs_loops():
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 cannot loop up to a loaded number with numpy 2.4 (3.9 can)")
