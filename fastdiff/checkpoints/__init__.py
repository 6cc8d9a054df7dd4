"""Checkpoints on disk -> Denoiser: one file a format, safe loading only."""

from __future__ import annotations

from pathlib import Path

from ..denoiser import Denoiser
from ..errors import CheckpointError
from ..plans import Plan
from ..shipped import HASHES, SHIPPED, shipped_path
from . import native

ENGINE = "manifest.json"  # what makes a folder an exported engine
PLANS = "plans"  # folder beside a checkpoint

__all__ = ["SHIPPED", "load", "shipped_path"]


def load(path: str | Path) -> Denoiser:
    """The denoiser of a native .safetensors file, of a training run's folder, of an exported engine's folder, or of a shipped
    model by its name.

    Raises:
        CheckpointError: nothing there, an unknown layout, a file that is truncated, tampered with or could run code.
    """
    if str(path) in SHIPPED:
        return _with_plans(native.load(shipped_path(str(path))), SHIPPED[str(path)])
    path = Path(path)
    if (path / ENGINE).is_file():
        from .onnx import load as load_engine

        return _with_plans(load_engine(path), path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint at {path}; give a .safetensors file, a run's folder, or one of {', '.join(SHIPPED)}"
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is not a .safetensors file; pickled checkpoints can run code and are not opened: "
            "convert it to safetensors first"
        )
    return _with_plans(native.load(path), path.parent)


def _with_plans(denoiser: Denoiser, folder: Path) -> Denoiser:
    """The denoiser with the plans tuned for it that lie in `plans/` beside the checkpoint; others there are left alone."""
    found = [Plan.load(path) for path in sorted((folder / PLANS).glob("*.json")) if path.name != HASHES]
    denoiser.tuned = tuple(plan for plan in found if plan.provenance.get("tuned_for", {}).get("checkpoint") == denoiser.hash)
    return denoiser
