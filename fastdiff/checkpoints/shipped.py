"""The model that comes with the package, and the hashes that tie its files together."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import CheckpointError
from ..files import sha256

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = {"fashion-mnist": ASSETS / "fashion_mnist"}
CLASS_NAMES = {
    "fashion-mnist": (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
    )
}  # fmt: skip


def shipped_path(name: str) -> Path:
    """The checkpoint file of a shipped model, checked against the recorded hash.

    Raises:
        CheckpointError: the file is missing or is not the one that was released.
    """
    folder = SHIPPED[name]
    path = folder / "model.safetensors"
    try:
        expected = json.loads((folder / "hashes.json").read_text()).get("model.safetensors")
        actual = sha256(path)
    except OSError as e:
        raise CheckpointError(f"the shipped model {name} is missing ({e.filename}); reinstall fastdiff") from e
    except (json.JSONDecodeError, AttributeError) as e:
        raise CheckpointError(f"{folder / 'hashes.json'} is damaged; reinstall fastdiff") from e
    if actual != expected:
        raise CheckpointError(
            f"{path} is not the file that was released (sha256 {actual[:12]}..., expected {str(expected)[:12]}...); "
            "reinstall fastdiff"
        )
    return path
