"""What every resumable run needs: its state read safely, and refused where it belongs to other settings."""

from __future__ import annotations

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from .errors import FastdiffError


def read_state(path: Path, *keys: str) -> dict[str, Any]:
    """The dictionary that a run saved, with at least these keys.

    Raises:
        FastdiffError: a file that is damaged, or could run code.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        missing = [key for key in keys if key not in state]
    except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as e:
        raise FastdiffError(f"{path} is damaged ({e}); delete it to start anew") from e
    if missing:
        raise FastdiffError(f"{path} is damaged (it has no {', '.join(missing)}); delete it to start anew")
    return dict(state)


def check_same(out: Path, then: dict[str, Any], now: dict[str, Any], free: Collection[str] = ()) -> None:
    """
    Raises:
        FastdiffError: settings other than `free` differ; the message names them.
    """
    changed = [f"{k} ({then.get(k)} -> {now.get(k)})" for k in {**then, **now} if then.get(k) != now.get(k) and k not in free]
    if changed:
        raise FastdiffError(
            f"{out} holds a run with other settings: {', '.join(changed)}; give the old ones or another --out"
        )
