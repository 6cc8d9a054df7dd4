"""A checkpoint written back after training: the layout it came in, with the trained weights in their places."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..files import atomic, write_text
from .weights import TRAINING, read, write

FILE = "model.safetensors"  # what `load` looks for in a folder
OLD = "model_ema."  # Latent Diffusion's second copy of a network: of the weights before
LARGE = (".safetensors", ".bin")


def record(training: Mapping[str, Any]) -> dict[str, str]:
    """What a weights file says of the run that made it; `Weights.training` reads it."""
    return {TRAINING: json.dumps(training, sort_keys=True)}


def in_file(
    path: Path, names: Mapping[str, str], said: Mapping[str, Any], out: Path, network: nn.Module, training: Mapping[str, Any]
) -> None:
    """Writes out/model.safetensors: the tensors of the file at `path`, those of the network replaced by its own.

    Args:
        names: of each tensor in the network's state dict its name in the file.
        said: of the file by its caller or by a JSON beside it; it goes beside the new one.
    """
    target = out / FILE
    before = read(target if target.exists() else path)  # saved once, a run needs its source no more
    tensors = {name: t.clone() for name, t in before.tensors.items() if not name.startswith(OLD)}
    tensors |= {names[name]: value for name, value in network.state_dict().items()}
    if said:
        write_text(target.with_suffix(".json"), json.dumps(dict(said), indent=1) + "\n")
    write(target, tensors, {**before.metadata, **record(training)})


def keep(source: Path, target: Path) -> None:
    """Puts a file of the checkpoint at its place in the new one, unless it is there: weights as a link where that is possible."""
    if target.exists():
        return
    if source.suffix in LARGE:
        with contextlib.suppress(OSError):  # another disk, or one without links
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source.resolve(), target)
            return
    with atomic(target) as temporary:
        shutil.copyfile(source, temporary)
