"""`export`: a denoiser and a plan -> a folder that other hosts run. It appears whole, after it proved itself, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import files
from ..adaptive import Control
from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..guide import Guided, Wrapped
from ..plans import Plan
from . import manifest as manifests
from .need import need
from .tensorrt import FORMS, Settings, build_engines, gpu

if TYPE_CHECKING:  # these need onnx, whose absence is one line of `export` and no ImportError
    from .evaluate import Contrast
    from .network import Traced
    from .parity import Subject

Method = Plan | Control  # a table, or adaptive step size with these tolerances as defaults
LARGEST = 1_900_000_000  # bytes: a protobuf ends at 2 GB, so the weights of a larger model lie in a file beside it
TEMPLATE = Path(__file__).with_name("standalone.py")


@dataclass(frozen=True)
class Wish:
    """What to make.

    Args:
        precision: "fp32", "fp16", "bf16" or "int8"; the sampler's state and norms stay in fp32.
        target: "onnxruntime" or "tensorrt"; by default the format's.
        unroll: a copy of the network for every call instead of a Loop.
        class_names: of the classes, for file names.
        build: how TensorRT builds.
        plan_input: the plan is an input (`planinput`).
        multiple: height and width are any multiples of it; 0: the denoiser's own.
        opset: instead of the target's own.
        decoder: from latents to images in the data range, (batch, *shape) -> (batch, channels, height, width) float32.
        unverified: allow what nothing on this machine can run.
    """

    precision: str = "fp32"
    target: str = ""
    unroll: bool = False
    class_names: tuple[str, ...] = ()
    build: Settings = field(default_factory=Settings)
    plan_input: bool = False
    multiple: int = 0
    opset: int = 0
    unverified: bool = False
    decoder: nn.Module | None = None


def write_onnx(folder: Path, denoiser: Denoiser, plan: Method, wish: Wish) -> tuple[dict[str, Any], Subject]:
    """The ONNX files, plan and runner in `folder`, compared with the eager sampler: the manifest's content, what was compared."""
    from . import parity
    from .evaluate import contrast_of
    from .network import Form, network_model, trace, with_decoder

    if isinstance(denoiser, Wrapped):
        raise FastdiffError("an engine holds classifier-free guidance alone: no limits, gradients or composed conditions")
    form = Form(wish.precision, wish.target or "onnxruntime", wish.opset, wish.multiple)
    contrast = contrast_of(denoiser) if isinstance(denoiser, Guided) else None
    plain = denoiser.positive if isinstance(denoiser, Guided) else denoiser
    traced = trace(plain, form)
    inputs = (*traced.conditions, *(contrast.inputs(traced) if contrast else ()))
    if wish.precision == "int8":
        from .int8 import SEEDS, quantised

        assert isinstance(plan, Plan)
        traced = quantised(traced, parity.with_conditions(denoiser, inputs, len(SEEDS)), plan)
    if wish.decoder is not None:
        traced = with_decoder(traced, wish.decoder)
    sampler, said, fixed = _sampler(folder, traced, plan, contrast, wish)
    network = network_model(traced)
    for name, model in (("sampler", sampler), ("network", network)):
        save(model, folder / f"{name}.onnx")
    if isinstance(plan, Plan):
        plan.save(folder / "plan.json")
    shutil.copyfile(TEMPLATE, folder / "run.py")
    subject = parity.Subject.of(folder, denoiser, plan, inputs, wish, fixed)
    ranges = _ranges(traced, contrast)
    return {
        "opset": traced.opset, "target": form.target, "precision": wish.precision, "multiple": wish.multiple, **said,
        **_verified(folder, subject, wish),
        "sampler": manifests.signature(sampler, ranges), "network": manifests.signature(network, ranges),
    }, subject  # fmt: skip


