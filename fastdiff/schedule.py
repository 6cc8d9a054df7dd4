"""Noise schedules: the levels (alpha, sigma) of x = alpha*x0 + sigma*eps as functions of a time t that grows with the noise.

Every formula is written once for numpy (float64 on the host, where grids and plans are made) and torch (a batch of times,
where training and adaptive steps need it): both namespaces share the few functions used here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch

from .errors import FastdiffError

Time = Any  # float, numpy array or torch tensor; the result is of the same kind


def namespace(t: Time) -> Any:
    """torch for a tensor, numpy for everything else."""
    return torch if isinstance(t, torch.Tensor) else np


@dataclass(frozen=True)
class NoiseSchedule:
    """Base of all schedules. A family gives `alpha`, `sigma` and its domain [t_min, t_max]; lam = log(alpha/sigma) falls in t.

    The fields of the dataclass are the schedule's parameters, so `config()` and `from_config` need no code per family.
    """

    name: ClassVar[str] = ""
    rule: ClassVar[str] = ""  # what the parameters must satisfy, in words

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if not (all(isinstance(v, Real) and math.isfinite(v) for v in given.values()) and self._valid()):
            raise FastdiffError(
                f"schedule {self.name} needs {self.rule}, all finite; given {', '.join(f'{k} = {v}' for k, v in given.items())}"
            )

    def _valid(self) -> bool:
        return True

    def alpha(self, t: Time) -> Time:
        raise TypeError(f"{type(self).__name__} defines no alpha")

    def sigma(self, t: Time) -> Time:
        raise TypeError(f"{type(self).__name__} defines no sigma")

    @property
    def t_min(self) -> float:
        """The least noisy time that the model was trained at: the last node of a grid."""
        return 0.0

    @property
    def t_max(self) -> float:
        """The noisiest time: where sampling starts."""
        return 1.0

    def lam(self, t: Time) -> Time:
        """Half the log signal-to-noise ratio, log(alpha/sigma); -inf at alpha = 0, inf at sigma = 0."""
        xp = namespace(t)
        with np.errstate(divide="ignore"):
            return xp.log(self.alpha(t)) - xp.log(self.sigma(t))

    def t_of_lam(self, lam: Time) -> Time:
        """The time at which log(alpha/sigma) = lam, within [t_min, t_max] (bisection to float64 rounding)."""
        xp = namespace(lam)
        lam = lam.double() if xp is torch else np.asarray(lam, np.float64)
        lo, hi = xp.full_like(lam, self.t_min), xp.full_like(lam, self.t_max)
        for _ in range(64):
            mid = (lo + hi) / 2
            noisier = self.lam(mid) < lam  # lam falls in t: too noisy means the time sought lies below
            lo, hi = xp.where(noisier, lo, mid), xp.where(noisier, mid, hi)
        t = (lo + hi) / 2
        return float(t) if xp is np and t.ndim == 0 else t

    def time_of_uniform(self, u: Time) -> Time:
        """The time of a fraction u in [0, 1] of the way to full noise: what `uniform_t` grids and training draws use."""
        return self.t_max * u

    def shifted(self, shift: float) -> NoiseSchedule:
        """sigma/alpha multiplied by `shift` at every time, for higher resolutions (Hoogeboom et al. 2023, eq. 9)."""
        return Shifted(self.config(), float(shift))

    def zero_terminal_snr(self) -> NoiseSchedule:
        """alpha shifted and scaled to reach exactly 0 at t_max (Lin et al. 2023, algorithm 1)."""
        return ZeroTerminalSNR(self.config())

    def config(self) -> dict[str, Any]:
        """A JSON-able description; `from_config` gives an equal schedule."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}

    def __hash__(self) -> int:
        return hash(repr(self))


def _vp_alpha(log_alpha: Time) -> Time:
    return namespace(log_alpha).exp(log_alpha)


def _vp_sigma(log_alpha: Time) -> Time:
    xp = namespace(log_alpha)
    return xp.sqrt(-xp.expm1(2 * log_alpha))  # sqrt(1 - alpha^2) without the cancellation at small t


@dataclass(frozen=True)
class _VP(NoiseSchedule):
    """Variance preserving, alpha^2 + sigma^2 = 1, given by log alpha(t)."""

    def log_alpha(self, t: Time) -> Time:
        raise TypeError(f"{type(self).__name__} defines no log_alpha")

    def alpha(self, t: Time) -> Time:
        return _vp_alpha(self.log_alpha(t))

    def sigma(self, t: Time) -> Time:
        return _vp_sigma(self.log_alpha(t))

    @property
    def t_min(self) -> float:
        return 1e-3  # Song et al. 2021, appendix C: the VP score is not trained below


