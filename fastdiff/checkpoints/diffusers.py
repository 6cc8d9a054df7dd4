"""Folders of the diffusers library: a pipeline's (model_index.json) or one model's (config.json) -> Denoiser.

The classes are diffusers' own; reading is ours: configurations are checked, weights memory-mapped, every tensor accounted for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..denoiser import Denoiser
from ..errors import CheckpointError
from . import rewrite
from .build import build
from .diffusers_networks import FAMILIES, Decoder
from .options import Options, needed
from .process import from_scheduler
from .weights import Weights, check_values, listed, read, read_json, write

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
AUTOENCODERS = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
LEGACY = "Transformer2DModel"  # before diffusers 0.29 one class for several
LEGACY_NORMS = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
DENOISERS = (*FAMILIES, LEGACY)
STEM = "diffusion_pytorch_model"
UNSET: tuple[Any, ...] = (None, False, "", "default", [], {})  # values by which a setting unknown here changes nothing


def recognise(path: Path) -> bool:
    """Whether a folder holds a diffusers pipeline or model."""
    return (path / INDEX).is_file() or (path / CONFIG).is_file()


def load(folder: Path, options: Options) -> Denoiser:
    """The denoiser of a pipeline's folder, its autoencoder as decoder; or of a model's folder with a scheduler in or beside it.

    Raises:
        CheckpointError: a pipeline or a scheduler of another kind, parts missing, weights that do not fit their configuration.
    """
    needed("diffusers", "diffusers folders")
    whole = (folder / INDEX).is_file()
    index = read_json(folder / INDEX) if whole else {}
    place = _component(folder, index, DENOISERS) if whole else folder
    if place is None:
        of = str(index.get("_class_name"))[:60]
        raise CheckpointError(f"{folder / INDEX} ({of}) names no denoiser that is read: {', '.join(FAMILIES)}")
    config = _config(place, DENOISERS)
    weights = read(_weights_file(place))
    scheduler, where = _scheduler(folder)
    denoiser = _denoiser(place, config, weights, scheduler, where, options)
    names = index.get("id2label")
    denoiser.info |= {
        "format": f"diffusers {index.get('_class_name') or config['_class_name']}",
        "class_names": _class_names(names) if isinstance(names, dict) else None, **weights.training,
    }  # fmt: skip
    denoiser.write = partial(_write, folder, place, index, where)
    if whole and (autoencoder := _component(folder, index, AUTOENCODERS)) is not None:
        denoiser.decoder = _decoder(autoencoder, options.dtype)
    if whole:
        from .text import encoder

        denoiser.encode = encoder(folder, index, denoiser)
    if denoiser.decoder is None and denoiser.encode is None:  # else the network is not all that there is
        denoiser.info["layout"] = {"name": "diffusers", "scheduler": scheduler}
    return denoiser


def rebuilt(description: dict[str, Any], weights: Weights, options: Options) -> Denoiser:
    """The denoiser of a student of such a folder's network, from fastdiff's own file."""
    needed("diffusers", "networks of diffusers")
    path = weights.paths[0]
    options = replace(options, shape=options.shape or tuple(description["shape"]))
    config = _checked(dict(description["network"]), path, DENOISERS)
    inner = Weights({name.removeprefix("model."): tensor for name, tensor in weights.tensors.items()}, weights.paths)
    return _denoiser(path, config, inner, dict(description["layout"]["scheduler"]), path, options)


def _denoiser(
    place: Path, config: dict[str, Any], weights: Weights, scheduler: dict[str, Any], where: Path, options: Options
) -> Denoiser:
    """The denoiser of a network's configuration and weights, which `place` holds, and its scheduler's configuration."""
    family = FAMILIES[config["_class_name"]]
    shape = options.shape or weights.trained_shape or family.shape(config)
    process = from_scheduler(scheduler, where, family.tokens(config, shape))
    model = _model(place, config, weights, options.dtype)
    denoiser = Denoiser(
        family.network(model, family.conditions(config), family.classes(config)), process.schedule, process.prediction,
        shape, process.time, output=process.output,
    )  # fmt: skip
    denoiser.hash = weights.hash
    said = scheduler.get("variance_type")  # "learned" is not "learned_range": a log variance of the network's own
    denoiser.info = {"network": dict(config), "variance": process.variance, "variance_type": said}
    return denoiser


def _class_names(names: dict[str, Any]) -> list[str] | None:
    """id2label of a DiT pipeline: "3" -> "great white, ..." -> the first word of each class in order."""
    try:
        return [str(names[str(i)]).split(",")[0] for i in range(len(names))]
    except KeyError:
        return None


def _component(folder: Path, index: dict[str, Any], classes: Sequence[str]) -> Path | None:
    """The folder of the one component that is of one of these classes, where there is one."""
    found = [
        name for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[1] in classes
    ]  # fmt: skip
    if len(found) > 1:
        raise CheckpointError(f"{folder / INDEX} has {len(found)} parts of one kind ({', '.join(found)}): load the folder of one")
    if not found:
        return None
    name = found[0]
    if name != Path(name).name or "\\" in name or not (folder / name).is_dir():
        raise CheckpointError(f"{folder / INDEX} names {name[:120]!r}, which is no folder beside it")
    return folder / name


def _config(place: Path, classes: Sequence[str]) -> dict[str, Any]:
    """A model's configuration, its class among these and named as diffusers names it today."""
    return _checked(read_json(place / CONFIG), place / CONFIG, classes)


def _checked(config: dict[str, Any], where: Path, classes: Sequence[str]) -> dict[str, Any]:
    name = config.get("_class_name")
    if name not in classes:
        raise CheckpointError(f"{where}: class {str(name)[:60]!r} is not read here; {', '.join(classes)} are")
    check_values(config, where)
    if name == LEGACY:
        if (kind := config.get("norm_type")) not in LEGACY_NORMS:
            known = ", ".join(LEGACY_NORMS)
            raise CheckpointError(f"{where}: a {LEGACY} with norm_type {str(kind)[:60]!r} is not read; {known} are")
        config["_class_name"] = LEGACY_NORMS[kind]
    return config


def _scheduler(folder: Path) -> tuple[dict[str, Any], Path]:
    """The scheduler's configuration in the folder, in its scheduler/, or beside it."""
    places = [folder / SCHEDULER, folder / "scheduler" / SCHEDULER, folder.resolve().parent / "scheduler" / SCHEDULER]
    for path in places:
        if path.is_file():
            return read_json(path), path
    raise CheckpointError(
        f"{folder} says nothing of its noise schedule: put {SCHEDULER} into it (scheduler.save_pretrained(folder) writes it)"
    )


def _write(folder: Path, place: Path, index: dict[str, Any], scheduler: Path, out: Path, network: Any, training: Any) -> None:
    """The folder again, with a trained network: a pipeline stays a pipeline."""
    named = [name for name, entry in index.items() if isinstance(entry, list) and name == Path(name).name != ".."]
    parts = [folder / name for name in named]
    others = [file for part in parts if part != place and part.is_dir() for file in sorted(part.rglob("*")) if file.is_file()]
    for file in (*others, *([folder / INDEX] if index else []), place / CONFIG, scheduler):
        rewrite.keep(file, out / (file.relative_to(folder) if file.is_relative_to(folder) else file.name))
    target = out / place.relative_to(folder) / f"{STEM}.safetensors"
    write(target, network.model.state_dict(), {"format": "pt", **rewrite.record(training)})


def _model(place: Path, config: dict[str, Any], weights: Weights, dtype: torch.dtype | None) -> torch.nn.Module:
    """The model of a folder, in diffusers' own class, with these weights."""
    import diffusers

    cls = getattr(diffusers, str(config["_class_name"]))
    where = place / CONFIG

    def make() -> torch.nn.Module:
        model, unused = cls.from_config(config, return_unused_kwargs=True)
        if lost := [k for k, v in unused.items() if not k.startswith("_") and v not in UNSET]:
            raise CheckpointError(f"{where}: {config['_class_name']} has no setting {listed(lost)}; a newer diffusers may")
        return model

    return build(make, _renamed(weights.tensors), place, dtype)


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Attention under the names of diffusers before 0.12 -> today's: the first DDPM and autoencoder folders have them."""
    if not any(name.endswith(".proj_attn.weight") for name in tensors):
        return tensors
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    out = {}
    for name, value in tensors.items():
        parts = name.rsplit(".", 2)
        if len(parts) == 3 and parts[1] in names:
            parts[1] = names[parts[1]]
        out[".".join(parts)] = value
    return out


def _weights_file(place: Path) -> Path:
    """safetensors before pickles, whole before sharded, full precision before its variants."""
    for pattern in (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json", f"{STEM}.bin", f"{STEM}.bin.index.json",
                    f"{STEM}.*.safetensors", f"{STEM}.safetensors.index.*.json"):  # fmt: skip
        if found := [path for path in sorted(place.glob(pattern)) if "-of-" not in path.name]:
            return found[0]
    raise CheckpointError(f"{place} has no weights: {STEM}.safetensors (or .bin, or an index of shards) is missing")


def _decoder(place: Path, dtype: torch.dtype | None) -> Decoder:
    return Decoder(_model(place, _config(place, AUTOENCODERS), read(_weights_file(place)), dtype))
