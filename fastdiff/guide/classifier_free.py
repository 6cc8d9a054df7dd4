"""Two predictions, one of them scaled away from: classifier-free guidance and what is built on it."""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser, Folded, Network
from ..errors import FastdiffError

EVERYWHERE = (0.0, math.inf)


class Guided(Denoiser):
    """A denoiser that combines the predictions of a conditional and a negative one: D_n + scale (D_c - D_n).

    `projection` is (eta, norm) of `guide.apg`. `batched` makes both predictions by one call of the network on a doubled batch;
    None does so on a GPU, as long as memory allows.
    """

    def __init__(
        self, positive: Denoiser, negative: Denoiser, scale: float, interval: tuple[float, float] = EVERYWHERE,
        rescale: float = 0.0, projection: tuple[float, float] | None = None, batched: bool | None = None,
    ) -> None:  # fmt: skip
        self.__dict__.update(copy.copy(positive).__dict__)
        self.positive, self.negative = positive, negative
        self.scale, self.interval, self.rescale = scale, interval, rescale
        self.projection, self.batched = projection, batched
        self.plan = None  # a plan tuned without guidance says nothing about this denoiser
        self.acting: dict[float, bool] = {}  # of every float time asked for

    @property
    def guidance(self) -> float | None:
        plain = self.interval == EVERYWHERE and not self.rescale and self.projection is None
        return self.scale if plain and self.positive.network is self.negative.network else None

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Network calls an evaluation costs where guidance acts."""
        return self.positive.calls * (self.scale != 0.0) + self.negative.calls * (self.scale != 1.0)

    def calls_at(self, t: float) -> int:
        """Network calls of an evaluation at time t."""
        return self.calls if self._acts(t) else self.positive.calls_at(t)

    def bind(self, **cond: Any) -> Denoiser:
        mine, others = self.positive.cond, self.negative.cond
        if contrast := [k for k in cond if mine.get(k) is not others.get(k)]:
            raise FastdiffError(f"guidance contrasts {', '.join(contrast)}: bind it before guide.cfg, or give it to cfg")
        return self._with(self.positive.bind(**cond), self.negative.bind(**cond))

    def bound(self) -> Iterator[tuple[str, Any]]:
        yield from self.positive.bound()
        yield from self.negative.bound()

    def subset(self, index: Tensor, batch: int) -> Denoiser:
        return self._with(self.positive.subset(index, batch), self.negative.subset(index, batch))

    def _with(self, positive: Denoiser, negative: Denoiser) -> Guided:
        same = copy.copy(self)
        same.positive, same.negative, same.cond = positive, negative, positive.cond
        return same

    @property
    def leaves(self) -> tuple[Denoiser, ...]:
        return (*self.positive.leaves, *self.negative.leaves)

    def choices(self, t: float) -> tuple[Any, ...]:
        return (self._acts(t), *self.positive.choices(t), *self.negative.choices(t))

    def _acts(self, t: float) -> bool:
        if self.interval == EVERYWHERE:
            return True
        t = float(t)
        if t not in self.acting:
            self.acting[t] = self._inside(t)
        return self.acting[t]

    def _inside(self, t: float) -> bool:
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        low, high = self.interval
        return low * alpha < sigma <= high * alpha if math.isfinite(high) else low * alpha < sigma

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        if isinstance(t, Tensor):
            return self._guided_batch(x, t)
        if (only := self._only(t)) is not None:
            return only(x, t)
        return self._combine(x, *self._both(x, t), self.scale)

    def with_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The guided prediction, and the conditional network's variance output (as diffusers' DiT pipeline takes it)."""
        if self.scale == 0.0 and self._acts(t):
            return self.negative.with_variance(x, t)
        d, v = self.positive.with_variance(x, t)
        if self.scale == 1.0 or not self._acts(t):
            return d, v
        return self._combine(x, d, self.negative(x, t), self.scale), v

    def folded(self, t: float) -> Folded | None:
        """Both predictions' arithmetic and guidance in one; None where guidance is more than a scale."""
        if type(self).__call__ is not Guided.__call__:
            return None
        if (only := self._only(t)) is not None:
            return only.folded(t)
        p, n, s = self.positive.folded(t), self.negative.folded(t), self.scale
        if self.rescale or self.projection is not None or p is None or n is None or len(p.weights) + len(n.weights) > 2:
            return None
        return Folded(s * p.skip + (1 - s) * n.skip, (s * p.weights[0], (1 - s) * n.weights[0]))

    def outputs(self, x: Tensor, t: float) -> tuple[Tensor, ...]:
        if (only := self._only(t)) is not None:
            return only.outputs(x, t)
        return self._both(x, t, lambda denoiser, x, t: denoiser.outputs(x, t)[0])

    def _only(self, t: float) -> Denoiser | None:
        """The one denoiser that is called at time t, or None where both are."""
        if self.scale == 1.0 or not self._acts(t):
            return self.positive
        return self.negative if self.scale == 0.0 else None

    def _both(self, x: Tensor, t: Any, ask: Callable[..., Tensor] = operator.call) -> tuple[Tensor, Tensor]:
        """The two predictions: by one call on a doubled batch where asked for and possible, else by two."""
        joint = joined(self.positive, self.negative, len(x)) if self.batched or (self.batched is None and x.is_cuda) else None
        if joint is not None:
            try:
                d, n = ask(joint, torch.cat([x, x]), torch.cat([t, t]) if isinstance(t, Tensor) else t).chunk(2)
                return d, n
            except torch.OutOfMemoryError:
                self.batched = False  # from here on by two calls
        return ask(self.positive, x, t), ask(self.negative, x, t)

    def _combine(self, x: Tensor, d: Tensor, n: Tensor, scale: float) -> Tensor:
        if self.projection is not None:
            return d + (scale - 1) * projected(d, n, *self.projection)
        guided = torch.lerp(n, d, scale)
        if self.rescale:
            # Lin et al. 2023, eq. 15-16: towards the conditional prediction's own standard deviation
            dims = tuple(range(1, x.ndim))
            ratio = d.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
            guided = guided * (1 + self.rescale * (ratio - 1))
        return guided

    def _guided_batch(self, x: Tensor, t: Tensor) -> Tensor:
        """Times that differ between samples: guided where each sample's own level lies inside the interval."""
        everywhere = self.interval == EVERYWHERE
        if self.scale == 1.0:
            return self.positive(x, t)
        if self.scale == 0.0 and everywhere:
            return self.negative(x, t)
        d, n = self._both(x, t)
        guided = self._combine(x, d, n, self.scale)
        if everywhere:
            return guided
        u = self.schedule.sigma(t.double()) / self.schedule.alpha(t.double())
        inside = ((u > self.interval[0]) & (u <= self.interval[1])).view(-1, *(1,) * (x.ndim - 1))
        return torch.where(inside, guided, d)


