"""Training images as one array in memory, uint8 pixels or latents, from an .npz file or a folder of images."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import FastdiffError
from ..files import sha256

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Images:
    """x: (n, C, H, W), uint8 or, as latents, float32; y: (n,) int64 labels or None; class names; sha256 of the file or pixels."""

    x: Tensor
    y: Tensor | None
    names: tuple[str, ...]
    digest: str

    @property
    def num_classes(self) -> int:
        return 0 if self.y is None else int(self.y.max()) + 1

    def clean(self, index: Tensor) -> Tensor:
        """Some of them as x0, float32: pixels from -1 to 1, latents as they are."""
        x = self.x[index]
        return x if x.is_floating_point() else x.float() / 127.5 - 1

    def to(self, device: torch.device) -> Images:
        """The same images and labels on a device."""
        return replace(self, x=self.x.to(device), y=None if self.y is None else self.y.to(device))



def load_images(path: str | Path, size: int | None = None, latents: bool = False) -> Images:
    """Reads `x_train`/`x` and `y_train`/`y` of an .npz, or a folder (one subfolder a class, or images alone).

    Args:
        latents: whether `latents`, (n, C, h, w) floats scaled as the network sees them, may stand for x.

    Raises:
        FastdiffError: no such path, no images in it, or arrays of the wrong type or shape.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path, size)
    if path.suffix != ".npz":
        raise FastdiffError(f"data must be an .npz file or a folder of images; given {path}")
    try:
        with np.load(path, allow_pickle=False) as f:
            arrays = {k: f[k] for k in ("x_train", "x", "y_train", "y", "names", "latents") if k in f.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as e:
        raise FastdiffError(f"cannot read {path} as an .npz of plain arrays: {e}") from e
    y = arrays.get("y_train", arrays.get("y"))
    names = tuple(str(n) for n in arrays["names"]) if "names" in arrays else ()
    if latents and "latents" in arrays:
        return Images(_latents(path, arrays), _labels(path, y, len(arrays["latents"])), names, sha256(path))
    x = arrays.get("x_train", arrays.get("x"))
    if x is None or x.dtype != np.uint8 or x.ndim not in (3, 4) or not x.size:
        raise FastdiffError(f"{path} must hold x or x_train, uint8, (n, H, W) or (n, H, W, C); given "
                            f"{None if x is None else (x.dtype.name, x.shape)}")  # fmt: skip
    x = x[:, None] if x.ndim == 3 else np.moveaxis(x, -1, 1)
    return Images(torch.from_numpy(np.ascontiguousarray(x)), _labels(path, y, len(x)), names, sha256(path))


def _labels(path: Path, y: np.ndarray | None, count: int) -> Tensor | None:
    if y is None:
        return None
    if y.shape != (count,) or y.dtype.kind not in "iu":
        raise FastdiffError(f"{path}: y must hold one integer an image; given {y.dtype.name} {y.shape} for {count}")
    if y.min() < 0:
        raise FastdiffError(f"{path}: labels count from 0; given {y.min()}")
    return torch.from_numpy(y.astype(np.int64))


def _latents(path: Path, arrays: dict[str, np.ndarray]) -> Tensor:
    z = arrays["latents"]
    if "x" in arrays or "x_train" in arrays:
        raise FastdiffError(f"{path} holds images and latents: leave one of them out")
    if z.dtype.kind != "f" or z.ndim != 4 or not z.size or not np.isfinite(z).all():
        raise FastdiffError(f"{path}: latents must be finite floats (n, C, h, w); given {z.dtype.name} {z.shape}")
    return torch.from_numpy(z.astype(np.float32))


def _from_folder(path: Path, size: int | None) -> Images:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as e:
        raise FastdiffError("a folder of images needs pillow: pip install 'fastdiff[plots]'") from e
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FastdiffError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {path}")
    rows: list[np.ndarray] = []
    for file in files:
        try:
            rows.append(_square(file, size))
            size = size or rows[0].shape[1]  # the first image's side is everyone's
        except OSError as e:
            raise FastdiffError(f"{file} is no readable image ({e}); take it out of {path}") from e
    classes = sorted({f.parent.name for f in files})
    y = None
    if len(classes) > 1:
        y = torch.tensor([classes.index(f.parent.name) for f in files])
    x = np.stack(rows)
    digest = hashlib.sha256(x.tobytes() + (b"" if y is None else y.numpy().tobytes())).hexdigest()
    return Images(torch.from_numpy(x), y, tuple(classes) if y is not None else (), digest)


def _square(file: Path, size: int | None) -> np.ndarray:
    """The (3, size, size) middle of an image file; without a size, its own shorter side."""
    from PIL import Image

    with Image.open(file) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if size is not None and size != side:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(square, np.uint8).transpose(2, 0, 1)


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    """A permutation of n, which all steps of an epoch share."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_indices(n: int, batch: int, step: int, seed: int) -> Tensor:
    """The indices (batch,) of one step: a fresh seeded permutation an epoch, batches running on across its border.

    A function of (seed, step) alone, so a resumed run sees the same images without any saved state.
    """
    start = step * batch
    rows = []
    while batch:
        epoch, offset = divmod(start, n)
        take = min(batch, n - offset)
        rows.append(_order(n, seed, epoch)[offset : offset + take])
        start, batch = start + take, batch - take
    return torch.cat(rows)
