"""Checkpoints on disk -> Denoiser: one file a format, safe loading only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..denoiser import Denoiser
from ..errors import CheckpointError, FastdiffError
from ..plans import Plan
from ..shipped import HASHES, SHIPPED, shipped_path
from . import adm, diffusers, edm, kdiffusion, ldm, native, onnx, others
from .adm import load_classifier
from .options import Options
from .weights import CONVERT, Weights, listed, read

PLANS = "plans"  # folder beside a checkpoint
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")

__all__ = ["SHIPPED", "load", "load_classifier", "shipped_path"]


@dataclass(frozen=True)
class FolderFormat:
    """A layout of folders: told by the files in it."""

    name: str
    recognise: Callable[[Path], bool]
    load: Callable[[Path, Options], Denoiser]


@dataclass(frozen=True)
class FileFormat:
    """A layout of one file: told by the names of its tensors and its metadata."""

    name: str
    recognise: Callable[[Weights], bool]
    load: Callable[[Weights, Options], Denoiser]


FOLDERS = (
    FolderFormat("an exported engine", onnx.recognise, onnx.load),
    FolderFormat("a diffusers folder", diffusers.recognise, diffusers.load),
)
FILES = (
    FileFormat("another library's network in fastdiff's own file", others.recognise, others.from_weights),
    FileFormat("fastdiff's own", native.recognise, native.from_weights),
    FileFormat("EDM", edm.recognise, edm.from_weights),
    FileFormat("Stable Diffusion in one file", ldm.recognise, ldm.from_weights),
    FileFormat("k-diffusion", kdiffusion.recognise, kdiffusion.from_weights),
    FileFormat("guided-diffusion", adm.recognise, adm.from_weights),
)


def load(
    path: str | Path,
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = torch.float32,
    config: Mapping[str, Any] | None = None,
    like: Denoiser | None = None,
) -> Denoiser:
    """The denoiser of a checkpoint: a file, a folder, or a shipped model by its name.

    Read are fastdiff's own .safetensors and runs, exported engines, bare .onnx networks, diffusers pipelines and models, and
    the files of other trainers that the README lists. No code of a file is run. Weights are memory-mapped: replace a loaded
    file by another (rename, as fastdiff itself does), never write into it.

    Args:
        shape: (C, H, W) of one sample, where the checkpoint does not say it or another is wanted.
        dtype: of the weights; None = as they are stored.
        config: what a file cannot say of itself (flags, prediction, ...); over the .json of the same name beside the file.
        like: for a student of a network that no file describes, a denoiser of such a network (its teacher): the student has its
            class, and the file's weights, prediction and plans.

    Raises:
        CheckpointError: nothing there, an unknown layout, a file that is truncated, tampered with or could run code, weights
            that are missing, left over or misshapen.
    """
    options = Options(None if shape is None else tuple(shape), dtype, config or {}, like)
    if str(path) in SHIPPED:
        return _with_plans(native.load(shipped_path(str(path))), SHIPPED[str(path)])
    path = Path(path)
    try:
        loaded = _load_path(path, options)
        if like is not None and loaded.info.get(others.LAYOUT, {}).get("name") != others.PYTHON:
            raise CheckpointError(f"{path} says itself what its network is: leave out like=")
        return loaded
    except FastdiffError as e:
        raise e if path.name in str(e) else CheckpointError(f"{path}: {e}") from e


def _load_path(path: Path, options: Options) -> Denoiser:
    for layout in FOLDERS:
        if layout.recognise(path):
            return _with_plans(layout.load(path, options), path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}; give a file, a folder, or one of {', '.join(SHIPPED)}")
    return _with_plans(_load_file(path, options), path.parent)


def _load_file(path: Path, options: Options) -> Denoiser:
    if path.suffix == ".pkl":
        raise CheckpointError(f"{path} is a pickle, which can run code, and is not opened; {CONVERT}")
    if path.suffix == ".onnx":
        return onnx.from_file(path, options)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} is no {', '.join((*SUFFIXES, '.onnx'))} file: its layout is not known")
    weights = read(path)
    for layout in FILES:
        if layout.recognise(weights):
            return layout.load(weights, options)
    raise CheckpointError(
        f"{path} has no fastdiff description, and its {len(weights.tensors)} tensors are of no layout known here "
        f"({listed(sorted(weights.tensors)[:3])}): wrap the network in fd.Denoiser"
    )


def _with_plans(denoiser: Denoiser, folder: Path) -> Denoiser:
    """The denoiser with the plans tuned for it that lie in `plans/` beside the checkpoint; others there are left alone."""
    found = [Plan.load(path) for path in sorted((folder / PLANS).glob("*.json")) if path.name != HASHES]
    mine = [plan for plan in found if plan.provenance.get("tuned_for", {}).get("checkpoint") == denoiser.hash]
    denoiser.tuned = (*denoiser.tuned, *mine)
    return denoiser
