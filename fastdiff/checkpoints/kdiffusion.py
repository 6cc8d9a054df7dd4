"""k-diffusion's own models, in that library's classes: `.pth` of its train.py, `.safetensors` of its convert_for_inference.py.

Both hold their configuration; weights alone take it from `config` or the JSON beside them. What kinds of model there are is the
installed library's business. A model that exists as an object already goes through fastdiff.compat.kdiffusion.denoiser.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import CheckpointError
from ..schedule import edm
from . import native, rewrite
from .build import build
from .diffusers_networks import Network, Rows
from .options import Options, needed
from .weights import Weights, check_values, write

NAMES = ({"timestep_embed.weight", "mapping.0.weight"}, {"time_emb.weight", "aug_emb.weight"})  # U-Nets, transformers


def _takes(said: Mapping[str, Any], classes: int) -> Rows:
    """What a model of this configuration is conditioned on."""
    mapping, image, text = (said.get(f"{name}_cond_dim") for name in ("mapping", "unet", "cross"))
    return {
        **({"mapping_cond": (mapping,)} if mapping else {}), **({"unet_cond": (image, None, None)} if image else {}),
        **({"cross_cond": (None, text), "cross_cond_padding": (None,)} if text else {}),
        **({"class_labels": ()} if classes else {}),
    }  # fmt: skip


class KDiffusionNetwork(Network):
    """One of the library's inner models: it is told sigma itself, and classes as class_cond."""

    def call(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        return self.model(x, t.to(x.dtype), **{"class_cond" if k == "class_labels" else k: v for k, v in cond.items()})


def recognise(weights: Weights) -> bool:
    names = {name.removeprefix("inner_model.") for name in weights.tensors}
    return any(known <= names for known in NAMES)


def from_weights(weights: Weights, options: Options) -> Denoiser:
    """The denoiser of a model's weights (the averaged ones of a `.pth`), with the library's preconditioning (Karras et al. 2022).

    Raises:
        CheckpointError: no configuration, the library missing, or a model that it does not make.
    """
    path = weights.paths[0]
    config, library = _config(weights, options, path), _library()

    def make() -> Denoiser:
        whole = library.load_config(config)
        said, classes = whole["model"], whole["dataset"]["num_classes"]
        model = build(lambda: library.make_model(whole), weights.tensors, path, options.dtype)
        shape = options.shape or weights.trained_shape or (said["input_channels"], *said["input_size"])
        # the row after the last class is train.py's "no class"
        network = KDiffusionNetwork(model, _takes(said, classes), (classes + 1, True) if classes else None)
        schedule = edm(said["sigma_min"], said["sigma_max"], said["sigma_data"])
        return Denoiser(network, schedule, "edm", shape, time=lambda t: t)

    denoiser = native.guarded(path, make)
    denoiser.hash = weights.hash
    denoiser.info = {
        "format": f"k-diffusion, {config['model'].get('type')}", "network": dict(config["model"]), **weights.training,
    }  # fmt: skip
    denoiser.write = partial(_write, config)
    return denoiser


def _write(config: Mapping[str, Any], out: Path, network: nn.Module, training: Mapping[str, Any]) -> None:
    """As convert_for_inference.py does: the model's weights under their own names, its configuration in the file."""
    assert isinstance(network, KDiffusionNetwork)
    write(out / rewrite.FILE, network.model.state_dict(), {"config": json.dumps(config), **rewrite.record(training)})


def _config(weights: Weights, options: Options, path: Path) -> dict[str, Any]:
    """The configuration in the file, under what is said of it."""
    try:
        stored = json.loads(weights.metadata.get("config", "{}"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: its configuration is not readable JSON: {str(e)[:200]}") from e
    config = {**(stored if isinstance(stored, dict) else {}), **options.described(path)}
    if not isinstance(config.get("model"), dict) or not isinstance(config.get("dataset", {}), dict):
        raise CheckpointError(
            f"{path} is of k-diffusion and holds no configuration: put what it was trained with into "
            f'{path.with_suffix(".json").name} ({{"model": {{"type": ..., ...}}, "dataset": ...}})'
        )
    check_values([config["model"], config.get("dataset")], path)
    return config


def _library() -> Any:
    needed("k_diffusion", "k-diffusion's models", "k-diffusion")
    try:
        return importlib.import_module("k_diffusion.config")
    except ImportError as e:
        raise CheckpointError(f"k-diffusion is installed but cannot be imported: {' '.join(str(e).split())[:200]}") from e
