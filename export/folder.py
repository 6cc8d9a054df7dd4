"""`export`: a denoiser and a plan -> a folder that other hosts run. It appears whole, after it proved itself, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..guide import Guided, Wrapped
from ..plans import Plan
from . import manifest as manifests
from .need import need

if TYPE_CHECKING:  # these need onnx, whose absence is one line of `export` and no ImportError
    from .network import Traced
    from .sampler import Contrast

LARGEST = 1_900_000_000  # bytes: a protobuf ends at 2 GB, so the weights of a larger model lie in a file beside it
TEMPLATE = Path(__file__).with_name("standalone.py")


@dataclass(frozen=True)
class Wish:
    """What to make: precision "fp32" or "fp16", target "onnxruntime" or "tensorrt", unrolled or a Loop; the classes' names."""

    precision: str = "fp32"
    target: str = "onnxruntime"
    unroll: bool = False
    class_names: tuple[str, ...] = ()


def write_onnx(folder: Path, denoiser: Denoiser, plan: Plan, wish: Wish) -> dict[str, Any]:
    """The ONNX files, plan and runner in `folder`, compared with the eager sampler; the manifest's content."""
    from . import parity
    from .network import network_model, trace
    from .sampler import contrast_of, sampler_model

    if isinstance(denoiser, Wrapped):
        raise FastdiffError("an engine holds classifier-free guidance alone: no limits, gradients or composed conditions")
    contrast = contrast_of(denoiser) if isinstance(denoiser, Guided) else None
    plain = denoiser.positive if isinstance(denoiser, Guided) else denoiser
    traced = trace(plain, wish.precision, wish.target)
    sampler, columns = sampler_model(traced, plan, contrast, wish.unroll)
    network = network_model(traced)
    for name, model in (("sampler", sampler), ("network", network)):
        _save(model, folder / f"{name}.onnx")
    plan.save(folder / "plan.json")
    shutil.copyfile(TEMPLATE, folder / "run.py")
    inputs = (*traced.conditions, *(contrast.inputs(traced) if contrast else ()))
    figures = parity.check(folder, denoiser, plan, inputs, wish.precision)
    ranges = _ranges(traced, contrast)
    return {
        "opset": traced.opset, "target": wish.target, "precision": wish.precision,
        "form": "unrolled" if wish.unroll else "loop", "table_columns": list(columns.names), "verified": True,
        "parity": figures,
        "sampler": manifests.signature(sampler, ranges), "network": manifests.signature(network, ranges),
    }  # fmt: skip


FORMATS: dict[str, Callable[[Path, Denoiser, Plan, Wish], dict[str, Any]]] = {"onnx": write_onnx}


def export(denoiser: Denoiser, plan: Plan, out: str | Path, wish: Wish | None = None, form: str = "onnx") -> dict[str, Any]:
    """Writes an engine for this denoiser, guided or not, and this plan; the manifest.

    Args:
        denoiser: with a shape; a guided one gives an engine whose scale is an input, its own scale being the default.
        out: a folder that does not exist yet, or is empty.

    Raises:
        FastdiffError: packages missing, a folder in the way, a network, plan or guidance that no engine can hold, or an engine
            that differs from the eager sampler. Nothing is left behind.
    """
    out, wish = Path(out), wish or Wish()
    if form not in FORMATS:
        raise FastdiffError(f"--format is {', '.join(FORMATS)}; given {form!r}")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        need(name)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FastdiffError(f"{out} exists already: choose another --out, or remove it first")
    from .sampler import LONGEST_UNROLLED

    if wish.unroll and plan.nfe > LONGEST_UNROLLED:  # said before the minute that tracing takes
        raise FastdiffError(f"--unroll copies the network for every call: at most {LONGEST_UNROLLED}, given {plan.nfe}")
    folder = _beside(out)
    try:
        made = FORMATS[form](folder, denoiser, plan, wish)
        manifest = {**_origin(denoiser, plan, wish), **made, "files": manifests.files_of(folder)}
        (folder / manifests.NAME).write_text(json.dumps(manifest, indent=1) + "\n")
        os.chmod(folder, 0o755)  # mkdtemp made it private
        os.replace(folder, out)
    except OSError as e:
        raise FastdiffError(f"cannot write {out}: {e.strerror or e}; choose another place or free some space") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _beside(out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as e:
        raise FastdiffError(f"cannot write {out}: {e.strerror or e}; choose another place") from e


def _save(model: Any, path: Path) -> None:
    import onnx

    from .graph import check

    if model.ByteSize() > LARGEST:
        onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    else:
        files.write_bytes(path, model.SerializeToString())
    check(str(path))


def _origin(denoiser: Denoiser, plan: Plan, wish: Wish) -> dict[str, Any]:
    """Where the engine comes from, and how to use it."""
    guidance = None
    if isinstance(denoiser, Guided):
        low, high = denoiser.interval
        interval = [low, None if high == float("inf") else high]
        guidance = {"input": "guidance_scale", "default": denoiser.scale, "network_calls": 2, "interval": interval}
    config = getattr(denoiser.network, "config", None)
    return {
        "format": manifests.FORMAT,
        "versions": manifests.versions(),
        "run": "python run.py --seeds 0-15 --out pictures   (needs onnxruntime and numpy alone)",
        "source": {
            "sha256": denoiser.hash, "prediction": denoiser.prediction, "schedule": denoiser.schedule.config(),
            "shape": list(denoiser.shape or ()), "data_range": list(denoiser.data_range), "classes": list(wish.class_names),
            "num_classes": getattr(config, "num_classes", None), "null_label": getattr(denoiser.network, "null_label", None),
            "training": denoiser.info.get("training"),
        },
        "plan": {
            "name": plan.name, "nfe": plan.nfe, "draws": plan.draws, "order": plan.order, "stochastic": plan.stochastic,
            "start": list(plan.start),
        },
        "guidance": guidance,
    }  # fmt: skip


def _ranges(traced: Traced, contrast: Contrast | None) -> dict[str, list[float]]:
    schedule = traced.denoiser.schedule
    found: dict[str, list[float]] = {"t": [schedule.t_min, schedule.t_max], "images": [0.0, 1.0]}
    for c in (*traced.conditions, *(contrast.inputs(traced) if contrast else ())):
        if c.limits is not None:
            found[c.name] = list(c.limits)
    return found
