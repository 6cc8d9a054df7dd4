"""fastdiff's own format: one safetensors file, the description as JSON in its metadata under "fastdiff"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..denoiser import Denoiser
from ..errors import CheckpointError
from ..files import atomic, sha256
from ..models import UNet, UNetConfig
from ..plans import Plan
from ..schedule import from_config

FORMAT = 1


def save(path: str | Path, weights: dict[str, torch.Tensor], description: dict[str, Any]) -> None:
    """Writes weights and description {network, schedule, prediction, time_scale, data_range, shape, ...} atomically."""
    metadata = {"fastdiff": json.dumps({"format": FORMAT, **description}, sort_keys=True)}
    with atomic(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, temporary, metadata=metadata)


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and description of a file that `save` wrote.

    Raises:
        CheckpointError: not a safetensors file, truncated, or not of this format.
    """
    try:
        with safe_open(str(path), framework="pt") as f:
            metadata = f.metadata() or {}
            if "fastdiff" not in metadata:
                raise CheckpointError(f"{path} is safetensors without fastdiff's description: it needs one to load")
            description = json.loads(metadata["fastdiff"])
            weights = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  safe_open is no mapping
    except (SafetensorError, OSError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} is not a readable safetensors file (truncated or damaged?): {e}") from e
    found = description.get("format") if isinstance(description, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found!r}; this version reads format {FORMAT}")
    return weights, description


def load(path: str | Path) -> Denoiser:
    """The denoiser of a native checkpoint, in eval mode on the CPU."""
    weights, description = read(path)
    try:
        with torch.device("meta"):  # a description may ask for any size: nothing is allocated before the weights fit it
            network = UNet(UNetConfig(**description["network"]))
        network.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
        schedule = from_config(description["schedule"])
        denoiser = build(network.eval().requires_grad_(False), schedule, description)
    except KeyError as e:
        raise CheckpointError(f"{path}: its description has no {e}") from e
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        why = " ".join(str(e).split())[:300]
        raise CheckpointError(f"{path}: its weights and its description disagree: {why}") from e
    denoiser.hash = sha256(path)
    return denoiser


def build(network: torch.nn.Module, schedule: Any, description: dict[str, Any]) -> Denoiser:
    """The denoiser around a network, as a description says."""
    scale = description.get("time_scale")
    if not (scale is None or isinstance(scale, int | float)):
        raise CheckpointError(f"time_scale must be a number or null; given {scale!r}")
    config = getattr(network, "config", None)
    if config is not None and config.in_channels != description["shape"][0]:
        raise CheckpointError(f"shape {description['shape']} has not the network's {config.in_channels} channels")
    denoiser = Denoiser(
        network,
        schedule,
        prediction=description["prediction"],
        shape=description["shape"],
        time=None if scale is None else lambda t: scale * t,
        data_range=tuple(description["data_range"]),
    )
    denoiser.info = description
    if description.get("plan"):
        denoiser.plan = Plan.from_json(description["plan"])
    return denoiser
