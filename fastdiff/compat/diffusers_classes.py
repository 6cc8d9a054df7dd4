"""What a scheduler class of diffusers means here: the solver with its options, and the levels that the class itself would use.

The class is asked for its levels, so spacing, final sigma, karras sigmas, shifts and custom timesteps are its own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import FastdiffError
from ..grid import Grid, Node
from ..schedule import NoiseSchedule, edm, flow, vp_from_alphas_cumprod

Config = dict[str, Any]
Solver = tuple[str, dict[str, Any]]

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
SDE_SECOND = {"midpoint": "midpoint", "heun": "exact"}


def _lower(c: Config, n: int) -> bool:
    """Whether the last steps lower their order: diffusers looks at the number of steps of the whole run."""
    return bool(c["lower_order_final"]) and n < 15


def _dpm_multistep(c: Config, n: int) -> Solver:
    order, kind = c["solver_order"], c["algorithm_type"]
    lower = {"lower_final": _lower(c, n)}
    if c.get("euler_at_final"):
        raise _unsupported(c, "euler_at_final")
    if kind == "dpmsolver++":
        if c["solver_type"] == "heun" and order == 2:
            return "res-2m", lower
        return {1: ("ddim", {}), 2: ("dpmpp-2m", lower), 3: ("dpmpp-3m-compat", lower)}[order]
    if kind == "sde-dpmsolver++" and order < 3:
        return ("ddim", {"eta": 1.0}) if order == 1 else ("dpmpp-2m-sde", {"second": SDE_SECOND[c["solver_type"]], **lower})
    if kind == "dpmsolver" and order == 2 and c["solver_type"] == "midpoint":
        return "dpm-solver-2m", {}
    raise _unsupported(c, f"algorithm_type={kind!r} of order {order}")


def _unipc(c: Config, n: int) -> Solver:
    if not c["predict_x0"] or c["solver_order"] > 3:
        raise _unsupported(c, f"predict_x0={c['predict_x0']}, solver_order={c['solver_order']}")
    if c["disable_corrector"]:
        raise _unsupported(c, "disable_corrector")
    return f"unipc-{c['solver_order']}", {"lower_final": bool(c["lower_order_final"]), "variant": c["solver_type"]}


def _dpm_single(c: Config, n: int) -> Solver:
    if c["algorithm_type"] != "dpmsolver++" or c["solver_type"] != "midpoint":
        raise _unsupported(c, f"algorithm_type={c['algorithm_type']!r}, solver_type={c['solver_type']!r}")
    return f"dpmpp-{c['solver_order']}s-grid", {}


def _ddpm(c: Config, n: int) -> Solver:
    kinds = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}
    if c["variance_type"] not in kinds:
        raise _unsupported(c, f"variance_type={c['variance_type']!r}")
    return "ddpm", {"variance": kinds[c["variance_type"]]}


def _pndm(c: Config, n: int) -> Solver:
    if not c["skip_prk_steps"] and n < 4:
        raise _unsupported(c, f"skip_prk_steps=False and {n} steps")
    return "plms" if c["skip_prk_steps"] else "pndm", {}


def _flow_euler(c: Config, n: int) -> Solver:
    if c["invert_sigmas"] or c["stochastic_sampling"]:
        raise _unsupported(c, "invert_sigmas or stochastic_sampling")
    return "euler", {}


CLASSES: dict[str, Callable[[Config, int], Solver]] = {
    "DDIMScheduler": lambda c, n: ("ddim", {}),
    "DDPMScheduler": _ddpm,
    "PNDMScheduler": _pndm,
    "LCMScheduler": lambda c, n: ("lcm", {}),
    "TCDScheduler": lambda c, n: ("tcd", {}),
    "EulerDiscreteScheduler": lambda c, n: ("euler", {}),
    "EulerAncestralDiscreteScheduler": lambda c, n: ("euler-ancestral", {}),
    "HeunDiscreteScheduler": lambda c, n: ("heun", {}),
    "KDPM2DiscreteScheduler": lambda c, n: ("dpm-2", {}),
    "KDPM2AncestralDiscreteScheduler": lambda c, n: ("dpm-2-ancestral", {}),
    "LMSDiscreteScheduler": lambda c, n: ("lms-4", {}),
    "DPMSolverMultistepScheduler": _dpm_multistep,
    "DPMSolverSinglestepScheduler": _dpm_single,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": lambda c, n: (f"deis-log-rho-{c['solver_order']}", {}),
    "EDMEulerScheduler": lambda c, n: ("euler", {}),
    "EDMDPMSolverMultistepScheduler": _dpm_multistep,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
}


def _unsupported(c: Config, what: str) -> FastdiffError:
    return FastdiffError(f"{c['_class_name']} with {what} has no equal here: give solver= one of fd.list_solvers() and a grid=")


def class_of(config: Config) -> str:
    """The class whose config this is: named in one that was loaded, told by its parameters in one of a scheduler just made."""
    import diffusers

    if isinstance(config.get("_class_name"), str):
        return config["_class_name"]
    given = {k for k in config if not k.startswith("_")}
    for name in CLASSES:
        if given == set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}:
            return name
    raise FastdiffError("this is no diffusion scheduler's config (give pipe.scheduler.config): it names no class, and its "
                        f"entries are no class's: {', '.join(sorted(given)) or 'none'}")  # fmt: skip


def make_peer(class_name: str, config: Config) -> Any:
    """diffusers' own scheduler of that class from a config of any class, as its `from_config` reads it."""
    import diffusers

    cls: Any = getattr(diffusers, class_name, None)
    try:
        known = hasattr(cls, "set_timesteps")
    except ImportError as e:  # a stand-in for a class whose own dependency is missing
        raise FastdiffError(f"{class_name}: {str(e).strip()}") from None
    if not known:
        raise FastdiffError(f"diffusers has no scheduler class {class_name!r}")
    return cls.from_config({k: v for k, v in config.items() if k != "_class_name"})