def joined(positive: Denoiser, negative: Denoiser, batch: int) -> Denoiser | None:
    """One denoiser for both on a doubled batch, or None where they are not one network under conditions of the same shapes."""
    same = type(positive) is Denoiser and type(negative) is Denoiser and positive.network is negative.network
    if not same or set(positive.cond) != set(negative.cond):
        return None
    cond = {}
    for name, a in positive.cond.items():
        b = negative.cond[name]
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim and a.shape == b.shape and len(a) == batch:
            cond[name] = torch.cat([a, b])
        elif a is b and not isinstance(a, Tensor):
            cond[name] = a
        else:
            return None
    return positive.bind(**cond)


def projected(d: Tensor, n: Tensor, eta: float, norm: float) -> Tensor:
    """d - n, at most `norm` long in each sample, its part along d times eta (Sadat et al. 2024, APG, eq. 5 to 8)."""
    dims = tuple(range(1, d.ndim))
    change = d - n
    if norm > 0:
        change = change * (norm / change.square().sum(dims, keepdim=True).sqrt()).clamp(max=1.0)
    along = (change * d).sum(dims, keepdim=True) / d.square().sum(dims, keepdim=True).clamp_min(1e-12) * d
    return change + (eta - 1) * along


def cfg(
    denoiser: Denoiser, scale: float | None = None, cond: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None, interval: tuple[float, float] = EVERYWHERE, rescale: float = 0.0, *,
    w: float | None = None, batched: bool | None = None,
) -> Denoiser:  # fmt: skip
    """Classifier-free guidance (Ho and Salimans 2022): D_negative + scale (D_cond - D_negative).

    Args:
        scale: 1 is no guidance, 0 the negative condition alone. `w` is the paper's convention, scale - 1; give one of the two.
            A student that takes the scale as an input (Meng et al. 2023) gets it bound: one call, and its plan stays.
        cond, negative: conditioning bound to the two evaluations; a class-conditional network of our own needs no
            `negative`: its null class is used.
        interval: sigma/alpha range (low, high] where guidance acts; elsewhere one call (Kynkäänniemi et al. 2024).
        rescale: 0 to 1, how far the guided prediction is scaled back (Lin et al. 2023, section 3.4).
        batched: True: one network call for both, False: two; None: one on a GPU while its memory allows.

    Raises:
        FastdiffError: no negative condition where the network has no null class; conditions of different batch sizes; scale or
            rescale not finite or negative.
    """
    if (scale is None) == (w is None):
        raise FastdiffError("guidance needs scale= (1 is none) or w= (0 is none), one of the two")
    scale = check_guidance(scale if scale is not None else 1.0 + float(w or 0.0), interval, rescale)
    learned = denoiser.info.get("training", {}).get("distilled", {}).get("guidance", 1.0) if denoiser.info else 1.0
    if learned != 1.0:
        raise FastdiffError(f"this student learned its teacher's guidance at scale {learned:g}, and needs none: leave it out")
    if getattr(denoiser.network, "guidance_range", None) is not None:
        plain = negative is None and interval == EVERYWHERE and not rescale
        return _as_input(denoiser.bind(**(cond or {})), scale, plain)
    positive, other = conditions(denoiser, cond, negative)
    return Guided(positive, other, scale, interval, float(rescale), batched=batched)


