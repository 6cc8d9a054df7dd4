"""The process a network was trained on, read from a scheduler's configuration: schedule, prediction, what it is told of time.

The betas of Ho et al. 2020 ("linear"), Rombach et al. 2022 ("scaled_linear") and Nichol and Dhariwal 2021 ("squaredcos_cap_v2"),
in float64; field names are those of diffusers' scheduler_config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..denoiser import first_tensor
from ..errors import CheckpointError, FastdiffError
from ..schedule import NoiseSchedule, edm, flow, ve, vp_from_alphas_cumprod

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
VARIANCES = {  # of DDPM's step -> the solver ddpm's; "learned", a log variance of the network's own, is none of its
    "fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "fixed_large_log": "large",
    "learned_range": "learned", "learned": None, "": None,
}  # fmt: skip
MOST_STEPS = 100_000  # of training; 1,000 is common
BETAS = (
    "DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "PNDM", "LMSDiscrete", "EulerDiscrete",
    "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep",
    "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep", "SASolver", "LCM",
    "TCD",
)  # fmt: skip
FLOWS = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM")


@dataclass(frozen=True)
class Process:
    """What a Denoiser needs beside its network."""

    schedule: NoiseSchedule
    prediction: str
    time: Callable[[Any], Any] | None = None
    output: Callable[[Any], Tensor] | None = None
    variance: str | None = None  # for fd.plan("ddpm", ..., variance=): what the network was trained or recommended with


def betas(name: str, start: float, end: float, steps: int) -> np.ndarray:
    """The variances (steps,) added at each training step, float64.

    Raises:
        CheckpointError: an unknown name.
    """
    if name == "linear":
        return np.linspace(start, end, steps)
    if name == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if name == "squaredcos_cap_v2":
        levels = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - levels[1:] / levels[:-1], 0.999)
    if name == "sigmoid":
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start
    raise CheckpointError(f"unknown beta schedule {name!r}; known: linear, scaled_linear, squaredcos_cap_v2, sigmoid")


def from_betas(values: np.ndarray) -> NoiseSchedule:
    """The schedule of a discrete-time model from its betas."""
    return vp_from_alphas_cumprod(np.cumprod(1 - values))


def from_scheduler(config: Mapping[str, Any], where: Path, tokens: int | None = None) -> Process:
    """The process behind a scheduler_config.json.

    Args:
        tokens: image tokens of the checkpoint's own shape: a dynamically shifted flow depends on them.

    Raises:
        CheckpointError: a scheduler of another kind of model, an unknown setting, a value that is no number.
    """
    name = str(config.get("_class_name"))
    kind = name.removesuffix("Scheduler")
    get = _reader({**_defaults(name), **config}, where)
    try:
        if kind in FLOWS or get("use_flow_sigmas", bool, False):
            return _flow(get, tokens)
        if kind in ("EDMEuler", "EDMDPMSolverMultistep"):
            return _edm(get, where)
        if kind == "ScoreSdeVe":
            return Process(ve(get("sigma_min", float), get("sigma_max", float)), "score")
        if kind in BETAS:
            return _discrete(get, where)
    except FastdiffError as e:
        raise e if str(where) in str(e) else CheckpointError(f"{where}: {e}") from e
    raise CheckpointError(f"{where}: scheduler {name!r} is not read; {', '.join((*BETAS, *FLOWS))} and EDMEuler, ScoreSdeVe are")


def _defaults(name: str) -> dict[str, Any]:
    """What the class of that name takes where a configuration is silent, where diffusers is installed."""
    import inspect

    import diffusers

    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    parameters = inspect.signature(cls.__init__).parameters if cls is not None else {}
    return {k: p.default for k, p in parameters.items() if p.default is not p.empty}


def _reader(config: Mapping[str, Any], where: Path) -> Callable[..., Any]:
    def get(name: str, kind: type, *default: Any) -> Any:
        value = config.get(name, *default)
        if value is None and default:
            return default[0]
        wrong = kind is not bool and (isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)))
        if wrong or not isinstance(value, int | float if kind is float else kind):
            raise CheckpointError(f"{where}: {name} must be a {kind.__name__}; given {str(value)[:60]!r}")
        return value

    return get


def _steps(get: Callable[..., Any]) -> int:
    steps = get("num_train_timesteps", int)
    if not 2 <= steps <= MOST_STEPS:
        raise FastdiffError(f"num_train_timesteps must be 2 to {MOST_STEPS:,}; given {steps:,}")
    return int(steps)


def _prediction(get: Callable[..., Any]) -> str:
    name = get("prediction_type", str, "epsilon")
    if name not in PREDICTIONS:
        raise FastdiffError(f"prediction_type {name!r} is not known; {', '.join(PREDICTIONS)} are")
    return PREDICTIONS[name]


def _discrete(get: Callable[..., Any], where: Path) -> Process:
    if get("timestep_type", str, "discrete") != "discrete":
        raise FastdiffError("timestep_type 'continuous' is not read: this network is told log sigma; make the Denoiser by hand")
    prediction, steps = _prediction(get), _steps(get)
    if prediction == "flow":
        raise FastdiffError("prediction_type flow_prediction needs use_flow_sigmas")
    given = get("trained_betas", list, [])
    try:
        values = np.asarray(given, np.float64) if len(given) else None
    except (TypeError, ValueError) as e:
        raise FastdiffError("trained_betas must be a list of numbers") from e
    if values is None:
        values = betas(get("beta_schedule", str), get("beta_start", float), get("beta_end", float), steps)
    if values.ndim != 1 or not (len(values) > 1 and np.all((values > 0) & (values <= 1))):
        raise FastdiffError(f"betas must be numbers in (0, 1]; they run from {values.min():g} to {values.max():g}")
    schedule = from_betas(values)
    if get("rescale_betas_zero_snr", bool, False):
        schedule = schedule.zero_terminal_snr()
    if (variance := get("variance_type", str, "")) not in VARIANCES:
        raise FastdiffError(f"variance_type {variance[:60]!r} is not known; {', '.join(v for v in VARIANCES if v)} are")
    return Process(schedule, prediction, variance=VARIANCES[variance])


def _edm(get: Callable[..., Any], where: Path) -> Process:
    schedule = edm(get("sigma_min", float), get("sigma_max", float), get("sigma_data", float))
    prediction = _prediction(get)
    if prediction == "eps":
        return Process(schedule, "edm")
    if prediction == "v":  # the same preconditioning with the network's sign turned
        return Process(schedule, "edm", output=lambda out: -first_tensor(out))
    raise FastdiffError("prediction_type of an EDM scheduler is epsilon or v_prediction")


def _flow(get: Callable[..., Any], tokens: int | None) -> Process:
    steps = _steps(get)
    if get("invert_sigmas", bool, False):
        raise FastdiffError("invert_sigmas is not read: make the Denoiser by hand, with time= running backwards")
    shift = float(get("flow_shift", float, 1.0) if get("use_flow_sigmas", bool, False) else get("shift", float, 1.0))
    if get("use_dynamic_shifting", bool, False):
        shift = dynamic_shift(get, tokens)
    return Process(flow(shift), "flow", time=lambda t: steps * t)


def dynamic_shift(get: Callable[..., Any], tokens: int | None) -> float:
    """The shift for this number of image tokens: exp(mu), mu on the line through (base, max) (Esser et al. 2024, 5.3.2)."""
    if tokens is None:
        raise FastdiffError("use_dynamic_shifting depends on the sample's size, which this checkpoint does not say: give shape=")
    low, high = get("base_image_seq_len", int, 256), get("max_image_seq_len", int, 4096)
    first, last = get("base_shift", float, 0.5), get("max_shift", float, 1.15)
    if not 0 < low < high:
        raise FastdiffError(f"base_image_seq_len and max_image_seq_len must rise; given {low} and {high}")
    mu = first + (last - first) * (tokens - low) / (high - low)
    if not 0 < mu < 20 or get("time_shift_type", str, "exponential") not in ("exponential", "linear"):
        raise FastdiffError(f"the dynamic shift at {tokens:,} tokens would be mu = {mu:g}")
    return math.exp(mu) if get("time_shift_type", str, "exponential") == "exponential" else mu