def is_flow(config: Config) -> bool:
    """Whether the model is a rectified flow: its own class, or a solver told to take flow sigmas."""
    return config["_class_name"].startswith("FlowMatch") or bool(config.get("use_flow_sigmas")) \
        or config.get("prediction_type") == "flow_prediction"  # fmt: skip


def schedule_of(peer: Any, config: Config, mu: float | None = None) -> NoiseSchedule:
    """The model's noise schedule. `mu`: a dynamic shift, as pipelines pass it to set_timesteps."""
    if is_flow(config):
        if mu is not None:
            return flow(shift=math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu)
        return flow(shift=float(config.get("shift") or config.get("flow_shift") or 1.0))
    if config["_class_name"].startswith("EDM"):
        return edm(float(config["sigma_min"]), float(config["sigma_max"]), float(config["sigma_data"]))
    if not hasattr(peer, "alphas_cumprod") or config.get("timestep_type") == "continuous":
        raise FastdiffError(f"{config['_class_name']} describes no noise schedule that is known here; allowed: the classes "
                            f"{', '.join(sorted(CLASSES))}")  # fmt: skip
    return vp_from_alphas_cumprod(peer.alphas_cumprod.double())


def prediction_of(config: Config) -> str:
    """fastdiff's name of what the pipeline's model predicts."""
    if config["_class_name"].startswith("EDM"):
        if config["prediction_type"] != "epsilon":
            raise _unsupported(config, f"prediction_type={config['prediction_type']!r}")
        return "edm"
    name = "flow_prediction" if config["_class_name"].startswith("FlowMatch") else config.get("prediction_type", "epsilon")
    if name not in PREDICTIONS:
        raise FastdiffError(f"prediction_type {name!r} is not known; allowed: {', '.join(PREDICTIONS)}")
    return PREDICTIONS[name]


def levels(peer: Any, config: Config, schedule: NoiseSchedule) -> tuple[Grid, float]:
    """The grid of a scheduler whose timesteps are set, and the factor that unit start noise takes.

    Classes that work in x0 + sigma*eps are brought to the model's own alpha*x0 + sigma*eps.
    """
    name = config["_class_name"]
    times = np.asarray(peer.timesteps.cpu(), np.float64)
    if not hasattr(peer, "sigmas"):
        return _by_table(peer, name, times, schedule), float(peer.init_noise_sigma)
    sigmas = np.asarray(peer.sigmas.cpu(), np.float64)
    if name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        sigmas = np.array(list(dict.fromkeys(sigmas.tolist())))  # each level is there twice, for their two calls
        times = times[::2] if name.startswith("KDPM2") else np.concatenate([times[:1], times[1::2]])
    nodes = []
    for i, sigma in enumerate(sigmas.tolist()):
        if sigma == 0.0:
            nodes.append(Node(0.0, 1.0, 0.0))
        elif schedule.name == "edm":
            nodes.append(Node(sigma, 1.0, sigma))
        elif schedule.name == "flow":
            nodes.append(Node(sigma, 1.0 - sigma, sigma))
        else:
            # an end above zero has no time of its own in the class's list
            t = float(times[i]) if i < len(times) else float(schedule.t_of_lam(-math.log(sigma)))
            nodes.append(Node(t, 1 / math.hypot(1.0, sigma), sigma / math.hypot(1.0, sigma)))
    init = float(peer.init_noise_sigma) if hasattr(peer, "init_noise_sigma") else 1.0
    return _rising(nodes, name), init if init == 1.0 else init * nodes[0].alpha


def _by_table(peer: Any, name: str, times: np.ndarray, schedule: NoiseSchedule) -> Grid:
    """Classes that read their levels off the table of alphas by whole times.

    DDIM and PNDM step to t - T/n; with linspace spacing that is not the next of their times, here it is.
    """
    if name == "PNDMScheduler":  # its list repeats times that its own start asks for again
        if not peer.config.skip_prk_steps:  # three steps of four calls each begin it
            times = np.array([*times[0:12:4], *times[12:]])
        times = np.array(list(dict.fromkeys(times.tolist())))
    nodes = [Node(t, float(schedule.alpha(t)), float(schedule.sigma(t))) for t in times.tolist()]
    final = 1.0 if name in ("DDPMScheduler", "LCMScheduler") else float(peer.final_alpha_cumprod)
    if name == "TCDScheduler":  # it ends at time 0, whose noise stays in the sample
        final = float(peer.alphas_cumprod[0])
    end = Node(0.0, math.sqrt(final), math.sqrt(1 - final))
    if end.lam > nodes[-1].lam:
        nodes.append(end)
    return _rising(nodes, name)


def _rising(nodes: Sequence[Node], name: str) -> Grid:
    if len(nodes) < 2:
        raise FastdiffError(f"{name} gives no step from level {nodes[0].sigma:g}: ask for more steps")
    return Grid(tuple(nodes), name)