def _as_input(denoiser: Denoiser, scale: float, plain: bool) -> Denoiser:
    low, high = denoiser.network.guidance_range  # type: ignore[attr-defined]
    if not plain:
        raise FastdiffError("a student of guidance takes its scale as an input: no negative=, interval= or rescale=")
    if not low <= scale <= high:
        raise FastdiffError(f"this student knows guidance scales {low:g} to {high:g}; given {scale:g}")
    return denoiser.bind(guidance=scale)


def apg(
    denoiser: Denoiser, scale: float, cond: Mapping[str, Any] | None = None, negative: Mapping[str, Any] | None = None,
    interval: tuple[float, float] = EVERYWHERE, *, eta: float = 0.0, norm: float = 0.0, batched: bool | None = None,
) -> Guided:  # fmt: skip
    """Adaptive projected guidance without momentum (Sadat et al. 2024): the part of D_cond - D_negative along D_cond, which
    saturates colours, is weighted by eta; `norm` bounds the difference's length in each sample (0: not at all).

    eta = 1 and norm = 0 is `cfg`. Other arguments and errors as there.
    """
    scale = check_guidance(scale, interval, 0.0)
    if not (math.isfinite(eta) and math.isfinite(norm) and norm >= 0):
        raise FastdiffError(f"apg needs a finite eta and norm >= 0; given {eta}, {norm}")
    positive, other = conditions(denoiser, cond, negative)
    return Guided(positive, other, scale, interval, projection=(float(eta), float(norm)), batched=batched)


def check_guidance(scale: float, interval: tuple[float, float], rescale: float) -> float:
    if not (math.isfinite(scale) and scale >= 0 and 0 <= rescale <= 1 and interval[0] < interval[1]):
        given = f"{scale}, {rescale}, {interval}"
        raise FastdiffError(f"guidance needs scale >= 0, rescale in [0, 1] and a rising interval; given {given}")
    return float(scale)


def check_taken(network: Network, names: set[str]) -> None:
    """Whether a network takes the conditions, as far as its signature tells.

    Raises:
        FastdiffError: an unconditional network, or one of other conditions.
    """
    call = network.forward if isinstance(network, torch.nn.Module) else network
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # a builtin tells nothing
        return
    if names and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        takes = [p.name for p in parameters][2:]
        if wrong := sorted(names - set(takes)):
            none = "none (guide.autoguidance, guide.pag and guide.loss need none)"
            raise FastdiffError(f"this network takes no condition {', '.join(wrong)}; it takes {', '.join(takes) or none}")


def conditions(
    denoiser: Denoiser, cond: Mapping[str, Any] | None, negative: Mapping[str, Any] | None
) -> tuple[Denoiser, Denoiser]:
    """The denoiser under the condition and under the negative one, by default our own networks' null class."""
    positive = denoiser.bind(**(cond or {}))
    if negative is None:
        null = getattr(denoiser.network, "null_label", None)
        labels = positive.cond.get("class_labels")
        if null is None or labels is None:
            why = "this network has no null class" if null is None else "no class_labels are bound"
            raise FastdiffError(f"guidance needs negative={{...}}, the condition to guide away from: {why}")
        negative = {"class_labels": torch.full_like(labels, null)}
    check_taken(denoiser.network, {*positive.cond, *negative})
    for name, value in negative.items():
        other = positive.cond.get(name)
        if not (isinstance(value, Tensor) and isinstance(other, Tensor) and value.ndim and other.ndim):
            continue
        if len(value) not in (1, len(other)) and len(other) != 1:  # one for all is what text pipelines' networks take
            raise FastdiffError(f"{name}: {len(value)} negative conditions for {len(other)} conditions; give one, or one each")
    return positive, denoiser.bind(**negative)
