"""Files appear whole or not at all: written beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import FastdiffError


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed onto it if the block ends well, removed if it does not.

    Raises:
        FastdiffError: the folder cannot be made or written (permission, no space, a file in the way).
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # mkstemp made it private
        os.replace(temporary, path)
    except OSError as e:
        raise FastdiffError(f"cannot write {path}: {e.strerror or e}; choose another place or free some space") from e
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Removes what a process that was killed inside `atomic` left in a folder; nobody may be writing to it."""
    for name in os.listdir(folder):
        if re.fullmatch(r"\..+?(\.\w+)\.[a-z0-9_]{8}\1", name):  # atomic's names: .stem.suffix.8 letters.suffix
            (folder / name).unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def sha256(path: str | Path) -> str:
    """The hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
