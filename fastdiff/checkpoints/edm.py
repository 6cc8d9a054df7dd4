"""EDM's networks from plain weights; NVIDIA's own pickles hold code: `fastdiff convert` turns them into these first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, first_tensor
from ..errors import CheckpointError
from ..models.edm import EDMUNet
from ..schedule import edm, namespace, ve, vp_from_alphas_cumprod, vp_linear
from . import rewrite
from .build import build
from .options import Options
from .process import Process
from .weights import Weights, listed

LEVELS = "u"  # iDDPMPrecond's own tensor: sigma at each of its steps, noise first, 0 last
Settings = Mapping[str, float]


def _edm(s: Settings, levels: Tensor | None) -> Process:
    return Process(edm(s["sigma_min"], s["sigma_max"], s["sigma_data"]), "edm")


def _vp(s: Settings, levels: Tensor | None) -> Process:
    """c_in brings x0 + sigma*eps to the levels of the VP-SDE: there the network predicts eps, told M - 1 times the SDE's t."""
    return Process(vp_linear(s["beta_min"], s["beta_min"] + s["beta_d"]), "eps", lambda t: (s["M"] - 1) * t)


def _ve(s: Settings, levels: Tensor | None) -> Process:
    """The network predicts -eps (sigma times the score)."""
    schedule = ve(s["sigma_min"], s["sigma_max"])
    return Process(schedule, "eps", lambda t: namespace(t).log(t / 2), lambda out: -first_tensor(out))


def _iddpm(s: Settings, levels: Tensor | None) -> Process:
    """A discrete-time model of eps; between its steps the network is told a fraction, where EDM's code takes the nearest step."""
    if levels is None or levels.ndim != 1:
        raise CheckpointError(f"a list of levels named {LEVELS} is missing")
    falling = levels.double().numpy()[:-1]
    return Process(vp_from_alphas_cumprod(1 / (1 + falling[::-1] ** 2)), "eps")


@dataclass(frozen=True)
class Preconditioning:
    """One of EDM's wrappers around a network (Karras et al. 2022, table 1): what a file may say of it, with the defaults, and
    the process it was trained on."""

    settings: Settings
    process: Callable[[Settings, Tensor | None], Process]


KINDS = {
    "EDMPrecond": Preconditioning({"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}, _edm),
    "VPPrecond": Preconditioning({"beta_d": 19.9, "beta_min": 0.1, "M": 1000}, _vp),
    "VEPrecond": Preconditioning({"sigma_min": 0.02, "sigma_max": 100.0}, _ve),
    "iDDPMPrecond": Preconditioning({}, _iddpm),
}


def recognise(weights: Weights) -> bool:
    return {"model.map_layer0.weight", "model.map_layer1.weight"} <= set(weights.tensors)


def from_weights(weights: Weights, options: Options) -> Denoiser:
    """The denoiser of the state dict of an EDMPrecond; of another where the file (or `config`) has its class_name, which
    `fastdiff convert` writes down.

    Raises:
        CheckpointError: an unknown preconditioning or setting, blocks that make no network.
    """
    path = weights.paths[0]
    kind, settings = _wrapper(weights, options, path)
    levels = weights.tensors.get(LEVELS)
    tensors = weights.below("model.")
    denoiser = _denoiser(weights, tensors, options, kind, settings, None if levels is None else levels.tolist())
    denoiser.write = partial(rewrite.in_file, path, {name: f"model.{name}" for name in tensors}, options.described(path))
    return denoiser


def rebuilt(description: dict[str, Any], weights: Weights, options: Options) -> Denoiser:
    """The denoiser of a student of such a network, from fastdiff's own file."""
    said = description["layout"]
    options = replace(options, shape=options.shape or tuple(description["shape"]))
    return _denoiser(weights, weights.tensors, options, said["class_name"], said["settings"], said["levels"])


def _denoiser(
    weights: Weights, tensors: dict[str, Tensor], options: Options, kind: str, settings: Settings, levels: list[float] | None
) -> Denoiser:
    path, wrapper = weights.paths[0], KINDS[kind]
    table = None if levels is None else torch.tensor(levels, dtype=torch.float64)
    try:
        process = wrapper.process({**wrapper.settings, **settings}, table)
    except ValueError as e:  # a schedule refuses its numbers
        raise CheckpointError(f"{path}: {kind}: {e}") from e
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    network: nn.Module = build(lambda: EDMUNet(shapes), tensors, path, options.dtype)
    assert isinstance(network, EDMUNet)
    channels = next(shape[1] for name, shape in shapes.items() if name.endswith("_conv.weight") and name.startswith("enc."))
    shape = options.shape or weights.trained_shape or (channels, network.side, network.side)
    denoiser = Denoiser(network, process.schedule, process.prediction, shape, process.time, output=process.output)
    denoiser.hash = weights.hash
    form = "ADM" if not network.song else "NCSN++" if hasattr(network, "map_noise") else "DDPM++"
    layout = {"name": "EDM", "class_name": kind, "settings": dict(settings), "levels": levels}
    denoiser.info = {
        "format": f"EDM, {form}" if kind == "EDMPrecond" else f"EDM, {form}, {kind}", "layout": layout, **weights.training,
    }  # fmt: skip
    return denoiser


def _wrapper(weights: Weights, options: Options, path: Path) -> tuple[str, Settings]:
    """The wrapper's class and what is said of its settings."""
    said = {**options.described(path)}
    kind = str(said.pop("class_name", weights.metadata.get("class_name", "iDDPMPrecond" if LEVELS in weights.tensors
                                                           else "EDMPrecond")))  # fmt: skip
    if kind not in KINDS:
        raise CheckpointError(f"{path}: preconditioning {kind[:60]} is not read; {', '.join(KINDS)} are")
    own = (LEVELS,) if kind == "iDDPMPrecond" else ()
    if lost := [name for name in weights.tensors if not name.startswith("model.") and name not in own]:
        raise CheckpointError(f"{path}: a {kind} has no {len(lost)} tensors {listed(lost)}")
    settings = KINDS[kind].settings
    if unknown := sorted(set(said) - set(settings)):
        known = ", ".join((*settings, "class_name"))
        raise CheckpointError(f"{path}: settings {listed(unknown)} are not known of a {kind}; {known} are")
    if not all(isinstance(v, int | float) for v in said.values()):
        raise CheckpointError(f"{path}: {', '.join(said)} must be numbers")
    return kind, said
