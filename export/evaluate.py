"""One evaluation of a denoiser inside a sampler's graph: (y, the four scalars) -> x0, with guidance where there is one.

Guidance evaluates both conditions in one batch of twice the size: one network graph, and one large call instead of two small
ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FastdiffError
from ..guide import Guided, Wrapped
from .graph import FLOAT, Graph, Weight, joined, scaled, total, value, weight_tensor, zeros
from .network import BATCH, WEIGHTS, Condition, Traced, condition_values

SCALE = "guidance_scale"
LEVELS = ("c_in", "c_skip", "c_out", "c_noise", "guided")  # what an evaluation is told, beside the point


@dataclass(frozen=True)
class Contrast:
    """How a guided denoiser's two conditions differ: each input's constant negative value, or None for an input of its own; the
    range of sigma/alpha where guidance acts; how far the result is scaled back to the conditional prediction's spread."""

    negatives: dict[str, int | None]
    low: float
    high: float
    rescale: float = 0.0

    @property
    def everywhere(self) -> bool:
        return (self.low, self.high) == (0.0, float("inf"))

    def inputs(self, traced: Traced) -> list[Condition]:
        """The further inputs it asks for."""
        found = [c for c in traced.conditions if self.negatives.get(c.name, 0) is None]
        return [Condition(f"negative_{c.name}", c.shape, c.dtype, c.limits) for c in found]


def contrast_of(guided: Guided) -> Contrast:
    """What a guided denoiser contrasts.

    Raises:
        FastdiffError: guidance that is more than two conditions of one network and a scale.
    """
    same = guided.positive.network is guided.negative.network
    nested = any(isinstance(d, Guided | Wrapped) for d in (guided.positive, guided.negative))
    if guided.projection or type(guided) is not Guided or not same or nested:
        raise FastdiffError("an engine holds classifier-free guidance of one network with a scale, an interval and rescale: no "
                            "apg or cfgpp, no second network, no guidance inside guidance")  # fmt: skip
    null = getattr(guided.network, "null_label", None)
    negatives: dict[str, int | None] = {}
    for name, value_ in guided.positive.cond.items():
        other = guided.negative.cond.get(name)
        if other is value_:
            continue
        is_null = name == "class_labels" and null is not None and other is not None and bool((other == null).all())
        negatives[name] = int(null) if is_null and null is not None else None
    if set(guided.negative.cond) != set(guided.positive.cond) or not negatives:
        raise FastdiffError("guidance needs two conditions with the same names and different values; bind them before export")
    return Contrast(negatives, *guided.interval, guided.rescale)


@dataclass(frozen=True)
class Evaluation:
    """Writes evaluations: `size` is the shape (1,) of the network's batch, `conditions` its inputs, one kind after the other."""

    traced: Traced
    contrast: Contrast | None
    size: str
    conditions: tuple[str, ...]

    @classmethod
    def of(cls, g: Graph, traced: Traced, contrast: Contrast | None) -> Evaluation:
        """What all evaluations share, written into the outer graph."""
        size = g.add("Shape", "noise", start=0, end=1)
        if contrast is None:
            return cls(traced, None, size, tuple(c.name for c in traced.conditions))
        doubled = []
        for c in traced.conditions:
            negative = contrast.negatives.get(c.name, c.name)
            if negative is None:
                negative = f"negative_{c.name}"
            elif isinstance(negative, int):
                negative = g.add("Expand", g.constant([negative], c.dtype), g.add("Shape", c.name))
            doubled.append(g.add("Concat", c.name, negative, axis=0))
        return cls(traced, contrast, g.add("Mul", size, g.constant([2], np.int64)), tuple(doubled))

    def inputs(self) -> list[Any]:
        """The inputs of a sampler that evaluates: conditions and, with guidance, its own."""
        found = condition_values(self.traced)
        if self.contrast is not None:
            found += [value(c.name, c.onnx_dtype, (BATCH, *c.shape)) for c in self.contrast.inputs(self.traced)]
            found.append(value(SCALE, FLOAT, ()))
        return found

    def denoised(self, g: Graph, y: str, c: Mapping[str, Weight]) -> str:
        """x0 at the point y; `c` are LEVELS, as numbers or tensors (1,)."""
        x = scaled(g, c["c_in"], y)
        if self.contrast is not None:
            x = g.add("Concat", x, x, axis=0)
        told = g.add("Expand", weight_tensor(g, c["c_noise"]), self.size)
        f = g.inline(self.traced.model, [x, told, *self.conditions], WEIGHTS)[0]
        if self.contrast is None:
            return self._x0(g, y, f, c)
        positive, negative = g.add("Split", f, axis=0, num_outputs=2, outputs=2)
        # F_n + scale (F_c - F_n): both have the same four scalars, so this is guidance of x0
        guided = g.add("Add", negative, scaled(g, _scale(g, c["guided"]), g.add("Sub", positive, negative)))
        d = self._x0(g, y, guided, c)
        return self._rescaled(g, d, self._x0(g, y, positive, c)) if self.contrast.rescale else d

    def _x0(self, g: Graph, y: str, f: str, c: Mapping[str, Weight]) -> str:
        if self.traced.denoiser.prediction == "both":
            f = joined(g, f, weight_tensor(g, c["c_skip"]), weight_tensor(g, c["c_out"]))
        return total(g, [(w, v) for w, v in ((c["c_skip"], y), (c["c_out"], f)) if w != 0.0]) or zeros(g, y)

    def _rescaled(self, g: Graph, guided: str, positive: str) -> str:
        """Lin et al. 2023, eq. 15-16: towards the conditional prediction's own standard deviation, sample by sample."""
        assert self.contrast is not None
        axes = g.constant(range(1, 1 + len(self.traced.shape)), np.int64)

        def variance(v: str) -> str:
            centred = g.add("Sub", v, g.add("ReduceMean", v, axes))
            return str(g.add("ReduceMean", g.add("Mul", centred, centred), axes))

        ratio = g.add("Sqrt", g.add("Div", variance(positive), variance(guided)))
        one = g.constant(1.0, np.float32)
        part = g.add("Mul", g.constant(self.contrast.rescale, np.float32), g.add("Sub", ratio, one))
        return str(g.add("Mul", guided, g.add("Add", one, part)))


def _scale(g: Graph, acts: Weight) -> Weight:
    """The scale where guidance acts, 1 where it does not."""
    if acts == 0.0:
        return 1.0
    if acts == 1.0:
        return SCALE
    one = g.constant(1.0, np.float32)
    return str(g.add("Add", one, g.add("Mul", weight_tensor(g, acts), g.add("Sub", SCALE, one))))
