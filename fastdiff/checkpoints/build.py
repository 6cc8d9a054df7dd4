"""Networks from a stranger's description: built without memory, compared with the weights, and only then filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError, FastdiffError
from . import mapped
from .weights import listed

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Where = str | Path
SPARE = 64 << 20  # bytes of tables (positions, frequencies) that a network may compute beside its weights


def build(
    make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], where: Where, dtype: torch.dtype | None = torch.float32
) -> nn.Module:
    """The network that `make` describes, with these weights, in eval mode on the CPU.

    Args:
        make: called once or twice; what it raises is a mistake of the description.
        dtype: that floating-point weights are brought to; None = as they are stored. No copy is made where it is right already.

    Raises:
        CheckpointError: a description that makes no network, or another one than the weights are for.
    """
    with torch.device("meta"):
        module = _made(make, len(tensors), where)
    fit(module, tensors, where, dtype)
    if tables := [b for b in module.buffers() if b.is_meta]:
        size = sum(b.numel() * b.element_size() for b in tables)
        if size > SPARE + sum(t.numel() * t.element_size() for t in tensors.values()):
            raise CheckpointError(f"{where}: its description asks for {size:,} bytes of tables, more than the weights themselves")
        with _ParametersOnMeta():
            _fill_tables(module, _made(make, len(tensors), where))
    return module.eval().requires_grad_(False)


def _made(make: Callable[[], nn.Module], count: int, where: Where) -> nn.Module:
    try:
        with _at_most(10 * count + 1000, where):  # a module each and its containers: 5 registrations a tensor in Stable Diffusion
            return make()
    except FastdiffError:
        raise
    except Exception as e:  # another library's class on a stranger's values: anything may come
        why = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        raise CheckpointError(f"{where}: its description makes no network ({why})") from e


@contextmanager
def _at_most(count: int, where: Where) -> Iterator[None]:
    """Ends a construction that registers more parts than the weights could ever fill, before it takes minutes."""
    left = count

    def counted(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise CheckpointError(f"{where}: its description has over {count:,} parts, far more than the file has tensors")

    hooks = (
        torch_module.register_module_parameter_registration_hook(counted),
        torch_module.register_module_module_registration_hook(counted),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _ParametersOnMeta(TorchFunctionMode):
    """What modules make their parameters with, torch.empty, takes no memory; computed tables become real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _fill_tables(module: nn.Module, source: nn.Module) -> None:
    """Replaces buffers that are no part of the state dict by the computed ones."""
    real = dict(source.named_buffers())
    for path, child in module.named_modules():
        for name, buffer in list(child._buffers.items()):
            if buffer is not None and buffer.is_meta:
                child._buffers[name] = real[f"{path}.{name}" if path else name]


def fit(module: nn.Module, tensors: Mapping[str, Tensor], where: str | Path, dtype: torch.dtype | None = torch.float32) -> None:
    """Makes these tensors the module's own, without a copy where the dtype is right already.

    The module may lie on the meta device: no memory is taken before names and shapes are found to agree.

    Args:
        dtype: that floating-point weights are brought to; None = as they are stored.

    Raises:
        CheckpointError: names missing or left over, shapes or kinds of number that differ; the first ten of each, and how many.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items() if name in tensors and tensors[name].shape != value.shape
    ]  # fmt: skip
    unlike = [
        f"{name} {tensors[name].dtype}" for name, value in wanted.items()
        if name in tensors and not _same_kind(tensors[name].dtype, value.dtype)
    ]  # fmt: skip
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "of another dtype": unlike}
    if any(kinds.values()):
        found = "; ".join(f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names)
        raise CheckpointError(f"{where}: its weights and its description disagree: {found}")
    files = mapped.ranges()
    module.load_state_dict({k: _brought(v, dtype, files) for k, v in tensors.items()}, assign=True)


def _brought(value: Tensor, dtype: torch.dtype | None, files: mapped.Ranges) -> Tensor:
    if dtype is None or value.dtype == dtype or not value.is_floating_point():
        return value
    copy = value.to(dtype)
    mapped.release(value, files)
    return copy


def _same_kind(given: torch.dtype, wanted: torch.dtype) -> bool:
    return given in FLOATS if wanted in FLOATS else given == wanted
