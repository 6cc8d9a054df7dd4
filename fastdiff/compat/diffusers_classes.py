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
from ..prediction import Coefficients, coefficients
from ..schedule import NoiseSchedule, edm, flow, trigflow, vp_from_alphas_cumprod

Config = dict[str, Any]
Solver = tuple[str, dict[str, Any]]
Entry = Callable[[Config, Grid, Any], Solver]  # from the class's settings, its levels, and its scheduler with its timesteps set

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
SDE_SECOND = {"midpoint": "midpoint", "heun": "exact"}
CONSISTENCY, IPNDM = "CMStochasticIterativeScheduler", "IPNDMScheduler"
TWO_CALLS = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler",
             "FlowMatchHeunDiscreteScheduler")  # fmt: skip


def _lower(c: Config, grid: Grid) -> bool:
    """Whether the last steps lower their order: diffusers looks at the number of steps of the whole run."""
    return bool(c["lower_order_final"]) and grid.steps < 15


def _dpm_multistep(c: Config, grid: Grid, peer: Any) -> Solver:
    order, kind = c["solver_order"], c["algorithm_type"]
    lower = {"lower_final": _lower(c, grid)}
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


def _unipc(c: Config, grid: Grid, peer: Any) -> Solver:
    if not c["predict_x0"] or c["solver_order"] > 3:
        raise _unsupported(c, f"predict_x0={c['predict_x0']}, solver_order={c['solver_order']}")
    if c["disable_corrector"]:
        raise _unsupported(c, "disable_corrector")
    return f"unipc-{c['solver_order']}", {"lower_final": bool(c["lower_order_final"]), "variant": c["solver_type"]}


def _dpm_single(c: Config, grid: Grid, peer: Any) -> Solver:
    if c["algorithm_type"] != "dpmsolver++" or c["solver_type"] != "midpoint":
        raise _unsupported(c, f"algorithm_type={c['algorithm_type']!r}, solver_type={c['solver_type']!r}")
    return f"dpmpp-{c['solver_order']}s-grid", {}


def _sa(c: Config, grid: Grid, peer: Any) -> Solver:
    """Its noise strength is a function of the time told; the solver's is one number between two levels."""
    if c["algorithm_type"] != "data_prediction":
        raise _unsupported(c, f"algorithm_type={c['algorithm_type']!r}")
    tau = [float(peer.tau_func(int(node.t))) for node in grid.nodes[:-1]]
    options = {"predictor": c["predictor_order"], "corrector": c["corrector_order"], "lower_final": bool(c["lower_order_final"])}
    noisy = [i for i, value in enumerate(tau) if value]
    if not noisy:
        return "sa-solver", {**options, "tau": 0.0}
    first, last = noisy[0], noisy[-1]
    if len(set(tau[first : last + 1])) > 1:
        raise _unsupported(c, "a tau_func of more than one strength")
    return "sa-solver", {**options, "tau": tau[first], "tau_min": grid.nodes[last].u, "tau_max": grid.nodes[first].u}


def _ddpm(c: Config, grid: Grid, peer: Any) -> Solver:
    kinds = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}
    if c["variance_type"] not in kinds:
        raise _unsupported(c, f"variance_type={c['variance_type']!r}")
    return "ddpm", {"variance": kinds[c["variance_type"]]}


def _stride(peer: Any) -> int:
    return int(peer.config.num_train_timesteps) // int(peer.num_inference_steps)


def _ddim(c: Config, grid: Grid, peer: Any) -> Solver:
    return "ddim-strided", {"stride": _stride(peer)}


def _pndm(c: Config, grid: Grid, peer: Any) -> Solver:
    if c["prediction_type"] not in ("epsilon", "v_prediction"):
        raise _unsupported(c, f"prediction_type={c['prediction_type']!r}")
    told = tuple(float(t) for t in peer.timesteps.tolist())
    return "pndm-by-calls", {"told": told, "stride": _stride(peer), "runge_kutta": not c["skip_prk_steps"],
                             "velocity": c["prediction_type"] == "v_prediction"}  # fmt: skip


def _consistency(c: Config, grid: Grid, peer: Any) -> Solver:
    if c["s_noise"] != 1.0:
        raise _unsupported(c, f"s_noise={c['s_noise']}")
    return "consistency", {}


def _as(solver: str, **options: Any) -> Entry:
    """A class that always is one solver."""
    return lambda c, grid, peer: (solver, options)


def _flow(solver: str) -> Entry:
    def flow_solver(c: Config, grid: Grid, peer: Any) -> Solver:
        if given := [k for k in ("stochastic_sampling", "scale_factors") if c.get(k)]:
            raise _unsupported(c, given[0])
        return solver, {}

    return flow_solver