@dataclass(frozen=True)
class VPLinear(_VP):
    """beta(t) = beta_min + t (beta_max - beta_min) (Ho et al. 2020 in the continuous time of Song et al. 2021, eq. 33)."""

    name: ClassVar[str] = "vp_linear"
    rule: ClassVar[str] = "0 <= beta_min <= beta_max and beta_max > 0"
    beta_min: float = 0.1
    beta_max: float = 20.0

    def _valid(self) -> bool:
        return 0 <= self.beta_min <= self.beta_max and self.beta_max > 0

    def log_alpha(self, t: Time) -> Time:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def t_of_lam(self, lam: Time) -> Time:
        xp = namespace(lam)
        fall = 0.5 * xp.log1p(xp.exp(-2 * lam))  # -log alpha, a quadratic in t
        return 2 * fall / (0.5 * self.beta_min + xp.sqrt(0.25 * self.beta_min**2 + (self.beta_max - self.beta_min) * fall))


@dataclass(frozen=True)
class VPScaledLinear(_VP):
    """sqrt(beta) linear in t, as in latent diffusion (Rombach et al. 2022); the betas of 1,000 steps times 1,000."""

    name: ClassVar[str] = "vp_scaled_linear"
    rule: ClassVar[str] = "0 <= beta_min <= beta_max and beta_max > 0"
    beta_min: float = 0.85
    beta_max: float = 12.0

    def _valid(self) -> bool:
        return 0 <= self.beta_min <= self.beta_max and self.beta_max > 0

    def log_alpha(self, t: Time) -> Time:
        b0, slope = math.sqrt(self.beta_min), math.sqrt(self.beta_max) - math.sqrt(self.beta_min)
        return -0.5 * (b0 * b0 * t + b0 * slope * t**2 + slope * slope * t**3 / 3)


@dataclass(frozen=True)
class VPCosine(NoiseSchedule):
    """alpha = cos(pi/2 (t+s)/(1+s)) / cos(pi/2 s/(1+s)) (Nichol and Dhariwal 2021, eq. 17), log-SNR cut to a finite range.

    The cut moves only the ends t_min and t_max: with logsnr_min = -10, sigma/alpha is 148 at t_max, enough for images in
    [-1, 1], where alpha -> 0 itself would multiply an eps-network's error without bound.
    """

    name: ClassVar[str] = "vp_cosine"
    rule: ClassVar[str] = "s >= 0 and -60 <= logsnr_min < logsnr_max <= 20"
    s: float = 0.008
    logsnr_min: float = -10.0
    logsnr_max: float = 12.0

    def _valid(self) -> bool:  # beyond the range float64 cannot tell the times from 0 and 1
        return self.s >= 0 and -60 <= self.logsnr_min < self.logsnr_max <= 20

    def alpha(self, t: Time) -> Time:
        return namespace(t).cos(self._angle(t)) / math.cos(self._angle(0.0))

    def sigma(self, t: Time) -> Time:
        # 1 - cos^2 a / cos^2 a0 = sin(a - a0) sin(a + a0) / cos^2 a0: no cancellation at t = 0
        xp, a, a0 = namespace(t), self._angle(t), self._angle(0.0)
        return xp.sqrt(xp.sin(a - a0) * xp.sin(a + a0)) / math.cos(a0)

    def _angle(self, t: Time) -> Time:
        return (t + self.s) * (math.pi / 2 / (1 + self.s))

    def t_of_lam(self, lam: Time) -> Time:
        xp = namespace(lam)
        lam = lam.double() if xp is torch else np.asarray(lam, np.float64)
        alpha = 1 / xp.sqrt(1 + xp.exp(-2 * lam))
        t = xp.arccos(alpha * math.cos(self._angle(0.0))) * ((1 + self.s) * 2 / math.pi) - self.s
        return float(t) if xp is np and t.ndim == 0 else t

    @property
    def t_min(self) -> float:
        return float(self.t_of_lam(self.logsnr_max / 2))

    @property
    def t_max(self) -> float:
        return float(self.t_of_lam(self.logsnr_min / 2))


