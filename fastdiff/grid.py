"""Time grids: where a solver evaluates the network. float64, strictly monotone, checked when made.

A grid of n intervals has n evaluation times, noisiest first, and the level where it ends: clean data (`end="zero"`,
alpha = 1, sigma = 0) or the model's least noisy trained level (`end="sigma_min"`).
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import FastdiffError
from .schedule import NoiseSchedule, VPFromAlphasCumprod

Array = np.ndarray
LAM_START = -5.0  # where log-SNR grids begin when alpha(t_max) = 0 leaves them no finite start: sigma/alpha = 148


@dataclass(frozen=True)
class Node:
    """A level: its time and (alpha, sigma). The time of an end at sigma = 0 is never asked of the network."""

    t: float
    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        """log(alpha/sigma)."""
        if self.alpha == 0.0:
            return -math.inf
        return math.inf if self.sigma == 0.0 else math.log(self.alpha) - math.log(self.sigma)

    @property
    def u(self) -> float:
        """sigma/alpha, the noise level of the variance-exploding form; infinite at alpha = 0."""
        return math.inf if self.alpha == 0.0 else self.sigma / self.alpha


@dataclass(frozen=True)
class Grid:
    """The nodes of a run, noisiest first; the last is the end and is not evaluated."""

    nodes: tuple[Node, ...]
    name: str = "explicit"

    def __post_init__(self) -> None:
        if len(self.nodes) < 2:
            raise FastdiffError("a grid needs at least one interval")
        for node in self.nodes:
            if not (0 <= node.alpha < math.inf and 0 <= node.sigma < math.inf and node.alpha + node.sigma > 0):
                raise FastdiffError(
                    f"time {node.t:g} has no level: alpha = {node.alpha:g}, sigma = {node.sigma:g}; give times of the schedule"
                )
        for i, (a, b) in enumerate(zip(self.nodes, self.nodes[1:], strict=False)):
            if not b.lam > a.lam:
                raise FastdiffError(
                    f"a grid must run strictly from noise to data; at node {i} time {a.t:g} (sigma {a.sigma:.6g}) is followed "
                    f"by time {b.t:g} (sigma {b.sigma:.6g})"
                )

    @property
    def steps(self) -> int:
        """Number of intervals."""
        return len(self.nodes) - 1

    @property
    def ends_clean(self) -> bool:
        return self.nodes[-1].sigma == 0.0


def node_at(schedule: NoiseSchedule, t: float) -> Node:
    """The level of a time."""
    return Node(float(t), float(schedule.alpha(t)), float(schedule.sigma(t)))


def node_at_lam(schedule: NoiseSchedule, lam: float) -> Node:
    """The level of a log-SNR, on the schedule."""
    return node_at(schedule, float(schedule.t_of_lam(lam)))


# Each family: (schedule, n, options) -> n times from t_max down to t_min.


def _ratio_times(schedule: NoiseSchedule, sigmas: Array) -> Array:
    """Times of given sigma/alpha; the ends are the schedule's own, so that alpha = 0 can start a log-SNR grid."""
    t = np.asarray(schedule.t_of_lam(-np.log(sigmas)), np.float64)
    t[0] = schedule.t_max
    if len(t) > 1:
        t[-1] = schedule.t_min
    return t


def _ratio_range(schedule: NoiseSchedule) -> tuple[float, float]:
    lam = float(schedule.lam(schedule.t_max))
    lam = lam if math.isfinite(lam) else LAM_START
    return math.exp(-lam), math.exp(-float(schedule.lam(schedule.t_min)))


def _ramp(n: int) -> Array:
    return np.linspace(0, 1, n)


def quadratic(schedule: NoiseSchedule, n: int) -> Array:
    """sqrt(t) uniform (Song et al. 2020, DDIM, appendix D.2)."""
    t = np.linspace(math.sqrt(schedule.t_max), math.sqrt(schedule.t_min), n) ** 2
    t[0], t[-1] = schedule.t_max, schedule.t_min  # to the bit: alpha may be 0 there and nowhere else
    return t


def karras(schedule: NoiseSchedule, n: int, rho: float = 7.0) -> Array:
    """(sigma/alpha)^(1/rho) uniform (Karras et al. 2022, eq. 5)."""
    high, low = _ratio_range(schedule)
    r = _ramp(n)
    return _ratio_times(schedule, ((1 - r) * high ** (1 / rho) + r * low ** (1 / rho)) ** rho)


def polyexponential(schedule: NoiseSchedule, n: int, rho: float = 1.0) -> Array:
    """log(sigma/alpha) falls from its largest to its smallest as (1 - i/(n-1))^rho (k-diffusion)."""
    high, low = _ratio_range(schedule)
    r = (1 - _ramp(n)) ** rho
    return _ratio_times(schedule, np.exp(r * math.log(high) + (1 - r) * math.log(low)))


def uniform_lambda(schedule: NoiseSchedule, n: int) -> Array:
    """log-SNR uniform (Lu et al. 2022, DPM-Solver, section 3.1); also known as the exponential grid."""
    return polyexponential(schedule, n)