CLASSES: dict[str, Entry] = {
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "CogVideoXDDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "PNDMScheduler": _pndm,
    IPNDM: _as("ipndm-from-noise"),
    "LCMScheduler": _as("lcm"),
    "TCDScheduler": _as("tcd"),
    CONSISTENCY: _consistency,
    "EulerDiscreteScheduler": _as("euler"),
    "EulerAncestralDiscreteScheduler": _as("euler-ancestral"),
    "HeunDiscreteScheduler": _as("heun"),
    "KDPM2DiscreteScheduler": _as("dpm-2"),
    "KDPM2AncestralDiscreteScheduler": _as("dpm-2-ancestral"),
    "LMSDiscreteScheduler": _as("lms-4"),
    "DPMSolverMultistepScheduler": _dpm_multistep,
    "DPMSolverSinglestepScheduler": _dpm_single,
    "DPMSolverSDEScheduler": _as("dpmpp-sde", one_path=False),
    "UniPCMultistepScheduler": _unipc,
    "SASolverScheduler": _sa,
    "DEISMultistepScheduler": lambda c, grid, peer: (f"deis-log-rho-{c['solver_order']}", {}),
    "EDMEulerScheduler": _as("euler"),
    "EDMDPMSolverMultistepScheduler": _dpm_multistep,
    "FlowMatchEulerDiscreteScheduler": _flow("euler"),
    "FlowMatchHeunDiscreteScheduler": _as("heun-velocity"),
    "FlowMatchLCMScheduler": _flow("lcm"),
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
        raise FastdiffError(f"{class_name}: {' '.join(str(e).split())}") from None
    if not known:
        raise FastdiffError(f"diffusers has no scheduler class {class_name!r}")
    try:
        return cls.from_config({k: v for k, v in config.items() if k != "_class_name"})
    except (TypeError, ValueError) as e:
        raise FastdiffError(f"{class_name} cannot be made from this config: {' '.join(str(e).split())}") from None


def is_flow(config: Config) -> bool:
    """Whether the model is a rectified flow: its own class, or a solver told to take flow sigmas."""
    return config["_class_name"].startswith("FlowMatch") or bool(config.get("use_flow_sigmas")) \
        or config.get("prediction_type") == "flow_prediction"  # fmt: skip


def is_edm(config: Config) -> bool:
    """Whether the model is told the log of sigma, and gets its input scaled."""
    return config["_class_name"].startswith("EDM") or config["_class_name"] == CONSISTENCY


def time_scale(config: Config) -> float:
    """The network's time over the schedule's own; for EDM's preconditioning, over the log of sigma."""
    if is_flow(config):
        return float(config["num_train_timesteps"])
    return {IPNDM: 2 / math.pi, CONSISTENCY: 250.0}.get(config["_class_name"], 0.25 if is_edm(config) else 1.0)


def schedule_of(peer: Any, config: Config, mu: float | None = None) -> NoiseSchedule:
    """The model's noise schedule. `mu`: a dynamic shift, as pipelines pass it to set_timesteps."""
    if is_flow(config):
        if config.get("invert_sigmas"):
            raise _unsupported(config, "invert_sigmas (a network whose time runs from data to noise)")
        if mu is not None:
            return flow(shift=math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu)
        return flow(shift=float(config.get("shift") or config.get("flow_shift") or 1.0))
    if config["_class_name"] == IPNDM and config["trained_betas"] is None:
        return trigflow()
    if is_edm(config):
        return edm(float(config["sigma_min"]), float(config["sigma_max"]), float(config["sigma_data"]))
    if not hasattr(peer, "alphas_cumprod") or config.get("timestep_type") == "continuous":
        raise FastdiffError(f"{config['_class_name']} describes no noise schedule that is known here; allowed: the classes "
                            f"{', '.join(sorted(CLASSES))}")  # fmt: skip
    return vp_from_alphas_cumprod(peer.alphas_cumprod.double())


def prediction_of(config: Config) -> str:
    """fastdiff's name of what the pipeline's model predicts."""
    if is_edm(config):
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise _unsupported(config, f"prediction_type={config['prediction_type']!r}")
        return "edm"
    if config["_class_name"] == IPNDM:
        return "v"  # what it calls eps is alpha v + sigma x
    name = "flow_prediction" if config["_class_name"].startswith("FlowMatch") else config.get("prediction_type", "epsilon")
    if name not in PREDICTIONS:
        raise FastdiffError(f"prediction_type {name!r} is not known; allowed: {', '.join(PREDICTIONS)}")
    return PREDICTIONS[name]


def denoising(config: Config, prediction: str, alpha: float, sigma: float) -> Coefficients:
    """What turns the output of the pipeline's model at a level into the denoised prediction."""
    if config["_class_name"] != CONSISTENCY:
        return coefficients(prediction, alpha, sigma, float(config.get("sigma_data") or 0.5))
    # the boundary condition at sigma_min (Song et al. 2023, appendix C)
    data, above = float(config["sigma_data"]), sigma - float(config["sigma_min"])
    root = math.hypot(sigma, data)
    return Coefficients(1 / root, data**2 / (above**2 + data**2), above * data / root)


def levels(peer: Any, config: Config, schedule: NoiseSchedule) -> tuple[Grid, float]:
    """The grid of a scheduler whose timesteps are set, and the factor that unit start noise takes.

    Classes that work in x0 + sigma*eps are brought to the model's own alpha*x0 + sigma*eps.
    """
    name, scale = config["_class_name"], time_scale(config)
    times = np.asarray(peer.timesteps.cpu(), np.float64)
    if name == IPNDM:
        alphas, sigmas = (v.double().tolist() for v in (peer.alphas, peer.betas))
        return _rising([Node(*v) for v in zip([*(times / scale).tolist(), 0.0], alphas, sigmas, strict=True)], name), 1.0
    if not hasattr(peer, "sigmas"):
        return _by_table(peer, name, times, schedule), float(peer.init_noise_sigma)
    sigmas = np.asarray(peer.sigmas.cpu(), np.float64)
    if name in TWO_CALLS:
        sigmas = np.array(list(dict.fromkeys(sigmas.tolist())))  # each level is there twice, for their two calls
        inner = name.startswith(("KDPM2", "DPMSolverSDE"))  # the second call has a time of its own
        times = times[::2] if inner else np.concatenate([times[:1], times[1::2]])
    nodes = []
    for i, sigma in enumerate(sigmas.tolist()):
        if sigma == 0.0:
            nodes.append(Node(0.0, 1.0, 0.0))
        elif schedule.name == "edm":
            nodes.append(Node(sigma, 1.0, sigma))
        elif schedule.name == "flow":  # some classes round the time that they tell
            nodes.append(Node(float(times[i]) / scale if i < len(times) else sigma, 1.0 - sigma, sigma))
        else:
            # an end above zero has no time of its own in the class's list
            t = float(times[i]) if i < len(times) else float(schedule.t_of_lam(-math.log(sigma)))
            nodes.append(Node(t, 1 / math.hypot(1.0, sigma), sigma / math.hypot(1.0, sigma)))
    init = float(peer.init_noise_sigma) if hasattr(peer, "init_noise_sigma") else 1.0
    return _rising(nodes, name), init if init == 1.0 else init * nodes[0].alpha


def _by_table(peer: Any, name: str, times: np.ndarray, schedule: NoiseSchedule) -> Grid:
    """Classes that read their levels off the table of alphas by whole times."""
    if name == "PNDMScheduler":  # its list repeats times that its own start asks for again
        if not peer.config.skip_prk_steps:  # three steps of four calls each begin it
            times = np.array([*times[0:12:4], *times[12:]])
        times = np.array(list(dict.fromkeys(times.tolist())))
    nodes = [Node(t, float(schedule.alpha(t)), float(schedule.sigma(t))) for t in times.tolist()]
    final = float(getattr(peer, "final_alpha_cumprod", 1.0)) if name != "LCMScheduler" else 1.0
    if name == "TCDScheduler":  # it ends at time 0, whose noise stays in the sample
        final = float(peer.alphas_cumprod[0])
    end = Node(0.0, math.sqrt(final), math.sqrt(1 - final))
    if end.lam > nodes[-1].lam:
        nodes.append(end)
    elif name.startswith("DDIM") and (peer.config.clip_sample or peer.config.thresholding):
        raise FastdiffError(f"{name} with set_alpha_to_one=False and a list that ends at time 0 only clips in its last step: "
                            "no equal here; give steps_offset=1")  # fmt: skip
    return _rising(nodes, name)


def _rising(nodes: Sequence[Node], name: str) -> Grid:
    if len(nodes) < 2:
        raise FastdiffError(f"{name} gives no step from level {nodes[0].sigma:g}: ask for more steps")
    if nodes[-1].sigma == nodes[-2].sigma:
        raise FastdiffError(f"{name}'s last step has no length (its last two levels are one), which has no equal here: give "
                            "other sigmas or final_sigmas_type, or solver= one of fd.list_solvers() and a grid=")  # fmt: skip
    return Grid(tuple(nodes), name)