@dataclass(frozen=True)
class VPSigmoid(_VP):
    """alpha^2 falls along a sigmoid between `start` and `end` (Jabri et al. 2022, algorithm 3)."""

    name: ClassVar[str] = "vp_sigmoid"
    rule: ClassVar[str] = "start < end and tau > 0"
    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def _valid(self) -> bool:
        return self.start < self.end and self.tau > 0

    def log_alpha(self, t: Time) -> Time:
        xp = namespace(t)
        v0, v1 = 1 / (1 + math.exp(-self.start / self.tau)), 1 / (1 + math.exp(-self.end / self.tau))
        v = 1 / (1 + xp.exp(-(t * (self.end - self.start) + self.start) / self.tau))
        return 0.5 * xp.log((v1 - v) / (v1 - v0))

    @property
    def t_max(self) -> float:
        return 0.999  # alpha is 0 at t = 1; sigma/alpha is 66 here, with the default parameters


@dataclass(frozen=True)
class SubVP(NoiseSchedule):
    """alpha of vp_linear, sigma = 1 - alpha^2 (Song et al. 2021, eq. 29)."""

    name: ClassVar[str] = "sub_vp"
    rule: ClassVar[str] = VPLinear.rule
    beta_min: float = 0.1
    beta_max: float = 20.0

    _valid = VPLinear._valid

    def alpha(self, t: Time) -> Time:
        return _vp_alpha(VPLinear(self.beta_min, self.beta_max).log_alpha(t))

    def sigma(self, t: Time) -> Time:
        return -namespace(t).expm1(2 * VPLinear(self.beta_min, self.beta_max).log_alpha(t))

    @property
    def t_min(self) -> float:
        return 1e-3