def _sampler(
    folder: Path, traced: Traced, plan: Method, contrast: Contrast | None, wish: Wish
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The sampler's graph, what the manifest says of it, and the inputs that say which plan, which lie in files beside it."""
    import numpy as np

    if isinstance(plan, Control):
        from .adaptive import adaptive_model

        tolerances = {name: np.array(getattr(plan, name), np.float32) for name in ("rtol", "atol")}
        return adaptive_model(traced, plan, contrast), {"form": "adaptive", "control": asdict(plan)}, tolerances
    from .columns import acts_at, levels_at
    from .network import levels_model
    from .planinput import Layout
    from .sampler import sampler_model
    from .table import compile_table

    layout = Layout.of(plan, contrast is not None) if wish.plan_input else None
    sampler, columns = sampler_model(traced, plan, contrast, wish.unroll, layout)
    said = {"form": "unrolled" if wish.unroll else "loop", "table_columns": list(columns.names)}
    if layout is None:
        return sampler, said, {}
    times = compile_table(plan).t
    low, high = (contrast.low, contrast.high) if contrast else (0.0, float("inf"))
    acts = acts_at(traced.denoiser.schedule, times, low, high)
    arrays: dict[str, Any] = dict(layout.arrays(plan, levels_at(traced.denoiser, times), acts))
    np.savez(folder / "plan.npz", **arrays)
    save(levels_model(traced), folder / "levels.onnx")
    return sampler, {**said, "plan_input": asdict(layout)}, arrays


def _verified(folder: Path, subject: Subject, wish: Wish) -> dict[str, Any]:
    """The gate; or, where nothing here runs this precision and the user knows, that it was not passed."""
    from . import parity

    try:
        (sampler, network), provider = parity.sessions(folder, wish.precision)
    except parity.NoRuntime as e:  # which `export` let through where the user knows
        return {"verified": False, "why": str(e), "parity": {"sampler": [], "network": []}}
    return {"verified": True, "parity": {"provider": provider, **parity.check(sampler, network, subject)}}


def write_tensorrt(folder: Path, denoiser: Denoiser, plan: Method, wish: Wish, form: str) -> tuple[dict[str, Any], Subject]:
    """The ONNX files, proven, and TensorRT's engines of them, proven too where a GPU runs them."""
    from . import native, parity

    made, subject = write_onnx(folder, denoiser, plan, replace(wish, target=wish.target or "tensorrt"))
    record = made["tensorrt"] = build_engines(folder, form, wish.build, wish.precision)
    if record["built"] and gpu() is not None:
        sampler, network = (native.open_engine(folder, made, part) for part in ("sampler", "network"))
        record |= {"executed": True, "why": "", "parity": parity.check(sampler, network, subject)}
    return made, subject


Writer = Callable[[Path, Denoiser, Method, Wish], tuple[dict[str, Any], "Subject"]]
FORMATS: dict[str, Writer] = {"onnx": write_onnx, **{form: partial(write_tensorrt, form=form) for form in FORMS}}


def export(denoiser: Denoiser, plan: Method, out: str | Path, wish: Wish | None = None, form: str = "onnx") -> dict[str, Any]:
    """Writes an engine for this denoiser, guided or not, and this plan; the manifest.

    Args:
        denoiser: with a shape; a guided one gives an engine whose scale is an input, its own scale being the default.
        plan: a Plan; or a Control, for adaptive step size, the same for a whole batch.
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
    _check_wish(plan, wish, form)
    if denoiser.step_counts and wish.plan_input:
        raise FastdiffError("a student of several step counts is told its plan's when it is exported: leave out --plan-input")
    denoiser = denoiser.told_of(plan) if isinstance(plan, Plan) else denoiser
    folder = _beside(out)
    try:
        made, _ = FORMATS[form](folder, denoiser, plan, wish)
        manifest = {**_origin(denoiser, plan, wish), **made, "files": manifests.files_of(folder)}
        (folder / manifests.NAME).write_text(json.dumps(manifest, indent=1) + "\n")
        os.chmod(folder, 0o755)  # mkdtemp made it private
        os.replace(folder, out)
    except OSError as e:
        raise FastdiffError(f"cannot write {out}: {e.strerror or e}; choose another place or free some space") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _check_wish(plan: Method, wish: Wish, form: str) -> None:
    """What cannot be, said before the minute that tracing takes."""
    from .network import Form
    from .parity import NoRuntime, provider_for
    from .sampler import LONGEST_UNROLLED

    target = wish.target or ("onnxruntime" if form == "onnx" else "tensorrt")
    opset = Form(wish.precision, target, wish.opset, wish.multiple).check()
    try:
        provider_for(wish.precision)
    except NoRuntime as e:
        if not wish.unverified:
            raise FastdiffError(f"{e}; --unverified writes the engine all the same") from e
    if target == "tensorrt" and opset >= 23 and not (wish.unroll and wish.precision in ("fp16", "bf16")):
        raise FastdiffError(f"TensorRT has attention as one node (opset {opset}) in fp16 and bf16 and outside of a Loop alone: "
                            "add --unroll and --precision fp16, or leave out --opset")  # fmt: skip
    if isinstance(plan, Control):
        from .adaptive import PAIR

        if given := [name for name, on in (("--unroll", wish.unroll), ("--plan-input", wish.plan_input)) if on]:
            raise FastdiffError(f"an adaptive engine has no plan: leave out {', '.join(given)}")
        plan.check(PAIR)
        if wish.precision == "int8":
            raise FastdiffError("int8 is calibrated along a plan: leave out --adaptive")
        return
    if wish.unroll and wish.plan_input:
        raise FastdiffError("--plan-input needs the Loop: leave out --unroll")
    if wish.unroll and plan.nfe > LONGEST_UNROLLED:
        raise FastdiffError(f"--unroll copies the network for every call: at most {LONGEST_UNROLLED}, given {plan.nfe}")


def _beside(out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as e:
        raise FastdiffError(f"cannot write {out}: {e.strerror or e}; choose another place") from e


def save(model: Any, path: Path) -> None:
    import onnx

    from .graph import check

    if model.ByteSize() > LARGEST:
        onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    else:
        files.write_bytes(path, model.SerializeToString())
    check(str(path))


def _origin(denoiser: Denoiser, plan: Method, wish: Wish) -> dict[str, Any]:
    """Where the engine comes from, and how to use it."""
    guidance = None
    if isinstance(denoiser, Guided):
        low, high = denoiser.interval
        interval = [low, None if high == float("inf") else high]
        guidance = {"input": "guidance_scale", "default": denoiser.scale, "network_calls": 2, "interval": interval,
                    "rescale": denoiser.rescale}  # fmt: skip
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
        "plan": _plan(denoiser, plan),
        "guidance": guidance,
    }  # fmt: skip


def _plan(denoiser: Denoiser, plan: Method) -> dict[str, Any]:
    schedule = denoiser.schedule
    if isinstance(plan, Control):
        start = [float(schedule.alpha(schedule.t_max)), float(schedule.sigma(schedule.t_max))]
        return {"name": "adaptive", "nfe": None, "draws": 0, "order": 3, "stochastic": False, "start": start}
    return {"name": plan.name, "nfe": plan.nfe, "draws": plan.draws, "order": plan.order, "stochastic": plan.stochastic,
            "start": list(plan.start)}  # fmt: skip


def _ranges(traced: Traced, contrast: Contrast | None) -> dict[str, list[float]]:
    schedule = traced.denoiser.schedule
    found: dict[str, list[float]] = {"t": [schedule.t_min, schedule.t_max], "images": [0.0, 1.0]}
    for c in (*traced.conditions, *(contrast.inputs(traced) if contrast else ())):
        if c.limits is not None:
            found[c.name] = list(c.limits)
    return found
