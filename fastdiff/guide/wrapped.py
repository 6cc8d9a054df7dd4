"""A denoiser around another: what every guidance on a single prediction shares."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError


class Wrapped(Denoiser):
    """Stands for `inner` in everything but the prediction, which a subclass changes in `__call__`.

    `targets` are values of its own, one a sample where they are tensors of the batch's length.
    """

    def __init__(self, inner: Denoiser, targets: dict[str, Any] | None = None) -> None:
        self.__dict__.update(copy.copy(inner).__dict__)
        self.inner = inner
        self.targets = dict(targets or {})
        self.plan = None  # a plan learned for the network says nothing about the guided one

    @property
    def guidance(self) -> float | None:
        return None

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.inner.calls

    def calls_at(self, t: float) -> int:
        return self.inner.calls_at(t)

    @property
    def leaves(self) -> tuple[Denoiser, ...]:
        return self.inner.leaves

    def choices(self, t: float) -> tuple[Any, ...]:
        """The time itself, where a subclass does not say what it takes from it."""
        return (t, *self.inner.choices(t))

    def bind(self, **cond: Any) -> Denoiser:
        return self._around(self.inner.bind(**cond), self.targets)

    def bound(self) -> Iterator[tuple[str, Any]]:
        yield from self.inner.bound()
        yield from self.targets.items()

    def subset(self, index: Tensor, batch: int) -> Denoiser:
        cut = {k: v[index] if isinstance(v, Tensor) and v.ndim and len(v) == batch else v for k, v in self.targets.items()}
        return self._around(self.inner.subset(index, batch), cut)

    def with_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        raise FastdiffError(f"guidance of kind {type(self).__name__} does not go with learned variance: take another solver")

    def _around(self, inner: Denoiser, targets: dict[str, Any]) -> Denoiser:
        same = copy.copy(self)
        same.inner, same.targets, same.cond = inner, targets, inner.cond
        return same