@dataclass(frozen=True)
class VPFromAlphasCumprod(NoiseSchedule):
    """A discrete-time model's table of alpha^2; t in 0..T-1, log-SNR interpolated linearly between the integer times.

    With zero terminal SNR alpha itself is interpolated over the last interval, where the log-SNR is infinite.
    """

    name: ClassVar[str] = "vp_from_alphas_cumprod"
    alphas_cumprod: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        a = np.asarray(self.alphas_cumprod, np.float64)
        if a.ndim != 1 or len(a) < 2 or not (np.all(np.diff(a) < 0) and a[-1] >= 0 and a[0] < 1):
            raise FastdiffError(
                "alphas_cumprod must be a falling list of at least 2 numbers in [0, 1) that starts below 1; "
                f"given {len(np.atleast_1d(a))} numbers from {a.flat[0] if a.size else None} to {a.flat[-1] if a.size else None}"
            )
        object.__setattr__(self, "_a", a)

    def alpha(self, t: Time) -> Time:
        return self._levels(t)[0]

    def sigma(self, t: Time) -> Time:
        return self._levels(t)[1]

    def _levels(self, t: Time) -> tuple[Time, Time]:
        xp = namespace(t)
        a: Any = self._a  # type: ignore[attr-defined]
        if xp is torch:
            a = torch.as_tensor(a, device=t.device)
        t = t.double() if xp is torch else np.asarray(t, np.float64)
        i = xp.clip(xp.floor(t), 0, len(a) - 2)
        f, i = t - i, (i.long() if xp is torch else i.astype(np.int64))
        with np.errstate(divide="ignore", invalid="ignore"):
            logit0, logit1 = xp.log(a[i] / (1 - a[i])), xp.log(a[i + 1] / (1 - a[i + 1]))
            logit = (1 - f) * logit0 + f * logit1
            signal, noise = 1 / (1 + xp.exp(-logit)), 1 / (1 + xp.exp(logit))  # each without cancellation
        last = (1 - f) ** 2 * a[i]  # zero terminal SNR, last interval
        signal, noise = xp.where(a[i + 1] > 0, signal, last), xp.where(a[i + 1] > 0, noise, 1 - last)
        for at, j in ((f == 0, i), (f == 1, i + 1)):
            signal, noise = xp.where(at, a[j], signal), xp.where(at, 1 - a[j], noise)
        return xp.sqrt(signal), xp.sqrt(noise)

    @property
    def discrete_count(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def t_max(self) -> float:
        return float(len(self.alphas_cumprod) - 1)

    def zero_terminal_snr(self) -> VPFromAlphasCumprod:
        a = np.sqrt(np.asarray(self.alphas_cumprod, np.float64))
        return VPFromAlphasCumprod(tuple(((a - a[-1]) * (a[0] / (a[0] - a[-1]))) ** 2))


@dataclass(frozen=True)
class VE(NoiseSchedule):
    """Variance exploding: x = x0 + sigma*eps, and the time is sigma itself (Song and Ermon 2019; Karras et al. 2022)."""

    name: ClassVar[str] = "ve"
    rule: ClassVar[str] = "0 < sigma_min < sigma_max"
    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def _valid(self) -> bool:
        return 0 < self.sigma_min < self.sigma_max

    def alpha(self, t: Time) -> Time:
        return namespace(t).ones_like(t) if isinstance(t, torch.Tensor | np.ndarray) else 1.0

    def sigma(self, t: Time) -> Time:
        return t

    def t_of_lam(self, lam: Time) -> Time:
        return namespace(lam).exp(-lam)

    def time_of_uniform(self, u: Time) -> Time:
        return self.sigma_min ** (1 - u) * self.sigma_max**u  # the VE-SDE's own time is geometric in sigma

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max


@dataclass(frozen=True)
class EDM(VE):
    """The VE levels with the range and data scale of Karras et al. 2022, table 1; `sigma_data` feeds prediction="edm"."""

    name: ClassVar[str] = "edm"
    rule: ClassVar[str] = "0 < sigma_min < sigma_max and sigma_data > 0"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def _valid(self) -> bool:
        return 0 < self.sigma_min < self.sigma_max and self.sigma_data > 0


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    """Rectified flow, x = (1-t) x0 + t eps (Liu et al. 2022; Lipman et al. 2022).

    `shift` leaves the levels as they are and moves uniform times towards the noise, t = shift u / (1 + (shift-1) u)
    (Esser et al. 2024, eq. 23): the network of a shifted model is still asked at t = sigma.
    """

    name: ClassVar[str] = "flow"
    rule: ClassVar[str] = "shift > 0"
    shift: float = 1.0

    def _valid(self) -> bool:
        return self.shift > 0

    def alpha(self, t: Time) -> Time:
        return 1.0 - t

    def sigma(self, t: Time) -> Time:
        return t

    def t_of_lam(self, lam: Time) -> Time:
        return 1 / (1 + namespace(lam).exp(lam))

    def time_of_uniform(self, u: Time) -> Time:
        return self.shift * u / (1 - u + self.shift * u)  # 1 at u = 1, to the bit

    @property
    def t_min(self) -> float:
        return 1e-3


@dataclass(frozen=True)
class TrigFlow(NoiseSchedule):
    """x = cos(t) x0 + sin(t) eps, t in [0, pi/2] (Lu and Song 2024), for data scaled to unit standard deviation."""

    name: ClassVar[str] = "trigflow"

    def alpha(self, t: Time) -> Time:
        return namespace(t).cos(t)

    def sigma(self, t: Time) -> Time:
        return namespace(t).sin(t)

    @property
    def t_min(self) -> float:
        return 1e-3

    @property
    def t_max(self) -> float:
        return math.atan(200.0)  # sigma/alpha = 200; pi/2 itself has no finite log-SNR


@dataclass(frozen=True)
class Shifted(NoiseSchedule):
    """Another schedule with sigma/alpha times `shift`, on the same circle or line (VP stays VP, flow stays flow)."""

    name: ClassVar[str] = "shifted"
    base: Any = None
    shift: float = 1.0

    __hash__ = NoiseSchedule.__hash__  # `base` is a dict

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise FastdiffError(f"shift must be positive and finite; given {self.shift}")
        object.__setattr__(self, "_base", from_config(self.base))

    def _levels(self, t: Time) -> tuple[Time, Time]:
        base: NoiseSchedule = self._base  # type: ignore[attr-defined]
        alpha, sigma = base.alpha(t), base.sigma(t)
        if base.name == "flow":
            scale = 1 / (alpha + self.shift * sigma)
        elif base.name in ("ve", "edm"):
            scale = 1.0
        else:
            xp = namespace(t)
            scale = xp.sqrt((alpha**2 + sigma**2) / (alpha**2 + (self.shift * sigma) ** 2))
        return alpha * scale, self.shift * sigma * scale

    def alpha(self, t: Time) -> Time:
        return self._levels(t)[0]

    def sigma(self, t: Time) -> Time:
        return self._levels(t)[1]

    def time_of_uniform(self, u: Time) -> Time:
        return self._base.time_of_uniform(u)  # type: ignore[attr-defined]

    @property
    def sigma_data(self) -> float:
        return getattr(self._base, "sigma_data", 0.5)  # type: ignore[attr-defined]

    @property
    def t_min(self) -> float:
        return self._base.t_min  # type: ignore[attr-defined]

    @property
    def t_max(self) -> float:
        return self._base.t_max  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ZeroTerminalSNR(NoiseSchedule):
    """A variance-preserving schedule whose alpha is shifted and scaled to 0 at t_max and keeps its value at t_min."""

    name: ClassVar[str] = "zero_terminal_snr"
    base: Any = None

    __hash__ = NoiseSchedule.__hash__  # `base` is a dict

    def __post_init__(self) -> None:
        base = from_config(self.base)
        t = np.linspace(base.t_min, base.t_max, 5)
        if not np.allclose(base.alpha(t) ** 2 + base.sigma(t) ** 2, 1, rtol=0, atol=1e-9):
            raise FastdiffError(f"zero_terminal_snr needs a variance-preserving schedule; given {base.name}")
        object.__setattr__(self, "_base", base)

    def alpha(self, t: Time) -> Time:
        base: NoiseSchedule = self._base  # type: ignore[attr-defined]
        first, last = float(base.alpha(base.t_min)), float(base.alpha(base.t_max))
        alpha = (base.alpha(t) - last) * (first / (first - last))
        return namespace(t).maximum(alpha, 0 * alpha)  # torch's exp may differ from numpy's in the last bit

    def sigma(self, t: Time) -> Time:
        alpha = self.alpha(t)
        return namespace(t).sqrt((1 - alpha) * (1 + alpha))

    def t_of_lam(self, lam: Time) -> Time:
        base: NoiseSchedule = self._base  # type: ignore[attr-defined]
        xp = namespace(lam)
        first, last = float(base.alpha(base.t_min)), float(base.alpha(base.t_max))
        alpha = last + (1 - last / first) / xp.sqrt(1 + xp.exp(-2 * lam))  # the base's alpha at the time sought
        return base.t_of_lam(xp.log(alpha) - 0.5 * xp.log((1 - alpha) * (1 + alpha)))

    @property
    def t_min(self) -> float:
        return self._base.t_min  # type: ignore[attr-defined]

    @property
    def t_max(self) -> float:
        return self._base.t_max  # type: ignore[attr-defined]


_FAMILIES: dict[str, type[NoiseSchedule]] = {
    c.name: c
    for c in (
        VPLinear, VPScaledLinear, VPCosine, VPSigmoid, VPFromAlphasCumprod, SubVP, VE, EDM, Flow, TrigFlow, Shifted,
        ZeroTerminalSNR,
    )
}  # fmt: skip


def from_config(config: dict[str, Any]) -> NoiseSchedule:
    """The schedule that `config()` described.

    Raises:
        FastdiffError: an unknown name or parameter.
    """
    fields = dict(config)
    family = _FAMILIES.get(str(fields.pop("name", None)))
    if family is None:
        raise FastdiffError(f"unknown noise schedule {config.get('name')!r}; known: {', '.join(sorted(_FAMILIES))}")
    unknown = set(fields) - {f.name for f in dataclasses.fields(family)}
    if unknown:
        raise FastdiffError(f"schedule {family.name} has no parameter {', '.join(sorted(unknown))}")
    return family(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def vp_from_alphas_cumprod(alphas_cumprod: Sequence[float] | torch.Tensor | np.ndarray) -> VPFromAlphasCumprod:
    """The schedule of a discrete-time model from its table of cumulative products of (1 - beta), least noisy first."""
    values = alphas_cumprod.tolist() if isinstance(alphas_cumprod, torch.Tensor | np.ndarray) else alphas_cumprod
    return VPFromAlphasCumprod(tuple(float(a) for a in values))


vp_linear: Callable[..., VPLinear] = VPLinear
vp_scaled_linear: Callable[..., VPScaledLinear] = VPScaledLinear
vp_cosine: Callable[..., VPCosine] = VPCosine
vp_sigmoid: Callable[..., VPSigmoid] = VPSigmoid
sub_vp: Callable[..., SubVP] = SubVP
ve: Callable[..., VE] = VE
edm: Callable[..., EDM] = EDM
flow: Callable[..., Flow] = Flow
trigflow: Callable[..., TrigFlow] = TrigFlow
