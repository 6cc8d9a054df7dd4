"""What every noise schedule is and can do, and the one way from a description to a schedule."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch

from ..errors import FastdiffError

Time = Any  # float, numpy array or torch tensor; the result is of the same kind
FAMILIES: dict[str, type[NoiseSchedule]] = {}  # by name, filled as the families are defined


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

    def __init_subclass__(cls) -> None:
        if cls.name:
            FAMILIES[cls.name] = cls

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
        return from_config({"name": "shifted", "base": self.config(), "shift": float(shift)})

    def zero_terminal_snr(self) -> NoiseSchedule:
        """alpha shifted and scaled to reach exactly 0 at t_max (Lin et al. 2023, algorithm 1)."""
        return from_config({"name": "zero_terminal_snr", "base": self.config()})

    def config(self) -> dict[str, Any]:
        """A JSON-able description; `from_config` gives an equal schedule."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}

    def __hash__(self) -> int:
        return hash(repr(self))


def from_config(config: dict[str, Any]) -> NoiseSchedule:
    """The schedule that `config()` described.

    Raises:
        FastdiffError: an unknown name or parameter.
    """
    fields = dict(config)
    family = FAMILIES.get(str(fields.pop("name", None)))
    if family is None:
        raise FastdiffError(f"unknown noise schedule {config.get('name')!r}; known: {', '.join(sorted(FAMILIES))}")
    unknown = set(fields) - {f.name for f in dataclasses.fields(family)}
    if unknown:
        raise FastdiffError(f"schedule {family.name} has no parameter {', '.join(sorted(unknown))}")
    return family(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