def beta(schedule: NoiseSchedule, n: int, a: float = 0.6, b: float = 0.6) -> Array:
    """Uniform times at the quantiles of Beta(a, b): dense at both ends (Lee et al. 2024, Beta Sampling)."""
    return _uniform_times(schedule, np.array([_beta_quantile(p, a, b) for p in 1 - _ramp(n)]))


def ays(schedule: NoiseSchedule, n: int, table: str = "sd15") -> Array:
    """Align Your Steps (Sabour et al. 2024): its published ten-step tables of sigma/alpha, log-linear in between.

    Where a table leaves the model's range, it is cut there.
    """
    if table not in AYS_TABLES:
        raise FastdiffError(f"unknown ays table {table!r}; allowed: {', '.join(AYS_TABLES)}")
    high, low = _ratio_range(schedule)
    knots = np.unique(np.clip(np.log(AYS_TABLES[table]), math.log(low), math.log(high)))[::-1]
    return np.asarray(schedule.t_of_lam(-np.interp(_ramp(n), np.linspace(0, 1, len(knots)), knots)), np.float64)


AYS_TABLES = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def kl_optimal(schedule: NoiseSchedule, n: int) -> Array:
    """atan(sigma/alpha) uniform (Sabour et al. 2024, AYS, section 3.3: KL-optimal for Gaussian data of unit variance)."""
    high, low = _ratio_range(schedule)
    r = _ramp(n)
    return _ratio_times(schedule, np.tan((1 - r) * math.atan(high) + r * math.atan(low)))


def cosine(schedule: NoiseSchedule, n: int) -> Array:
    """sigma/alpha falls as half a cosine of the square root of the step: "cosine" in A1111's webUI_ExtraSchedulers."""
    high, low = _ratio_range(schedule)
    return _ratio_times(schedule, low + (high - low) * (1 - np.cos(np.pi * (1 - np.sqrt(_ramp(n))))) / 2)


def linear_quadratic(schedule: NoiseSchedule, n: int, clean: bool, threshold: float = 0.025) -> Array:
    """Half of the steps fall linearly by `threshold` of the way, the others quadratically to the end, smooth where they meet
    (Mochi 1, and LTX-Video and ComfyUI after it). In the schedule's own time: sigma for flow and VE models."""
    steps = n if clean else n - 1
    linear = steps // 2
    if not linear:
        return np.array([schedule.t_max, schedule.t_min])[:n]
    if not 0.0 < threshold < 1.0:
        raise FastdiffError(f"threshold must lie between 0 and 1; given {threshold}")
    i, rest = np.arange(n), steps - linear
    slope = threshold / linear
    bend = (1 - slope * steps) / rest**2  # from the point where the linear part ends, with its slope, to 1
    t = _down_to_t_min(schedule, schedule.t_max * (1 - slope * i - bend * np.maximum(i - linear, 0) ** 2))
    return t if clean else np.append(t[:-1], schedule.t_min)  # to the bit


def sgm_uniform(schedule: NoiseSchedule, n: int, clean: bool) -> Array:
    """Uniform from t_max towards t_min, which is left out where the end is clean data (Stability's generative-models)."""
    return np.linspace(schedule.t_max, schedule.t_min, n + clean)[:n]


def simple(schedule: NoiseSchedule, n: int, clean: bool) -> Array:
    """Every (T/n)-th entry of a model's table from its noisiest on (ComfyUI); without a table uniform, as trailing."""
    steps = n if clean else n - 1
    table = schedule.discrete_count if isinstance(schedule, VPFromAlphasCumprod) else 0
    i = np.arange(steps)
    t = table - 1 - np.floor(i * (table / steps)) if table else _uniform_times(schedule, 1 - i / steps)
    return t if clean else np.append(t, schedule.t_min)


def _uniform_times(schedule: NoiseSchedule, u: Array) -> Array:
    return _down_to_t_min(schedule, np.asarray(schedule.time_of_uniform(u), np.float64))


def _down_to_t_min(schedule: NoiseSchedule, t: Array) -> Array:
    """Times that pass t_min, stretched to end there; cut off instead, several nodes could coincide."""
    if t[-1] >= schedule.t_min:
        return t
    stretched = schedule.t_min + (t - t[-1]) * ((t[0] - schedule.t_min) / (t[0] - t[-1]))
    stretched[0] = t[0]
    return stretched


