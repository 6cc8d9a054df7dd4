"""Denoiser: the one canonical prediction, (x, t) -> x0, made from any network at this border."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .errors import FastdiffError
from .prediction import Coefficients, Level, check_prediction, coefficients, joined
from .scalars import factors
from .schedule import NoiseSchedule

if TYPE_CHECKING:
    from .plans import Plan

Network = Callable[..., Any]


class Folded(NamedTuple):
    """A denoiser's own arithmetic at one time, where it is linear: D = skip x + sum of weight * network output."""

    skip: float
    weights: tuple[float, ...]


class Denoiser:
    """A network together with its schedule and prediction type; call it as `denoiser(x, t) -> x0`.

    Args:
        network: any callable `(c_in*x, c_noise, **bound) -> F`; c_noise is a (B,) float32 tensor.
        schedule: the noise schedule that the network was trained with.
        prediction: "eps", "x0", "v", "flow", "score" or "edm"; or "both", x0 and eps in twice the channels, x0 first.
        shape: one sample's shape without the batch, or None where it is not known (then `seeds=` cannot be used).
        time: maps the schedule's t to what the network wants (index, 1 - t, ...); default t, for "edm" log(sigma/alpha)/4.
        data_range: the (lowest, highest) value of the images that the network was trained on.
        output: picks the prediction from what the network returns; default: the first of a tuple, `.sample` of an object.
    """

    calls = 1  # network calls per evaluation: NFE counts these
    hash = ""  # sha256 of the checkpoint's weights, where the denoiser was loaded from one

    def __init__(
        self,
        network: Network,
        schedule: NoiseSchedule,
        prediction: str = "eps",
        shape: Sequence[int] | None = None,
        time: Callable[[Any], Any] | None = None,
        data_range: tuple[float, float] = (-1.0, 1.0),
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        check_prediction(prediction)
        if not data_range[0] < data_range[1]:
            raise FastdiffError(f"data_range must be (lowest, highest); given {data_range}")
        if shape is not None and not all(isinstance(side, int) and side > 0 for side in shape):
            raise FastdiffError(f"shape must hold positive whole numbers, one sample's without the batch; given {tuple(shape)}")
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.shape = None if shape is None else tuple(shape)
        self.time = time
        self.data_range = data_range
        self.output = output or first_tensor
        self.cond: dict[str, Any] = {}
        self.plan: Plan | None = None  # the plan that a student or a tuned checkpoint ships with
        self.tuned: tuple[Plan, ...] = ()  # plans tuned for it, one a budget and guidance, and a student's own where it has
        # one for each of several step counts: see `tuned_plan`
        self.info: dict[str, Any] = {}  # the checkpoint's own metadata
        self.decoder: Callable[[Tensor], Tensor] | None = None  # samples -> images in data_range, where samples are latents
        self.encode: Callable[[Sequence[str]], dict[str, Any]] | None = None  # prompts -> the conditions to bind
        self.contrast: dict[str, Any] | None = None  # the conditions that guidance leads away from, bound beside the others
        self.write: Callable[..., None] | None = None  # (folder, network, training): a checkpoint of the layout it came in
        self.levels: dict[float, tuple[Coefficients, Level]] = {}  # of every float time asked for: see `level`

    @property
    def guidance(self) -> float | None:
        """The scale of classifier-free guidance; 1 = none; None where more than a scale describes it."""
        bound = self.cond.get("guidance", 1.0)  # of a network that takes the scale as an input
        return bound if isinstance(bound, float) else None

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for, the null class not counted; 0 for a network without class labels."""
        rows = getattr(getattr(self.network, "config", None), "num_classes", None) or 0
        return rows - 1 if getattr(self.network, "null_label", None) is not None else rows

    @property
    def unprompted(self) -> dict[str, Any] | None:
        """What guidance leads away from: `contrast`, or the conditions of the empty prompt; None where there are neither."""
        return self.contrast if self.contrast is not None or self.encode is None else self.encode([""])

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The numbers of calls that a student of several was trained for; empty for any other network."""
        return getattr(self.network, "step_counts", ())

    def told_of(self, plan: Plan) -> Denoiser:
        """The denoiser as it runs a plan: a student of several step counts is told the plan's, where no `steps` is bound.

        Raises:
            FastdiffError: a number of calls that the student was not trained for.
        """
        if not self.step_counts or "steps" in self.cond:
            return self
        self._check_count(plan.nfe)
        return self.bind(steps=plan.nfe)

    def _check_count(self, nfe: int) -> None:
        if self.step_counts and nfe not in self.step_counts:
            raise FastdiffError(f"this student was trained for {', '.join(map(str, self.step_counts))} calls; asked for {nfe}")

    def tuned_plan(self, nfe: int, guidance: float | None = None) -> Plan | None:
        """The plan tuned for this checkpoint, its guidance (or the scale given) and `nfe` evaluations, where there is one; of a
        student of several step counts its own.

        Raises:
            FastdiffError: a number of calls that such a student was not trained for.
        """
        self._check_count(nfe)
        return next((p for p in self.tuned if p.nfe == nfe and self.why_not(p, guidance) is None), None)

    def why_not(self, plan: Plan, guidance: float | None = None) -> str | None:
        """Why a learned plan is not for this denoiser, or None where it is; a solver's plan says nothing about checkpoints.

        `guidance`: the scale that the denoiser will be guided by elsewhere; None = its own.
        """
        made = plan.provenance.get("tuned_for")
        if not isinstance(made, dict):
            return None
        if made.get("checkpoint") != self.hash:
            return f"it was tuned for checkpoint {str(made.get('checkpoint'))[:12] or 'without a hash'}, " \
                   f"this is {self.hash[:12] or 'one without a hash'}"  # fmt: skip
        if made.get("prediction") != self.prediction:
            return f"it was tuned for prediction {made.get('prediction')}, this checkpoint predicts {self.prediction}"
        if made.get("schedule") != self.schedule.config():
            return f"it was tuned on schedule {made.get('schedule')}, this checkpoint has {self.schedule.config()}"
        scales = made.get("guidance") or [1.0]
        scale = self.guidance if guidance is None else guidance
        if scale is None or not min(scales) <= scale <= max(scales):
            return f"it was tuned at guidance {', '.join(f'{s:g}' for s in scales)}, not at this one"
        return None

    def with_network(self, network: Network, prediction: str | None = None) -> Denoiser:
        """A copy around another network, of another prediction where given, without the plans that belonged to its own."""
        out = copy.copy(self)
        out.network, out.plan, out.tuned, out.levels = network, None, (), {}
        out.prediction = prediction or self.prediction
        check_prediction(out.prediction)
        out.__dict__.pop("_dtype", None)
        return out

    def bind(self, **cond: Any) -> Denoiser:
        """A copy with conditioning attached: it is passed to every call of the network, by name."""
        bound = copy.copy(self)
        bound.cond = {**self.cond, **cond}
        return bound

    def bound(self) -> Iterator[tuple[str, Any]]:
        """Every condition that an evaluation takes, with its name."""
        yield from self.cond.items()

    def calls_at(self, t: float) -> int:
        """Network calls of an evaluation at time t."""
        return self.calls

    def subset(self, index: Tensor, batch: int) -> Denoiser:
        """The denoiser of some samples of a batch: bound tensors of the batch's length are cut to them."""
        return self.bind(**rows_of(self.cond, index, batch)) if self.cond else self

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The denoised prediction for the noisy sample x (B, ...) at time t, a float or a (B,) tensor; x's shape and dtype."""
        if isinstance(t, Tensor):
            c, c_noise = self._at_tensor(x, t)
        else:
            c, level = self.levels.get(t) or self.level(t)
            c_noise = told(x, level)
        return self._denoise(x, c, c_noise)

    def with_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The denoised prediction, and beside it the network's variance output v of x's shape (Nichol and Dhariwal 2021, eq. 15:
        -1 is the smallest variance, 1 the largest).

        Raises:
            FastdiffError: the network returns no second half of channels.
        """
        (c_in, c_skip, c_out), level = self.level(t)
        f = self.raw(x * c_in, told(x, level)).to(x.dtype)
        if f.shape == x.shape or self.prediction == "both":
            raise FastdiffError("this plan needs learned variance: a network that returns twice the channels of its input")
        first, v = self._halves(f, x)
        return x * c_skip + first * c_out, v

    def folded(self, t: float) -> Folded | None:
        """What turns `outputs` at time t into the prediction, for who does that arithmetic elsewhere; None: call the denoiser."""
        if type(self).__call__ is not Denoiser.__call__:
            return None
        (_, c_skip, c_out), _ = self.level(t)
        return Folded(c_skip, (c_out,))

    def outputs(self, x: Tensor, t: float) -> tuple[Tensor, ...]:
        """The network's outputs at time t, each of x's shape and of the network's own dtype: one for each weight of `folded`."""
        c, noise_level = self.level(t)
        return (self._output(x, c, told(x, noise_level)),)

    def raw(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """The network's own output F for an input already scaled by c_in, in the network's dtype."""
        dtype = self.dtype
        return self.output(self.network(x if dtype is None or dtype is x.dtype else x.to(dtype), c_noise, **self.cond))

    def _denoise(self, x: Tensor, c: Coefficients, c_noise: Tensor) -> Tensor:
        _, c_skip, c_out = c
        f = self._output(x, c, c_noise)
        if f.dtype != x.dtype:
            f = f.to(x.dtype)
        if isinstance(c_skip, float):
            factor = factors(x)
            return (x * factor(c_skip)).add_(f, alpha=c_out) if c_skip != 0.0 else f * factor(c_out)
        return x * c_skip + f * c_out

    def _output(self, x: Tensor, c: Coefficients, c_noise: Tensor) -> Tensor:
        """What the network predicts, of x's shape."""
        f = self.raw(x if isinstance(c.c_in, float) and c.c_in == 1.0 else x * c.c_in, c_noise)
        if self.prediction == "both":
            return joined(*self._halves(f, x), c)
        return f if f.shape == x.shape else self._halves(f, x)[0]

    def _halves(self, f: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of twice x's channels: a prediction and its variance, or an x0 and an eps."""
        doubled = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if f.shape != doubled:
            wanted = "the same shape (or twice the channels, with learned variance)"
            wanted = 'twice the channels, x0 and then eps, for prediction="both"' if self.prediction == "both" else wanted
            raise FastdiffError(
                f"the network returned shape {tuple(f.shape)} for an input of {tuple(x.shape)}; it must return {wanted}; "
                "pass output= to pick the right tensor"
            )
        return f[:, : x.shape[1]], f[:, x.shape[1] :]

    @property
    def leaves(self) -> tuple[Denoiser, ...]:
        """The denoisers that call a network: without guidance this one alone."""
        return (self,)

    def choices(self, t: float) -> tuple[Any, ...]:
        """What a call at the float time t takes from the host beside its leaves' levels: equal for two times that differ in
        these alone, as the choice whether guidance acts. A captured loop keeps it."""
        return () if type(self) is Denoiser else (t,)  # a subclass that does not say may take anything from the time

    def level(self, t: float) -> tuple[Coefficients, Level]:
        """Coefficients and c_noise of one time, computed once in float64 and kept."""
        return self.levels.get(t) or self._at(t)

    def _at(self, t: float) -> tuple[Coefficients, float]:
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        if alpha == 0.0 and self.prediction in ("eps", "score"):
            raise FastdiffError(
                f"prediction={self.prediction!r} does not determine x0 at alpha = 0 (t = {t:g}): start below full noise "
                "(a schedule with a finite log-SNR), or use a v, x0 or flow prediction"
            )
        c = Coefficients(*(float(value) for value in coefficients(self.prediction, alpha, sigma, self.sigma_data)))
        if self.time is not None:
            c_noise = float(self.time(t))
        elif self.prediction == "edm":
            if alpha == 0.0 or sigma == 0.0:
                raise FastdiffError(f'prediction="edm" is told log(sigma/alpha)/4, which is infinite at t = {t:g}: give time=')
            c_noise = math.log(sigma / alpha) / 4
        else:
            c_noise = float(t)
        self.levels[t] = c, c_noise
        return c, c_noise

    def _at_tensor(self, x: Tensor, t: Tensor) -> tuple[Coefficients, Tensor]:
        # alpha and sigma keep float64: near sigma = 0 and alpha = 0 float32 times lose the level's digits
        t64 = t.double()
        alpha, sigma = self.schedule.alpha(t64), self.schedule.sigma(t64)
        ones = (1,) * (x.ndim - 1)
        c = coefficients(self.prediction, alpha, sigma, self.sigma_data)
        c = Coefficients(*(v.to(x).view(-1, *ones) if isinstance(v, Tensor) else v for v in c))
        c_noise = self.time(t64) if self.time is not None else t64
        if self.time is None and self.prediction == "edm":
            c_noise = torch.log(sigma / alpha) / 4
        return c, c_noise.float().to(x.device)

    @property
    def sigma_data(self) -> float:
        return float(getattr(self.schedule, "sigma_data", 0.5))

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the network's parameters; None for a callable without any, which gets the state's dtype."""
        cached = self.__dict__.get("_dtype", False)  # functools.cached_property takes a lock, which no compiler enters
        if cached is False:
            parameters = self.network.parameters() if isinstance(self.network, torch.nn.Module) else iter(())
            cached = next((p.dtype for p in parameters if p.is_floating_point()), None)
            self._dtype: torch.dtype | None = cached
        return cached

    @property
    def device(self) -> torch.device:
        parameters = self.network.parameters() if isinstance(self.network, torch.nn.Module) else iter(())
        return next((p.device for p in parameters), torch.device("cpu"))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Denoiser:
        """Moves and casts network and decoder, in place as `nn.Module.to`; returns this denoiser."""
        for part in (self.network, self.decoder):
            if isinstance(part, torch.nn.Module):
                part.to(device=device, dtype=dtype)
        self.__dict__.pop("_dtype", None)
        return self

    def compiled(self) -> Denoiser:
        """A copy whose network runs through `torch.compile`: faster calls, after half a minute or more for each new shape.

        Raises:
            FastdiffError: the network is no torch module.
        """
        if not isinstance(self.network, torch.nn.Module):
            raise FastdiffError(f"only a torch module can be compiled; this network is a {type(self.network).__name__}")
        other = copy.copy(self)
        other.network = torch.compile(self.network)
        return other

    def images(self, x: Tensor) -> Tensor:
        """Samples, decoded where they are latents, from the data's own range to images in [0, 1], float32, clipped."""
        low, high = self.data_range
        if self.decoder is not None:
            x = self.decoder(x)
        return ((x.float() - low) / (high - low)).clamp(0, 1)


def rows_of(condition: Any, index: Tensor, count: int) -> Any:
    """Some samples' part of a condition, a tensor or a mapping of them: rows of what has one for each of `count` samples."""
    if isinstance(condition, Mapping):
        return {name: rows_of(part, index, count) for name, part in condition.items()}
    rows = isinstance(condition, Tensor) and condition.ndim and len(condition) == count
    return condition[index.to(condition.device)] if rows else condition


def told(x: Tensor, level: Level) -> Tensor:
    """What the network is told of the time, (B,) float32: the same for every sample of x."""
    if isinstance(level, float):
        return x.new_full((x.shape[0],), level, dtype=torch.float32)
    return level.float().repeat(x.shape[0])


def first_tensor(out: Any) -> Tensor:
    """The prediction in what common networks return: a tensor, a tuple's or list's first, a dict's or object's "sample"."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, dict):
        out = out.get("sample", next(iter(out.values()), None))
    elif isinstance(out, tuple | list):
        out = out[0] if out else None
    else:
        out = getattr(out, "sample", None)
    if not isinstance(out, Tensor):
        raise FastdiffError("the network returned no tensor that can be told apart: pass output= to pick it")
    return out
