"""fastdiff's own format: one safetensors file, the description as JSON in its metadata under "fastdiff"."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..denoiser import Denoiser, Network
from ..errors import CheckpointError, FastdiffError
from ..models import UNet, UNetConfig
from ..plans import Plan
from ..schedule import from_config
from .build import build
from .options import Options
from .weights import Weights, read, write

FORMAT = 1
T = TypeVar("T")
METADATA = "fastdiff"  # the description's name in the file's metadata


def save(path: str | Path, weights: dict[str, torch.Tensor], description: dict[str, Any]) -> None:
    """Writes weights and description {network, schedule, prediction, time_scale, data_range, shape, ...} atomically."""
    write(path, weights, {METADATA: json.dumps({"format": FORMAT, **description}, sort_keys=True)})


def recognise(weights: Weights) -> bool:
    return METADATA in weights.metadata


def load(path: str | Path) -> Denoiser:
    """The denoiser of a native checkpoint, in eval mode on the CPU.

    Raises:
        CheckpointError: not a safetensors file, truncated, or not of this format.
    """
    weights = read(Path(path))
    if not recognise(weights):
        raise CheckpointError(f"{path} is safetensors without fastdiff's description: it needs one to load")
    return from_weights(weights, Options())


def described(weights: Weights) -> dict[str, Any]:
    """The description in a file's metadata."""
    path = weights.paths[0]
    try:
        description = json.loads(weights.metadata[METADATA])
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: its description is not readable JSON: {str(e)[:200]}") from e
    found = description.get("format") if isinstance(description, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found!r}; this version reads format {FORMAT}")
    return description


def from_weights(weights: Weights, options: Options) -> Denoiser:
    """The denoiser of weights whose metadata hold the description that `save` wrote."""
    path, description = weights.paths[0], described(weights)
    denoiser = describe(path, description, lambda config: build(lambda: UNet(config), weights.tensors, path, options.dtype))
    denoiser.hash = weights.hash
    return denoiser


def describe(path: Path, description: dict[str, Any], network: Callable[[UNetConfig], torch.nn.Module]) -> Denoiser:
    """The denoiser that a description tells of, around the network made from its configuration."""

    def make() -> Denoiser:
        made = network(UNetConfig(**description["network"]))
        return assemble(made, from_config(description["schedule"]), description)

    return guarded(path, make)


def guarded(path: Path, make: Callable[[], T]) -> T:
    """What `make` makes of a stranger's description; whatever it stumbles over becomes one line.

    Raises:
        CheckpointError: the description lacks something, or holds a value of another kind.
    """
    try:
        return make()
    except CheckpointError:
        raise
    except KeyError as e:
        raise CheckpointError(f"{path}: its description has no {e}") from e
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        why = " ".join(str(e).split())[:300]
        raise CheckpointError(f"{path}: its weights and its description disagree: {why}") from e


def assemble(network: Network, schedule: Any, description: dict[str, Any]) -> Denoiser:
    """The denoiser around a network, as a description says."""
    scale = description.get("time_scale")
    if not (scale is None or isinstance(scale, int | float)):
        raise FastdiffError(f"time_scale must be a number or null; given {scale!r}")
    channels = getattr(getattr(network, "config", None), "in_channels", None)
    if channels not in (None, description["shape"][0]):
        raise FastdiffError(f"shape {description['shape']} has not the network's {channels} channels")
    denoiser = Denoiser(
        network,
        schedule,
        prediction=description["prediction"],
        shape=description["shape"],
        time=None if scale is None else lambda t: scale * t,
        data_range=tuple(description["data_range"]),
    )
    denoiser.info = description
    attach_plans(denoiser, description)
    return denoiser


def attach_plans(denoiser: Denoiser, description: dict[str, Any]) -> None:
    """The plans that a student ships with."""
    if description.get("plan"):
        denoiser.plan = Plan.from_json(description["plan"])
    denoiser.tuned = tuple(Plan.from_json(text) for text in description.get("plans", ()))
