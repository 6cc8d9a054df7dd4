"""Networks that are not fastdiff's own, in fastdiff's own files: students of teachers from other libraries, or of Python classes.

The description is `native`'s, with a "layout": which library's network it is, and what its loader needs beside the network's
configuration. A network that was never read from a file has the layout "python": who loads it gives a denoiser of the same kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import CheckpointError
from . import diffusers, edm, native
from .build import fit
from .options import Options
from .weights import Weights

LAYOUT, PYTHON = "layout", "python"
Rebuild = Callable[[dict[str, Any], Weights, Options], Denoiser]
LAYOUTS: dict[str, Rebuild] = {"diffusers": diffusers.rebuilt, "EDM": edm.rebuilt}


def by_class(denoiser: Denoiser) -> bool:
    """Whether no file describes its network, so that a copy of it is needed to load weights into."""
    layout = denoiser.info.get(LAYOUT)
    return layout["name"] == PYTHON if layout else "schedule" not in denoiser.info


def described(denoiser: Denoiser) -> dict[str, Any]:
    """What a file says of a denoiser whose network is not fastdiff's own, beside its prediction."""
    kind = type(denoiser.network)
    layout = denoiser.info.get(LAYOUT) or {"name": PYTHON, "class": f"{kind.__module__}.{kind.__qualname__}"}
    return {
        LAYOUT: layout, "network": denoiser.info.get("network"), "schedule": denoiser.schedule.config(),
        "shape": list(denoiser.shape or ()), "data_range": list(denoiser.data_range),
    }  # fmt: skip


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The state dict, a tensor that shares its memory with an earlier one copied: such files do not hold two names for one."""
    seen: set[int] = set()
    found = {}
    for name, value in network.state_dict().items():
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in seen else value
        seen.add(place)
    return found


def recognise(weights: Weights) -> bool:
    return native.recognise(weights) and LAYOUT in native.described(weights)


def from_weights(weights: Weights, options: Options) -> Denoiser:
    """The denoiser of such a file, with the plans it ships with.

    Raises:
        CheckpointError: a layout that is not known; a Python class without `like`; weights or schedule that do not fit.
    """
    path, description = weights.paths[0], native.described(weights)

    def make() -> Denoiser:
        name = description[LAYOUT]["name"]
        if name != PYTHON and name not in LAYOUTS:
            raise CheckpointError(f"{path}: layout {str(name)[:60]!r} is not known; {', '.join((*LAYOUTS, PYTHON))} are")
        made = (_like if name == PYTHON else LAYOUTS[name])(description, weights, options)
        made = made.with_network(made.network, description["prediction"])
        made.info = description
        native.attach_plans(made, description)
        return made

    return native.guarded(path, make)


def _like(description: dict[str, Any], weights: Weights, options: Options) -> Denoiser:
    """A copy of the denoiser that the caller gave, with the file's weights in its network."""
    path, like = weights.paths[0], options.like
    if like is None or not isinstance(like.network, nn.Module):
        raise CheckpointError(f"{path}: its network is a {description[LAYOUT].get('class')}, which no file describes: give "
                              "like=, a Denoiser of the same network, such as its teacher")  # fmt: skip
    if like.schedule.config() != description["schedule"]:
        raise CheckpointError(f"{path}: it was made on schedule {description['schedule']}, like= has {like.schedule.config()}")
    network = copy.deepcopy(like.network).requires_grad_(False).eval()
    fit(network, weights.tensors, path, options.dtype)
    made = like.with_network(network)
    made.hash = weights.hash
    return made
