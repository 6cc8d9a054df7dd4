"""`fastdiff export`: solver, guidance and network as one ONNX graph in a folder that other hosts run."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FastdiffError
from ..export.tensorrt import HARDWARE, RANGES, Settings, sized
from ..plans import Plan
from .console import CHECKPOINT_HELP, say
from .requests import class_names
from .sample import NFE, check_guidance, check_together, chosen_plan

if TYPE_CHECKING:
    from ..adaptive import Control


def export(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)],
    out: Annotated[Path, typer.Option(help="a new folder for the engine")],
    solver: Annotated[str | None, typer.Option(help="see `fastdiff solvers`; default the tuned plan, or auto")] = None,
    nfe: Annotated[int | None, typer.Option(min=1, help=f"evaluations of the denoiser; default {NFE}")] = None,
    grid: Annotated[str | None, typer.Option(help="time grid; default the solver's recommended one")] = None,
    end: Annotated[str | None, typer.Option(help="zero (clean data, default) or sigma_min")] = None,
    plan: Annotated[Path | None, typer.Option(help="a saved plan.json, instead of solver, nfe, grid and end")] = None,
    force: Annotated[bool, typer.Option("--force", help="use a plan tuned for another checkpoint or guidance")] = False,
    plan_input: Annotated[bool, typer.Option("--plan-input", help="the plan becomes an input: one engine runs many")] = False,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="adaptive step size, one for the batch")] = False,
    rtol: Annotated[float | None, typer.Option(help="relative tolerance of --adaptive, an input; default 0.01")] = None,
    atol: Annotated[float | None, typer.Option(help="absolute tolerance of --adaptive, an input; default 0.01")] = None,
    guidance: Annotated[
        float, typer.Option(min=0, help="other than 1: the scale becomes an input with this default, a call costs two")
    ] = 1.0,
    dynamic_size: Annotated[int, typer.Option(min=0, help="height and width become any multiples of this; 0: fixed")] = 0,
    form: Annotated[str, typer.Option("--format", help="onnx, tensorrt or tensorrt-rtx")] = "onnx",
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16 or int8; norms and the sampler's state stay fp32")] = "fp32",
    unverified: Annotated[bool, typer.Option("--unverified", help="write what nothing on this machine can run")] = False,
    target: Annotated[str | None, typer.Option(help="onnxruntime (opset 20), tensorrt (21); default the format's")] = None,
    opset: Annotated[int, typer.Option(help="instead of the target's own")] = 0,
    unroll: Annotated[bool, typer.Option("--unroll", help="up to 8 calls without a Loop, for hosts with CUDA graphs")] = False,
    profile: Annotated[str | None, typer.Option(help="TensorRT: smallest, usual, largest batch; default 1,4,16")] = None,
    hardware: Annotated[str | None, typer.Option(help=f"TensorRT: GPUs an engine serves, of {', '.join(HARDWARE)}")] = None,
    capabilities: Annotated[str | None, typer.Option(help="TensorRT for RTX: GPUs to build for, such as SM86,SM120")] = None,
    version_compatible: Annotated[bool, typer.Option("--version-compatible", help="TensorRT: later versions run it too")] = False,
    refit: Annotated[bool, typer.Option("--refit", help="TensorRT: weights can be replaced in a built engine")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of the comparison with the eager sampler")] = None,
) -> None:
    """Write an engine: sampler.onnx (noise to images), network.onnx (one evaluation), plan, manifest, and a runner."""
    import torch

    from ..adaptive import Control
    from ..checkpoints import load
    from ..export.folder import Wish
    from ..export.folder import export as write
    from .plans import guided

    if threads:
        torch.set_num_threads(threads)
    fixed = {"--solver": solver, "--nfe": nfe, "--grid": grid, "--end": end}
    check_together(fixed, {"--rtol": rtol, "--atol": atol}, plan, adaptive)
    build = _settings(form, profile, hardware, capabilities, version_compatible, refit)
    denoiser = load(checkpoint)
    check_guidance(denoiser, guidance)
    if dynamic_size and denoiser.shape:
        build = sized(build, denoiser.shape, dynamic_size)
    tolerances: dict[str, Any] = {name: v for name, v in (("rtol", rtol), ("atol", atol)) if v is not None}
    chosen = Control(**tolerances) if adaptive else chosen_plan(denoiser, plan, fixed, guidance, force)
    names = class_names(denoiser, checkpoint)
    wish = Wish(precision, target or "", unroll, names, build, plan_input, dynamic_size, opset, unverified)
    began = time.perf_counter()
    manifest = write(guided(denoiser, guidance), chosen, out, wish, form)
    _report(manifest, chosen, time.perf_counter() - began, out)


def _report(manifest: dict[str, Any], chosen: Plan | Control, seconds: float, out: Path) -> None:
    figures = [found["max"] for part in ("sampler", "network") for found in manifest["parity"][part]]
    how = f"within {max(figures):.1g} of the eager sampler" if figures else f"NOT VERIFIED ({manifest['why']})"
    auto = chosen.provenance.get("auto") if isinstance(chosen, Plan) else None
    plan = manifest["plan"]
    calls = f"{plan['nfe']} evaluations" if plan["nfe"] else "as many evaluations as it takes"
    say(
        f"{auto or plan['name']}, {calls}, {manifest['precision']}, opset {manifest['opset']}: {how} ({seconds:.0f} s) -> {out}; "
        f"`fastdiff run {out}` or `python {out / 'run.py'}` makes images"
    )
    if record := manifest.get("tensorrt"):
        say(record["why"] or "the TensorRT engines agree too")


def _settings(
    form: str, profile: str | None, hardware: str | None, capabilities: str | None, version_compatible: bool, refit: bool
) -> Settings:
    """How TensorRT builds; none of it is ignored where another format is asked for."""
    given = {"--profile": profile, "--hardware": hardware, "--capabilities": capabilities,
             "--version-compatible": version_compatible, "--refit": refit}  # fmt: skip
    if not form.startswith("tensorrt") and (idle := [name for name, value in given.items() if value]):
        raise FastdiffError(f"{', '.join(idle)} only acts with --format tensorrt or tensorrt-rtx; given {form}")
    if profile is not None and not re.fullmatch(r"\d+,\d+,\d+", profile):
        raise FastdiffError(f"--profile is smallest,usual,largest, such as 1,4,16; given {profile!r}")
    low, usual, high = map(int, (profile or "1,4,16").split(","))
    names = tuple(name.strip().upper() for name in (capabilities or "").split(",") if name.strip())
    return Settings({**RANGES, "batch": (low, usual, high)}, hardware or "own", version_compatible, refit, capabilities=names)