def uniform_t(schedule: NoiseSchedule, n: int, clean: bool, spacing: str = "trailing", offset: int = 0) -> Array:
    """Uniform times, by the three conventions of Lin et al. 2023, table 2.

    trailing starts at full noise and leaves out t = 0; linspace holds both ends; leading ends at the least noisy time and
    starts below full noise. For a discrete-time model trailing and leading are its integer times.
    """
    table = schedule.discrete_count if isinstance(schedule, VPFromAlphasCumprod) else 0
    if spacing == "linspace":
        return np.linspace(schedule.t_max, schedule.t_min, n)
    if spacing == "leading":
        if table:
            return np.minimum(np.arange(n)[::-1] * (table // n) + offset, table - 1).astype(np.float64)
        return _uniform_times(schedule, np.arange(n)[::-1] / n)
    if spacing != "trailing":
        raise FastdiffError(f"unknown spacing {spacing!r}; allowed: trailing, leading, linspace")
    if table and clean:
        return np.round(table - np.arange(n) * (table / n)) - 1
    if clean:
        return _uniform_times(schedule, 1 - np.arange(n) / n)
    return _uniform_times(schedule, np.linspace(1, 0, n))


def flow_shift(schedule: NoiseSchedule, n: int, clean: bool, num_tokens: int) -> Array:
    """Uniform times shifted by exp(mu), mu linear in the number of tokens the transformer sees, after patching
    (0.5 at 256, 1.15 at 4096; Esser et al. 2024, section 5.3.2, and FLUX)."""
    shift = math.exp(0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256))
    u = 1 - np.arange(n) / n if clean else np.linspace(1, 0, n)
    return _down_to_t_min(schedule, schedule.t_max * (shift * u / (1 - u + shift * u)))


GRIDS: dict[str, Callable[..., Array]] = {
    "uniform_t": uniform_t, "quadratic": quadratic, "uniform_lambda": uniform_lambda, "karras": karras,
    "exponential": uniform_lambda, "polyexponential": polyexponential, "beta": beta, "flow_shift": flow_shift, "ays": ays,
    "sgm_uniform": sgm_uniform, "simple": simple, "linear_quadratic": linear_quadratic, "kl_optimal": kl_optimal,
    "cosine": cosine,
}  # fmt: skip


def make(grid: str | Sequence[float] | Grid, schedule: NoiseSchedule, steps: int, end: str = "zero", **options: Any) -> Grid:
    """A grid of `steps` intervals by name with its options, or from an explicit list of times.

    Raises:
        FastdiffError: an unknown name or option, `end` other than "zero" and "sigma_min", steps < 1, or times that do not fall.
    """
    if options and not isinstance(grid, str):
        raise FastdiffError(f"grid options {', '.join(sorted(options))} go with a grid's name, not with given times")
    if isinstance(grid, Grid):
        if grid.steps != steps:
            raise FastdiffError(f"the grid has {grid.steps} intervals where the plan needs {steps}")
        return grid
    if end not in ("zero", "sigma_min"):
        raise FastdiffError(f'end must be "zero" or "sigma_min"; given {end!r}')
    if steps < 1:
        raise FastdiffError(f"a grid needs at least one interval; given {steps}")
    clean = end == "zero"
    n = steps if clean else steps + 1
    if isinstance(grid, str):
        times = _named(grid, schedule, n, clean, options)
    else:
        times = np.asarray(grid, np.float64)
        if times.ndim != 1 or len(times) != n:
            raise FastdiffError(f'{steps} intervals with end="{end}" need {n} times; given {times.size}')
    nodes = [node_at(schedule, t) for t in times]
    if clean and nodes[-1].sigma > 0:
        nodes.append(Node(0.0, 1.0, 0.0))
    elif clean:
        raise FastdiffError(f"time {times[-1]:g} has sigma = 0 already: leave it out, end=\"zero\" adds it")
    return Grid(tuple(nodes), grid if isinstance(grid, str) else "explicit")


def _named(name: str, schedule: NoiseSchedule, n: int, clean: bool, options: dict[str, Any]) -> Array:
    family = GRIDS.get(name)
    if family is None:
        near = difflib.get_close_matches(name, GRIDS, n=3, cutoff=0.3)
        raise FastdiffError(f"unknown grid {name!r}; did you mean {', '.join(near) or ', '.join(GRIDS)}?")
    known = set(inspect.signature(family).parameters) - {"schedule", "n", "clean"}
    if unknown := set(options) - known:
        raise FastdiffError(
            f"grid {name} has no option {', '.join(sorted(unknown))}; it takes {', '.join(sorted(known)) or 'none'}"
        )
    if name == "flow_shift" and "num_tokens" not in options:
        raise FastdiffError("grid flow_shift needs num_tokens=, the number of tokens the transformer sees")
    if "clean" in inspect.signature(family).parameters:
        options = {**options, "clean": clean}
    if n == 1:
        return np.array([schedule.t_max])
    return np.clip(family(schedule, n, **options), schedule.t_min, schedule.t_max)  # rounding may pass an end


def _beta_quantile(p: float, a: float, b: float) -> float:
    """The p-quantile of Beta(a, b), by bisection on the regularised incomplete beta function."""
    lo, hi = 0.0, 1.0
    for _ in range(60):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if _beta_cdf(mid, a, b) < p else (lo, mid)
    return {0.0: 0.0, 1.0: 1.0}.get(p, (lo + hi) / 2)


def _beta_cdf(x: float, a: float, b: float) -> float:
    """I_x(a, b) by its power series below 1/2 (terms fall at least as 2^-k there), by symmetry above."""
    if x > 0.5:
        return 1 - _beta_cdf(1 - x, b, a)
    if x <= 0.0:
        return 0.0
    total, term = 1 / a, 1.0
    for k in range(1, 200):
        term *= (k - b) / k * x
        total += term / (a + k)
        if abs(term) < 1e-18 * abs(total):
            break
    return total * math.exp(a * math.log(x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
