"""Several conditions at once (Liu et al. 2022, Compositional Visual Generation, eq. 11)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from .classifier_free import conditions
from .wrapped import Wrapped


class Composed(Wrapped):
    """D_negative + sum of scale_i (D_i - D_negative)."""

    def __init__(self, negative: Denoiser, parts: Sequence[Denoiser], scales: Sequence[float]) -> None:
        super().__init__(negative)
        self.parts = tuple((part, scale) for part, scale in zip(parts, scales, strict=True) if scale != 0.0)
        self.rest = 1.0 - sum(scales)  # the negative condition's own weight; where it is 0 it is not asked

    @property
    def calls(self) -> int:  # type: ignore[override]
        return sum(part.calls for part, _ in self.parts) + (self.inner.calls if self.rest else 0)

    def calls_at(self, t: float) -> int:
        return self.calls

    @property
    def leaves(self) -> tuple[Denoiser, ...]:
        return (*self.inner.leaves, *(leaf for part, _ in self.parts for leaf in part.leaves))

    def choices(self, t: float) -> tuple[Any, ...]:
        return (*self.inner.choices(t), *(choice for part, _ in self.parts for choice in part.choices(t)))

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        total = self.inner(x, t) * self.rest if self.rest else torch.zeros_like(x)
        for part, scale in self.parts:
            total = total.add_(part(x, t), alpha=scale)
        return total

    def bind(self, **cond: Any) -> Denoiser:
        if contrast := [k for k in cond if any(part.cond.get(k) is not self.inner.cond.get(k) for part, _ in self.parts)]:
            raise FastdiffError(f"the conditions differ in {', '.join(contrast)}: bind it before guide.compose")
        return self._of(self.inner.bind(**cond), [part.bind(**cond) for part, _ in self.parts])

    def bound(self) -> Iterator[tuple[str, Any]]:
        for part, _ in self.parts:
            yield from part.bound()
        yield from super().bound()

    def subset(self, index: Tensor, batch: int) -> Denoiser:
        return self._of(self.inner.subset(index, batch), [part.subset(index, batch) for part, _ in self.parts])

    def _of(self, inner: Denoiser, parts: Sequence[Denoiser]) -> Denoiser:
        same = self._around(inner, self.targets)
        assert isinstance(same, Composed)
        same.parts = tuple((part, scale) for part, (_, scale) in zip(parts, self.parts, strict=True))
        return same


def compose(
    denoiser: Denoiser, conds: Sequence[Mapping[str, Any]], scales: Sequence[float], negative: Mapping[str, Any] | None = None
) -> Composed:
    """Several conditions together, each with a scale of its own; a negative scale means "not this".

    Costs one call a condition and one for the negative, which is asked only where the scales do not add up to 1.

    Raises:
        FastdiffError: no condition, scales that do not match them or are not finite, no negative condition.
    """
    if not conds or len(conds) != len(scales) or not all(math.isfinite(s) for s in scales):
        raise FastdiffError(f"compose needs a finite scale a condition; given {len(conds)} conditions, scales {list(scales)}")
    pairs = [conditions(denoiser, cond, negative) for cond in conds]
    return Composed(pairs[0][1], [part for part, _ in pairs], [float(s) for s in scales])
