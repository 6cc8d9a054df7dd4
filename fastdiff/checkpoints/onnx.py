"""An exported engine's network.onnx as a Denoiser, run by ONNX Runtime: so every command that takes a checkpoint runs engines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import CheckpointError
from ..schedule import from_config
from .options import Options

ENGINE = "manifest.json"  # what makes a folder an exported engine


class _Session:
    """Stands where other denoisers have a network: what it can be asked about classes."""

    def __init__(self, num_classes: int | None, null_label: int | None) -> None:
        self.config = SimpleNamespace(num_classes=num_classes)
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
