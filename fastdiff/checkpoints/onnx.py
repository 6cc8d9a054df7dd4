"""ONNX files as checkpoints, run by ONNX Runtime: an exported engine's folder, and a network alone in a bare `.onnx`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import CheckpointError
from ..files import sha256
from ..models.labelled import Labelled
from ..schedule import from_config
from . import native
from .onnx_network import OnnxNetwork
from .options import Options
from .weights import listed

ENGINE = "manifest.json"  # what makes a folder an exported engine
SETTINGS = ("schedule", "prediction", "time_scale", "data_range", "shape", "inputs", "num_classes", "null_class", "class_names")
EXAMPLE = '{"schedule": "vp_linear", "prediction": "eps", "time_scale": 999}'


class _Session:
    """Stands where other denoisers have a network: what it can be asked about classes."""

    def __init__(self, num_classes: int | None, null_label: int | None) -> None:
        self.config = Labelled(num_classes)
        self.null_label = null_label

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        raise TypeError("an engine's network holds the prediction's conversion: call the denoiser")


class EngineDenoiser(Denoiser):
    """A denoiser whose (x, t) -> x0 is one call of network.onnx; t reaches it in float64. No gradients; tensors stay where the
    engine's provider computes."""

    engine: Any
    names: tuple[str, ...]

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        times = t.double() if isinstance(t, Tensor) else torch.full((len(x),), t, dtype=torch.float64)
        feed = {"x": x.detach().float(), "t": times}
        for name in self.names:
            if name not in self.cond:
                raise CheckpointError(f"this engine asks for {name}: bind it first (one a sample)")
            feed[name] = torch.as_tensor(self.cond[name])
        return self.engine.evaluate(feed, x.shape).to(x)

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)


def recognise(path: Path) -> bool:
    """Whether a folder holds an exported engine."""
    return (path / ENGINE).is_file()


def load(folder: Path, options: Options) -> EngineDenoiser:
    """The denoiser of an engine's folder, every file's hash checked. Its `hash` is that of the checkpoint it was made from, so
    plans tuned for one serve the other.

    Raises:
        CheckpointError: a damaged engine, or one of another format.
        FastdiffError: onnxruntime is missing.
    """
    from ..export.runtime import Engine

    engine = Engine(folder, "network")
    source = engine.manifest["source"]
    try:
        denoiser = EngineDenoiser(
            _Session(source["num_classes"], source["null_label"]), from_config(source["schedule"]), source["prediction"],
            shape=source["shape"], data_range=tuple(source["data_range"]),
        )  # fmt: skip
        denoiser.hash = str(source["sha256"])
        denoiser.info = {"class_names": source["classes"], "engine": engine.provider, "training": source.get("training") or {}}
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{folder}: its manifest describes no denoiser ({type(e).__name__} {e}); export it again") from e
    denoiser.engine, denoiser.names = engine, tuple(n for n in engine.inputs if n not in ("x", "t"))
    return denoiser


def from_file(path: Path, options: Options) -> Denoiser:
    """The denoiser of a network in one `.onnx`: schedule and prediction come from `config` or the JSON beside it.

    Raises:
        CheckpointError: nothing said of schedule or prediction, or something unknown; a graph whose inputs cannot be told apart.
        FastdiffError: onnxruntime is missing, or cannot open the file.
    """
    from ..export.runtime import session

    said = options.described(path)
    if unknown := sorted(set(said) - set(SETTINGS)):
        raise CheckpointError(f"{path}: settings {listed(unknown)} are not known here; {', '.join(SETTINGS)} are")
    if missing := [name for name in ("schedule", "prediction") if name not in said]:
        raise CheckpointError(
            f"{path} does not say its {' and '.join(missing)}: put them into {path.with_suffix('.json').name}, such as {EXAMPLE}"
        )
    opened, provider = session(path)
    network = native.guarded(path, lambda: _network(opened, said))
    schedule = {"name": said["schedule"]} if isinstance(said["schedule"], str) else said["schedule"]
    shape = _shape(network.shape, options.shape or said.get("shape"), path)
    description = {"data_range": [-1, 1], **said, "shape": shape, "schedule": schedule}
    denoiser = native.guarded(path, lambda: native.assemble(network, from_config(schedule), description))
    denoiser.hash = sha256(path)
    denoiser.info = {**description, "format": "ONNX", "engine": provider}
    return denoiser


def _shape(declared: Sequence[int | str], asked: Any, path: Path) -> list[int]:
    """One sample's shape: the graph's own, or the one asked for where the graph leaves it open."""
    shape, sides = declared if asked is None else asked, ", ".join(map(str, declared))
    if not isinstance(shape, list | tuple) or not all(isinstance(side, int) for side in shape):
        raise CheckpointError(f'{path} takes samples of {sides}: say which in numbers (shape=, or "shape" in its JSON)')
    if len(shape) != len(declared) or any(isinstance(side, int) and side != n for side, n in zip(declared, shape, strict=True)):
        raise CheckpointError(f"{path} takes samples of {sides}; asked for shape {', '.join(map(str, shape))[:120]}")
    return list(shape)


def _network(session: Any, said: Mapping[str, Any]) -> OnnxNetwork:
    network = OnnxNetwork(session, said.get("inputs") or {})
    classes = said.get("num_classes")
    if not (classes is None or (isinstance(classes, int) and classes > 0)):
        raise CheckpointError(f"num_classes must be a positive whole number, the null class counted; given {str(classes)[:60]!r}")
    network.config.num_classes = classes
    network.null_label = classes - 1 if classes and said.get("null_class") else None
    return network
