"""Weights and inputs by rule, the same here and where data/make_peer_networks.py froze what other people's code makes of them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

FILE = Path(__file__).parent / "data" / "peer_networks.json"
SHOWN = 96  # numbers of an output that are kept, evenly over it


def draw(name: str, shape: list[int]) -> np.ndarray:
    """Standard normal numbers that depend on the name alone."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """A state dict: scaled by fan-in, vectors near 1 where they scale and near 0 where they shift."""
    out = {}
    for name, shape in shapes.items():
        value = draw(name, shape) / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1 * draw(name, shape)
        out[name] = torch.tensor(value + (1.0 if len(shape) == 1 and name.endswith("weight") else 0.0), dtype=torch.float32)
    return out


def image(shape: list[int]) -> torch.Tensor:
    return torch.tensor(draw("x", shape), dtype=torch.float32)


def shown(x: torch.Tensor) -> list[float]:
    flat = x.detach().double().flatten()
    return [float(f"{v:.9g}") for v in flat[torch.linspace(0, len(flat) - 1, min(SHOWN, len(flat))).round().long()]]


def cases() -> dict[str, Any]:
    return json.loads(FILE.read_text())["cases"]


def error(found: torch.Tensor, case: dict[str, Any]) -> float:
    """The largest difference to what was frozen, relative to its largest number."""
    mine, theirs = np.array(shown(found)), np.array(case["output"])
    assert list(found.shape) == case["shape"]
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())
