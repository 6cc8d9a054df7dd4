"""manifest.json: what an engine's folder holds, where it came from, how well it agrees, and how to run it. Read with a check."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import sha256

NAME = "manifest.json"
FORMAT = 1
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
MEANINGS = {
    "noise": "unit normals, draw 0 of each sample's seed; scaled inside",
    "noises": "unit normals, draws 1, 2, ... of each sample's seed",
    "class_labels": "the class of each sample",
    "guidance_scale": "classifier-free guidance: negative + scale (conditional - negative); 1 = none",
    "plan_table": "a row for each call: the denoiser's scalars and the plan's weights (plan.npz holds the exported plan's)",
    "plan_start": "the weights of noise and first draws in each state before the first call",
    "plan_draws": "the place of each row's draws in noises",
    "rtol": "relative tolerance of a step", "atol": "absolute tolerance of a step",
    "nfe": "evaluations made", "finished": "false where the evaluations ran out before the end",
    "x": "samples in the model's data range",
    "images": "samples scaled and cut to [0, 1]",
    "t": "time in the schedule's own units, one a sample",
    "x0": "the denoised prediction, in the model's data range",
}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def tensors(values: Any, ranges: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Inputs or outputs of a graph: name, dtype, shape (a word is a size that may vary), meaning, range where there is one."""
    from onnx import helper

    found = []
    for v in values:
        kind = v.type.tensor_type
        entry: dict[str, Any] = {
            "name": v.name,
            "dtype": str(helper.tensor_dtype_to_np_dtype(kind.elem_type)),
            "shape": [d.dim_param or d.dim_value for d in kind.shape.dim],
            "meaning": MEANINGS.get(v.name, "conditioning of the network"),
        }
        if v.name in ranges:
            entry["range"] = ranges[v.name]
        found.append(entry)
    return found


def signature(model: Any, ranges: dict[str, list[float]]) -> dict[str, Any]:
    return {"inputs": tensors(model.graph.input, ranges), "outputs": tensors(model.graph.output, ranges)}


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file of the folder with its hash and size."""
    return {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in sorted(folder.iterdir()) if p.name != NAME}


def read(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder, after every file it names was found unchanged.

    Raises:
        CheckpointError: no engine there, one of another format, a file that is missing or is not the manifest's.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / NAME).read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has engine format {manifest['format']!r}; this version reads format {FORMAT}")
        entries = {str(name): str(entry["sha256"]) for name, entry in manifest["files"].items()}
    except OSError as e:
        raise CheckpointError(f"{folder} holds no engine ({NAME}: {e.strerror}); make one with `fastdiff export`") from e
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{folder / NAME} is not the manifest of an engine ({type(e).__name__} {e})") from e
    for name, wanted in entries.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}: the engine is not complete; export it again")
        if (found := sha256(path)) != wanted:
            raise CheckpointError(f"{path} has sha256 {found[:16]}..., {NAME} says {wanted[:16]}...: damaged; export it again")
    if not {"sampler.onnx", "network.onnx", "run.py"} <= set(entries):
        raise CheckpointError(f"{folder / NAME} does not name all parts of an engine; export it again")
    return dict(manifest)
