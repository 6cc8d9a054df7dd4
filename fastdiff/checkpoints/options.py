"""What the caller may say of a checkpoint that its file does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..denoiser import Denoiser
from ..errors import CheckpointError
from .weights import read_json


@dataclass(frozen=True)
class Options:
    """shape: of one sample, where the checkpoint leaves it open; dtype: of the weights, None = as stored; config: `described`;
    like: a denoiser of the same network, where no file describes it."""

    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = torch.float32
    config: Mapping[str, Any] = field(default_factory=dict)
    like: Denoiser | None = None

    def described(self, path: Path) -> dict[str, Any]:
        """What is said of a file that cannot say it: `config`, over the JSON of the same name beside the file."""
        beside = path.with_suffix(".json")
        return {**(read_json(beside) if beside.is_file() else {}), **self.config}


def needed(package: str, what: str, install: str = "fastdiff[diffusers]") -> None:
    """
    Raises:
        CheckpointError: an optional package is missing; the line says how to install it.
    """
    if find_spec(package) is None:
        raise CheckpointError(f"{what} need the {package} package: pip install '{install}'")
