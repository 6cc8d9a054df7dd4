"""How `fastdiff sample` makes images: by a plan or by adaptive steps, guided or not, batch by batch."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .console import say

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoints.conditions import Conditions
    from ..denoiser import Denoiser
    from ..plans import Plan
    from ..streaming import Request


@dataclass(frozen=True)
class Method:
    """`run` gives samples (B, *shape) and the network calls of each; `title` names it, `identity` tells it from all others."""

    title: str
    identity: dict[str, Any]
    run: Callable[[Denoiser, list[int]], tuple[Tensor, list[int]]]


def by_plan(plan: Plan) -> Method:
    from ..sampling import sample as run_plan

    def run(denoiser: Denoiser, seeds: list[int]) -> tuple[Tensor, list[int]]:
        times = [row.t for row in plan.rows if row.calls]
        calls = sum(denoiser.calls_at(t) for t in times)
        return run_plan(denoiser, plan, seeds=seeds), [calls] * len(seeds)

    digest = hashlib.sha256(plan.to_json().encode()).hexdigest()
    identity = {"plan": f"{plan.name}, {plan.nfe} evaluations, sha256 {digest}"}
    return Method(f"{plan.provenance.get('auto', plan.name)}, {plan.nfe} evaluations", identity, run)


def by_adaptive_steps(rtol: float | None, atol: float | None) -> Method:
    from ..adaptive import Control, sample_adaptive
    from ..pairs import DEFAULT

    default = Control()
    control = Control(default.rtol if rtol is None else rtol, default.atol if atol is None else atol)

    def run(denoiser: Denoiser, seeds: list[int]) -> tuple[Tensor, list[int]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said once, below, in the command's own words
            found = sample_adaptive(denoiser, seeds=seeds, solver=DEFAULT, rtol=control.rtol, atol=control.atol)
        if bool(found.unfinished.any()):
            tired = [seed for seed, flag in zip(seeds, found.unfinished.tolist(), strict=True) if flag]
            say(f"seeds {tired} reached {control.max_nfe} evaluations before the end: raise --rtol or --atol")
        return found.x, [n * denoiser.calls for n in found.nfe.tolist()]

    identity = {"adaptive": {"solver": DEFAULT, "rtol": control.rtol, "atol": control.atol}}
    return Method(f"adaptive {DEFAULT}, rtol {control.rtol:g}, atol {control.atol:g}", identity, run)


class Made(NamedTuple):
    """Of a batch: images (B, 1 or 3, H, W) uint8 on the CPU, network calls of each, latents where nothing decodes them."""

    images: Tensor
    calls: list[int]
    latents: Tensor | None


@dataclass(frozen=True)
class Maker:
    """Makes a batch of requests; `rows` says which of the conditions belong to a seed, where each has its own."""

    denoiser: Denoiser
    method: Method
    guidance: float
    conditions: Conditions | None = None
    rows: Mapping[int, int] = field(default_factory=dict)

    def __call__(self, part: list[Request]) -> Made:
        import torch

        from ..guide import cfg

        bound = self.denoiser
        if self.conditions is not None and self.rows:
            bound = self.conditions.bound(bound, [self.rows[r.seed] for r in part])
        if part[0].label is not None:
            bound = bound.bind(class_labels=torch.tensor([r.label for r in part], device=bound.device))
        if self.guidance != 1.0:
            bound = cfg(bound, self.guidance, negative=bound.unprompted)
        x, calls = self.method.run(bound, [r.seed for r in part])
        images = (self.denoiser.images(x) * 255).round().to("cpu", torch.uint8)
        if latent(self.denoiser):
            return Made(images[:, : 3 if images.shape[1] > 3 else 1], calls, x.float().cpu())
        return Made(images, calls, None)


def latent(denoiser: Denoiser) -> bool:
    """Whether samples have other channels than a picture, and nothing decodes them."""
    return denoiser.decoder is None and denoiser.shape is not None and denoiser.shape[0] not in (1, 3)
