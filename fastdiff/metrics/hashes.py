"""Asset files and their sha256 sums: one flat `hashes.json` (file name -> sha256) lies beside the files it covers."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from fastdiff.errors import CheckpointError

FASHION_MNIST = Path(__file__).resolve().parent.parent / "assets" / "fashion_mnist"
HASHES = "hashes.json"


def read_verified(path: Path) -> bytes:
    """The bytes of `path`, after their sha256 was found equal to its entry in the `hashes.json` beside it.

    The file is read once and the very bytes that were hashed are returned, so it cannot change in between.
    Raises CheckpointError where the file, the list or the entry is missing, or the sums differ.
    """
    table = _read_hashes(path.parent)
    if path.name not in table:
        raise CheckpointError(
            f"{path.parent / HASHES} has no entry for {path.name}, so it cannot be trusted; "
            "reinstall fastdiff, or make it with `python -m fastdiff.metrics.train_judge`"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}); reinstall fastdiff") from error
    found = hashlib.sha256(data).hexdigest()
    if found != table[path.name]:
        raise CheckpointError(
            f"{path} has sha256 {found[:16]}..., {HASHES} says {str(table[path.name])[:16]}...: "
            "the file is damaged or was changed; reinstall fastdiff"
        )
    return data


def write_hashed(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file and a rename, and record its sha256 (other entries are kept)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(path, data)
    table = _read_hashes(path.parent) if (path.parent / HASHES).exists() else {}
    table[path.name] = hashlib.sha256(data).hexdigest()
    text = json.dumps(dict(sorted(table.items())), indent=2) + "\n"
    _write_atomically(path.parent / HASHES, text.encode())


def _read_hashes(folder: Path) -> dict[str, str]:
    try:
        table = json.loads((folder / HASHES).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / HASHES} ({error}); reinstall fastdiff") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{folder / HASHES} is not a map of file name -> sha256; reinstall fastdiff")
    return table


def _write_atomically(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp makes it private; assets are for everyone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
