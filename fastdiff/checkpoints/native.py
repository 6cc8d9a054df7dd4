"""fastdiff's own format: one safetensors file, the description as JSON in its metadata under "fastdiff"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..denoiser import Denoiser
from ..errors import CheckpointError, FastdiffError
from ..files import atomic, sha256
from ..models import UNet, UNetConfig
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
                raise CheckpointError(f"{path} is a safetensors file without fastdiff's description; it cannot be loaded alone")
            description = json.loads(metadata["fastdiff"])
            weights = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  safe_open is no mapping
    except (SafetensorError, OSError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} is not a readable safetensors file (truncated or damaged?): {e}") from e
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {description.get('format')!r}; this version reads format {FORMAT}")
    return weights, description


def load(path: str | Path) -> Denoiser:
    """The denoiser of a native checkpoint, in eval mode on the CPU."""
    weights, description = read(path)
    try:
        network = UNet(UNetConfig(**description["network"]))
        network.load_state_dict(weights)
        schedule = from_config(description["schedule"])
        denoiser = build(network.eval().requires_grad_(False), schedule, description)
    except (KeyError, TypeError, RuntimeError) as e:
        if isinstance(e, FastdiffError):
            raise
        raise CheckpointError(f"{path}: its weights and its description disagree: {str(e).splitlines()[0]}") from e
    denoiser.hash = sha256(path)
    return denoiser


def build(network: torch.nn.Module, schedule: Any, description: dict[str, Any]) -> Denoiser:
    """The denoiser around a network, as a description says."""
    scale = description.get("time_scale")
    denoiser = Denoiser(
        network,
        schedule,
        prediction=description["prediction"],
        shape=description["shape"],
        time=None if scale is None else lambda t: scale * t,
        data_range=tuple(description["data_range"]),
    )
    denoiser.info = description
    return denoiser
