"""The gate: an engine's files against the eager sampler, on seeds that nothing else used and at two batch sizes."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..adaptive import Control, sample_adaptive
from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..guide import Guided
from ..noise import from_seeds
from ..plans import Plan
from ..sampling import sample
from .adaptive import SOLVER
from .half import half_copy
from .network import PRECISIONS, Condition
from .runtime import session

if TYPE_CHECKING:
    from .folder import Wish

BATCHES = (1, 3)
FP32 = 1e-4  # largest difference, relative to the largest value or 1
HALF_RATIO = 2.0  # root-mean-square error over that of torch's own network of the same precision
NUDGE, OWN = 2.0**-22, 4.0  # with adaptive step size: two last digits of the noise; times what they move the eager sampler
INT8 = 0.05  # root-mean-square error, relative to the largest value or 1
HALF_FLOOR = 1e-4  # below it a ratio of two roundings says nothing


class NoRuntime(FastdiffError):
    """Nothing on this machine runs an engine of this precision."""


@dataclass(frozen=True)
class Subject:
    """What an engine was made from: a denoiser, guided or not, and a plan; the conditions that it takes, guidance's too."""

    denoiser: Denoiser
    plan: Plan | Control
    inputs: tuple[Condition, ...]
    precision: str
    multiple: int
    fixed: dict[str, np.ndarray]  # inputs that are the same for every batch
    first: int  # of the seeds: this engine's own, made anew when anything in it changes
    decoder: torch.nn.Module | None = None

    @classmethod
    def of(
        cls, folder: Path, denoiser: Denoiser, plan: Plan | Control, inputs: tuple[Condition, ...], wish: Wish,
        fixed: dict[str, np.ndarray],
    ) -> Subject:  # fmt: skip
        digest = hashlib.sha256((folder / "sampler.onnx").read_bytes()).digest()
        first = int.from_bytes(digest[:4], "big")
        return cls(denoiser, plan, inputs, wish.precision, wish.multiple, fixed, first, wish.decoder)

    def shape(self, batch: int) -> tuple[int, ...]:
        """A sample's shape: the denoiser's own; with sizes that vary, another one for the larger batches."""
        assert self.denoiser.shape is not None
        own = self.denoiser.shape
        if not self.multiple or batch == BATCHES[0]:
            return own
        return (*own[:-2], own[-2] + self.multiple, own[-1] + 2 * self.multiple)

    @property
    def times(self) -> tuple[tuple[float, float], ...]:
        """Three times of evaluations, and how large the noisy samples are there."""
        if isinstance(self.plan, Plan):
            rows = [row for row in self.plan.rows if row.calls]
            chosen = (rows[0], rows[len(rows) // 2], rows[-1])
            return tuple((row.t, float(np.hypot(row.alpha, row.sigma))) for row in chosen)
        s = self.denoiser.schedule
        return tuple((t, float(np.hypot(s.alpha(t), s.sigma(t)))) for t in (s.t_max, (s.t_max + s.t_min) / 2, s.t_min))


@dataclass(frozen=True)
class Case:
    """One comparison: conditions for both sides, seeds, and a sample's shape."""

    seeds: list[int]
    conditions: dict[str, Tensor]
    shape: tuple[int, ...]


def check(sampler: Any, network: Any, subject: Subject) -> dict[str, Any]:
    """Figures of the two parts of an engine, each with ONNX Runtime's `run(outputs, feed)`.

    Raises:
        FastdiffError: a difference beyond the tolerance of the precision.
    """
    figures: dict[str, Any] = {"seeds_from": subject.first, "sampler": [], "network": []}
    for batch in BATCHES:
        figures["sampler"].append(sampler_figures(sampler, subject, batch))
        figures["network"].append({"batch": batch, **_network(network, subject, _case(subject, batch))})
    for part in ("sampler", "network"):
        for found in figures[part]:
            judge(part, found, subject.precision)
    return figures


def sampler_figures(run: Any, subject: Subject, batch: int) -> dict[str, float]:
    """How far a sampler lies from the eager one for a batch of this size, and its images from its samples'."""
    return {"batch": batch, **_sampler(run, subject, _case(subject, batch))}


def _case(subject: Subject, batch: int) -> Case:
    drawn = {c.name: _condition(c, batch, subject.first) for c in subject.inputs}
    return Case(list(range(subject.first, subject.first + batch)), drawn, subject.shape(batch))


def sessions(folder: Path, precision: str = "fp32") -> tuple[tuple[Any, Any], str]:
    """sampler.onnx and network.onnx on a provider of ONNX Runtime that runs this precision, and its name.

    Raises:
        NoRuntime: there is none.
    """
    provider = provider_for(precision)
    sampler, _ = session(folder / "sampler.onnx", provider, torch.get_num_threads())
    network, _ = session(folder / "network.onnx", provider, torch.get_num_threads())
    return (sampler, network), provider


def provider_for(precision: str) -> str:
    """A provider that runs an engine of this precision.

    Raises:
        NoRuntime: none here does.
    """
    import onnxruntime

    if precision != "bf16":
        return "cpu"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise NoRuntime("ONNX Runtime runs bf16 on CUDA alone, which is not here")
    return "cuda"


def with_conditions(denoiser: Denoiser, inputs: tuple[Condition, ...], batch: int) -> Denoiser:
    """The denoiser bound to a batch of conditions: classes in turn, anything else at random."""
    given = {c.name: _condition(c, batch, 0) for c in inputs}
    return _bound(denoiser, given, denoiser.shape or ())


def _condition(c: Condition, batch: int, seed: int) -> Tensor:
    """Values for an input: whole numbers from its range, else unit normals."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, c.dtype)
    if c.limits is not None:
        return torch.randint(c.limits[0], c.limits[1] + 1, (batch, *c.shape), generator=generator).to(dtype)
    return torch.randn(batch, *c.shape, generator=generator).to(dtype)


def _bound(denoiser: Denoiser, given: dict[str, Tensor], shape: tuple[int, ...]) -> Denoiser:
    """The denoiser with these conditions, guided where it was, for samples of this shape."""
    made = _conditioned(denoiser, given)
    for d in (made, getattr(made, "positive", made), getattr(made, "negative", made)):
        d.shape = shape
    return made


def _conditioned(denoiser: Denoiser, given: dict[str, Tensor]) -> Denoiser:
    plain = {k: v for k, v in given.items() if not k.startswith("negative_")}
    if not isinstance(denoiser, Guided):
        return denoiser.bind(**plain)
    others = {k.removeprefix("negative_"): v for k, v in given.items() if k.startswith("negative_")}
    null = getattr(denoiser.network, "null_label", None)
    if not others and null is not None:
        others = {"class_labels": torch.full_like(plain["class_labels"], null)}
    positive, negative = denoiser.positive.bind(**plain), denoiser.negative.bind(**{**plain, **others})
    return Guided(positive, negative, denoiser.scale, denoiser.interval, denoiser.rescale)


def _halved(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """The denoiser on torch's own network of this dtype, what a half-precision engine is measured by."""
    if isinstance(denoiser, Guided):
        positive, negative = _halved(denoiser.positive, dtype), _halved(denoiser.negative, dtype)
        return Guided(positive, negative, denoiser.scale, denoiser.interval, denoiser.rescale)
    made = denoiser.bind()
    made.network = half_copy(denoiser.network, dtype)
    made.__dict__.pop("_dtype", None)
    return made


def _eager(denoiser: Denoiser, plan: Plan | Control, seeds: list[int], nudge: float = 0.0) -> np.ndarray:
    """The eager samples; with adaptive step size, of noise that is `nudge` larger."""
    if isinstance(plan, Plan):
        return sample(denoiser, plan, seeds=seeds, device="cpu").numpy()
    noise = from_seeds(seeds)(0, (len(seeds), *(denoiser.shape or ())), torch.device("cpu")) * (1 + nudge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of samples that ran out: the engine says it as an output
        found = sample_adaptive(
            denoiser, noise, solver=SOLVER, rtol=plan.rtol, atol=plan.atol, max_nfe=plan.max_nfe, together=True
        )  # fmt: skip
    return found.x.numpy()


def _sampler(run: Any, subject: Subject, case: Case) -> dict[str, float]:
    den, plan = _bound(subject.denoiser, case.conditions, case.shape), subject.plan
    shape, count = (len(case.seeds), *case.shape), plan.draws if isinstance(plan, Plan) else 0
    draws = [from_seeds(case.seeds)(k, shape, torch.device("cpu")).numpy() for k in range(count + 1)]
    feed = {"noise": draws[0], **subject.fixed, **{k: v.numpy() for k, v in case.conditions.items()}}
    if draws[1:]:
        feed["noises"] = np.stack(draws[1:])
    if isinstance(den, Guided):
        feed["guidance_scale"] = np.array(den.scale, np.float32)
    want, dtype = _eager(den, plan, case.seeds), PRECISIONS[subject.precision]
    half = _eager(_halved(den, dtype), plan, case.seeds) if dtype else None
    x, images = run.run(["x", "images"], feed)
    shown = den.images(_decoded(subject.decoder, torch.from_numpy(x))).numpy()
    found = {**_figures(x, want, half), "images": float(np.abs(images - shown).max())}
    if isinstance(plan, Control):  # steps hang on every digit: how far the last ones alone move the eager sampler
        found["own"] = _figures(_eager(den, plan, case.seeds, NUDGE), want, None)["max"]
    return found


@torch.no_grad()
def _decoded(decoder: torch.nn.Module | None, x: Tensor) -> Tensor:
    return x if decoder is None else decoder(x)


def _network(run: Any, subject: Subject, case: Case) -> dict[str, float]:
    """One evaluation at the first, a middle and the last of the plan's times."""
    den, dtype = _bound(subject.denoiser, case.conditions, case.shape), PRECISIONS[subject.precision]
    den = den.positive if isinstance(den, Guided) else den
    noise = from_seeds(case.seeds)(0, (len(case.seeds), *case.shape), torch.device("cpu"))
    found = []
    for time, size in subject.times:
        x, t = noise * size, np.full(len(case.seeds), time)
        feed = {"x": x.numpy(), "t": t, **{k: v.numpy() for k, v in case.conditions.items() if not k.startswith("negative_")}}
        with torch.no_grad():
            want = den(x, time).numpy()
            half = _halved(den, dtype)(x, time).numpy() if dtype else None
        found.append(_figures(run.run(["x0"], feed)[0], want, half))
    return {key: max(f[key] for f in found) for key in found[0]}


def _figures(got: np.ndarray, want: np.ndarray, half: np.ndarray | None) -> dict[str, float]:
    size = max(1.0, float(np.abs(want).max()))
    figures = {"max": float(np.abs(got - want).max()) / size, "rms": float(np.sqrt(np.mean((got - want) ** 2))) / size}
    if half is not None:
        figures["torch_rms"] = float(np.sqrt(np.mean((half - want) ** 2))) / size
    return figures


def judge(part: str, found: dict[str, float], precision: str) -> None:
    """Raises:
        FastdiffError: figures beyond the tolerance of the precision.
    """
    where = f"{part}.onnx at batch {found['batch']:g}"
    most = max(FP32, OWN * found.get("own", 0.0))
    if precision == "fp32" and not found["max"] <= most:
        raise FastdiffError(f"{where} differs from the eager sampler by {found['max']:.2g}, more than {most:.2g}: not exported")
    if not found.get("images", 0.0) <= FP32:
        raise FastdiffError(f"{where} makes images that differ by {found['images']:.2g} from its samples': not exported")
    if precision == "int8" and not found["rms"] <= INT8:
        raise FastdiffError(f"{where} has an int8 error of {found['rms']:.2g}, more than {INT8:g}: not exported")
    if "torch_rms" in found and not found["rms"] <= max(HALF_FLOOR, HALF_RATIO * found["torch_rms"]):
        raise FastdiffError(f"{where} has an {precision} error of {found['rms']:.2g}, torch's own is {found['torch_rms']:.2g}: "
                            "not exported")  # fmt: skip
