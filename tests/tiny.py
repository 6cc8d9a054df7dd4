"""Tiny networks, checkpoints and image sets for tests: real formats, a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.checkpoints import native
from fastdiff.models import UNet, UNetConfig

NETWORK: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "model_channels": 32,
    "channel_mult": [1],
    "num_res_blocks": 1,
    "attention": [],
    "head_channels": 32,
    "num_classes": 4,
    "null_class": True,
}


def network(**changes: Any) -> UNet:
    """A U-Net of three classes and "none", with every weight drawn: none of the zeros it would start training from."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(**{**NETWORK, **changes}))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return net.eval().requires_grad_(False)


def description(**changes: Any) -> dict[str, Any]:
    return {
        "network": UNetConfig(**NETWORK).asdict(),
        "schedule": {"name": "vp_cosine"},
        "prediction": "v",
        "time_scale": 1000.0,
        "data_range": [-1, 1],
        "shape": [1, 8, 8],
        "class_names": ["round", "square", "T-bar"],
        **changes,
    }


def checkpoint(path: Path, net: UNet | None = None, **changes: Any) -> Path:
    net = net or network()
    native.save(path, net.state_dict(), description(network=net.config.asdict(), **changes))
    return path


def images(n: int = 24, side: int = 8, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Squares whose brightness and place depend on the class: something a tiny network can learn."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    x = np.zeros((n, side, side), np.uint8)
    for i, label in enumerate(y):
        x[i, label : label + 4, label : label + 4] = 120 + 40 * label + rng.integers(0, 20)
    return x, y


def npz(path: Path, **changes: np.ndarray) -> Path:
    x, y = images()
    np.savez(path, **{"x": x, "y": y, **changes})
    return path
