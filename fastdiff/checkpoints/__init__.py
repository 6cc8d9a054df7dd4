"""Checkpoints on disk -> Denoiser: one file a format, safe loading only."""

from __future__ import annotations

from pathlib import Path

from ..denoiser import Denoiser
from ..errors import CheckpointError
from ..shipped import SHIPPED, shipped_path
from . import native

__all__ = ["SHIPPED", "load", "shipped_path"]


def load(path: str | Path) -> Denoiser:
    """The denoiser of a native .safetensors file, of a training run's folder, or of a shipped model by its name.

    Raises:
        CheckpointError: nothing there, an unknown layout, a file that is truncated, tampered with or could run code.
    """
    if str(path) in SHIPPED:
        return native.load(shipped_path(str(path)))
    path = Path(path)
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
    return native.load(path)
