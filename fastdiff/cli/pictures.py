"""PNG files from uint8 images: one each, and a sheet with all of them; written when all are ready."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FastdiffError
from ..files import write_bytes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

GAP = 2  # pixels between the pictures of a sheet
WIDEST = 32  # columns; a run with more seeds gets a square sheet


def import_pillow() -> Any:
    """PIL.Image.

    Raises:
        FastdiffError: pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as e:
        raise FastdiffError("pictures need pillow: pip install 'fastdiff[plots]'") from e
    return Image


def check_folder(out: Path) -> None:
    """Says before the work, and without making anything, that `out` cannot become a folder with new files."""
    existing = out
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise FastdiffError(f"--out {out}: {existing} is not a folder; choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise FastdiffError(f"--out {out}: {existing} cannot be written; choose another place")


def sheet(images: list[np.ndarray], columns: int | None = None) -> np.ndarray:
    """(n, H, W, C) images row by row on a white sheet; `columns` of them a row, or as near a square as n allows."""
    import numpy as np

    if columns is None or columns > WIDEST:
        columns = math.ceil(math.sqrt(len(images)))
    height, width, channels = images[0].shape
    rows = math.ceil(len(images) / columns)
    out = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        out[top : top + height, left : left + width] = image
    return out


def png(image: np.ndarray) -> bytes:
    """The PNG file of an (H, W, 1 or 3) uint8 image; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    import_pillow().fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(
    out: Path, images: dict[str, Tensor], scale: int, columns: int | None, more: Mapping[str, bytes] | None = None
) -> None:
    """Writes each (C, H, W) uint8 image under its name, grid.png, and `more`. After a failure none of the new files is left.

    Raises:
        FastdiffError: the folder cannot be written, or is full.
    """
    enlarged = [image.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1) for image in images.values()]
    made_folder, new = not out.exists(), []
    try:
        pictures = (*zip(images, enlarged, strict=True), ("grid.png", sheet(enlarged, columns)))
        for name, data in chain((more or {}).items(), ((name, png(image)) for name, image in pictures)):
            path = out / name
            if not path.exists():
                new.append(path)
            write_bytes(path, data)
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        if made_folder and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise
