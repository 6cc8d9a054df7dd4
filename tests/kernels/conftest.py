"""The kernels run here in Triton's interpreter."""

import contextlib

import interpreted
import pytest

if interpreted.PRESENT:
    ops = ("group_norm_triton", "group_norm_backward_triton", "combine_triton", "attention_triton", "attention_backward_triton")
    interpreted.load(*(f"fastdiff.kernels.{name}" for name in ops))


def pytest_collection_modifyitems(items):
    for item in items:
        if not interpreted.PRESENT and "tests/kernels" in str(item.path) and "_triton" in item.path.name:
            item.add_marker(pytest.mark.skip(reason="not installed: triton (the extra `gpu`)"))


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Triton's interpreter, mended: in 3.6 to 3.9 it cuts off where it makes bfloat16; a GPU rounds to the nearest even."""
    if not interpreted.PRESENT:
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton 3.9 asks again at the first launch
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut = InterpreterBuilder.cast_impl

    def cast(self, src, to):
        if src.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.tensor(src.data).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(rounded, to.scalar)
        return cut(self, src, to)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", cast)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The registered ops run the kernels on the CPU's tensors, in the interpreter."""
    import torch

    from fastdiff.kernels import attention, combine, group_norm

    for op in (attention, combine, group_norm):
        monkeypatch.setattr(op, "missing_triton", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
