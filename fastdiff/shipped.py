"""The files that come with the package, tied together by their sha256: one `hashes.json` (name -> hash) lies beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .errors import CheckpointError
from .files import write_bytes, write_text

ASSETS = Path(__file__).resolve().parent / "assets"
FASHION_MNIST = ASSETS / "fashion_mnist"
STUDENT = FASHION_MNIST / "student"
SHIPPED = {"fashion-mnist": FASHION_MNIST, "fashion-mnist-student": STUDENT}
CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CLASS_NAMES = dict.fromkeys(SHIPPED, CLOTHES)
HASHES = "hashes.json"


def read_verified(path: Path) -> bytes:
    """The bytes of `path`, after their sha256 was found equal to its entry in the `hashes.json` beside it.

    The file is read once and the very bytes that were hashed are returned, so it cannot change in between.

    Raises:
        CheckpointError: the file, the list or the entry is missing, or the hashes differ.
    """
    table = _read_hashes(path.parent)
    if path.name not in table:
        raise CheckpointError(f"{path.parent / HASHES} has no entry for {path.name}, so it cannot be trusted; reinstall fastdiff")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"cannot read {path} ({e.strerror}); reinstall fastdiff") from e
    found = hashlib.sha256(data).hexdigest()
    if found != table[path.name]:
        raise CheckpointError(
            f"{path} has sha256 {found[:16]}..., {HASHES} says {str(table[path.name])[:16]}...: "
            "the file is damaged or was changed; reinstall fastdiff"
        )
    return data


def write_hashed(path: Path, data: bytes) -> None:
    """Writes `data` to `path` whole or not at all, and records its sha256 (other entries are kept)."""
    write_bytes(path, data)
    table = _read_hashes(path.parent) if (path.parent / HASHES).exists() else {}
    table[path.name] = hashlib.sha256(data).hexdigest()
    write_text(path.parent / HASHES, json.dumps(dict(sorted(table.items())), indent=2) + "\n")


def shipped_path(name: str) -> Path:
    """The checkpoint file of a shipped model, after its hash was found right.

    Raises:
        CheckpointError: the file is missing or is not the one that was released.
    """
    path = SHIPPED[name] / "model.safetensors"
    read_verified(path)
    return path


def _read_hashes(folder: Path) -> dict[str, str]:
    try:
        table = json.loads((folder / HASHES).read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read {folder / HASHES} ({e}); reinstall fastdiff") from e
    if not isinstance(table, dict):
        raise CheckpointError(f"{folder / HASHES} is not a map of file name -> sha256; reinstall fastdiff")
    return table
