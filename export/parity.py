"""The gate: an engine's files against the eager sampler, on seeds that nothing else used and at two batch sizes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..guide import Guided
from ..noise import from_seeds
from ..plans import Plan
from ..sampling import sample
from .half import half_copy
from .network import Condition
from .runtime import session

BATCHES = (1, 3)
FP32 = 1e-4  # largest difference, relative to the largest value or 1
FP16_RATIO = 2.0  # root-mean-square error over that of torch's own float16 network
FP16_FLOOR = 1e-4  # below it a ratio of two roundings says nothing


@dataclass(frozen=True)
class Subject:
    """What an engine was made from: a denoiser, guided or not, and a plan; the conditions that it takes, guidance's too."""

    denoiser: Denoiser
    plan: Plan
    inputs: tuple[Condition, ...]
    precision: str
    first: int  # of the seeds: this engine's own, made anew when anything in it changes

    @classmethod
    def of(cls, folder: Path, denoiser: Denoiser, plan: Plan, inputs: tuple[Condition, ...], precision: str) -> Subject:
        digest = hashlib.sha256((folder / "sampler.onnx").read_bytes()).digest()
        return cls(denoiser, plan, inputs, precision, int.from_bytes(digest[:4], "big"))


@dataclass(frozen=True)
class Case:
    """One comparison: conditions for both sides, seeds, and the scale."""

    seeds: list[int]
    conditions: dict[str, Tensor]
    scale: float


def check(sampler: Any, network: Any, subject: Subject) -> dict[str, Any]:
    """Figures of the two parts of an engine, each with ONNX Runtime's `run(outputs, feed)`.

    Raises:
        FastdiffError: a difference beyond the tolerance of the precision.
    """
    first, denoiser = subject.first, subject.denoiser
    figures: dict[str, Any] = {"seeds_from": first, "sampler": [], "network": []}
    for batch in BATCHES:
        seeds = list(range(first, first + batch))
        drawn = {c.name: _condition(c, batch, first) for c in subject.inputs}
        scale = denoiser.scale if isinstance(denoiser, Guided) else 1.0
        case = Case(seeds, drawn, scale)
        figures["sampler"].append({"batch": batch, **_sampler(sampler, subject, case)})
        figures["network"].append({"batch": batch, **_network(network, subject, case)})
    for part in ("sampler", "network"):
        for found in figures[part]:
            _judge(part, found, subject.precision)
    return figures


def sessions(folder: Path) -> tuple[tuple[Any, Any], str]:
    """sampler.onnx and network.onnx on ONNX Runtime's CPU provider, and its name."""
    sampler, provider = session(folder / "sampler.onnx", "cpu", torch.get_num_threads())
    network, _ = session(folder / "network.onnx", "cpu", torch.get_num_threads())
    return (sampler, network), provider


def _condition(c: Condition, batch: int, seed: int) -> Tensor:
    """Values for an input: whole numbers from its range, else unit normals."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, c.dtype)
    if c.limits is not None:
        return torch.randint(c.limits[0], c.limits[1] + 1, (batch, *c.shape), generator=generator).to(dtype)
    return torch.randn(batch, *c.shape, generator=generator).to(dtype)


def _bound(denoiser: Denoiser, given: dict[str, Tensor]) -> Denoiser:
    """The denoiser with these conditions, guided where it was."""
    plain = {k: v for k, v in given.items() if not k.startswith("negative_")}
    if not isinstance(denoiser, Guided):
        return denoiser.bind(**plain)
    others = {k.removeprefix("negative_"): v for k, v in given.items() if k.startswith("negative_")}
    null = getattr(denoiser.network, "null_label", None)
    if not others and null is not None:
        others = {"class_labels": torch.full_like(plain["class_labels"], null)}
    positive, negative = denoiser.positive.bind(**plain), denoiser.negative.bind(**{**plain, **others})
    return Guided(positive, negative, denoiser.scale, denoiser.interval, denoiser.rescale)


def _halved(denoiser: Denoiser) -> Denoiser:
    """The denoiser on torch's own float16 network, what an fp16 engine is measured by."""
    if isinstance(denoiser, Guided):
        positive, negative = _halved(denoiser.positive), _halved(denoiser.negative)
        return Guided(positive, negative, denoiser.scale, denoiser.interval, denoiser.rescale)
    made = denoiser.bind()
    made.network = half_copy(denoiser.network)
    made.__dict__.pop("_dtype", None)
    return made


def _sampler(run: Any, subject: Subject, case: Case) -> dict[str, float]:
    denoiser, plan, precision = subject.denoiser, subject.plan, subject.precision
    den = _bound(denoiser, case.conditions)
    assert denoiser.shape is not None
    shape = (len(case.seeds), *denoiser.shape)
    draws = [from_seeds(case.seeds)(k, shape, torch.device("cpu")).numpy() for k in range(plan.draws + 1)]
    feed = {"noise": draws[0], **{k: v.numpy() for k, v in case.conditions.items()}}
    if draws[1:]:
        feed["noises"] = np.stack(draws[1:])
    if isinstance(denoiser, Guided):
        feed["guidance_scale"] = np.array(case.scale, np.float32)
    want = sample(den, plan, seeds=case.seeds, device="cpu").numpy()
    half = sample(_halved(den), plan, seeds=case.seeds, device="cpu").numpy() if precision == "fp16" else None
    return _figures(run.run(["x"], feed)[0], want, half)


def _network(run: Any, subject: Subject, case: Case) -> dict[str, float]:
    """One evaluation at the first, a middle and the last of the plan's times."""
    denoiser, plan, precision = subject.denoiser, subject.plan, subject.precision
    den = _bound(denoiser, case.conditions)
    den = den.positive if isinstance(den, Guided) else den
    rows = [row for row in plan.rows if row.calls]
    noise = from_seeds(case.seeds)(0, (len(case.seeds), *(denoiser.shape or ())), torch.device("cpu"))
    found = []
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        x, t = noise * float(np.hypot(row.alpha, row.sigma)), np.full(len(case.seeds), row.t)
        feed = {"x": x.numpy(), "t": t, **{k: v.numpy() for k, v in case.conditions.items() if not k.startswith("negative_")}}
        with torch.no_grad():
            want = den(x, row.t).numpy()
            half = _halved(den)(x, row.t).numpy() if precision == "fp16" else None
        found.append(_figures(run.run(["x0"], feed)[0], want, half))
    return {key: max(f[key] for f in found) for key in found[0]}


def _figures(got: np.ndarray, want: np.ndarray, half: np.ndarray | None) -> dict[str, float]:
    size = max(1.0, float(np.abs(want).max()))
    figures = {"max": float(np.abs(got - want).max()) / size, "rms": float(np.sqrt(np.mean((got - want) ** 2))) / size}
    if half is not None:
        figures["torch_fp16_rms"] = float(np.sqrt(np.mean((half - want) ** 2))) / size
    return figures


def _judge(part: str, found: dict[str, float], precision: str) -> None:
    where = f"{part}.onnx at batch {found['batch']:g}"
    if precision == "fp32" and not found["max"] <= FP32:
        raise FastdiffError(f"{where} differs from the eager sampler by {found['max']:.2g}, more than {FP32:g}: not exported")
    if precision == "fp16" and not found["rms"] <= max(FP16_FLOOR, FP16_RATIO * found["torch_fp16_rms"]):
        raise FastdiffError(f"{where} has an fp16 error of {found['rms']:.2g}, torch's own is {found['torch_fp16_rms']:.2g}: "
                            "not exported")  # fmt: skip
