"""`fastdiff export`: solver, guidance and network as one ONNX graph in a folder that other hosts run."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import FastdiffError
from ..export.tensorrt import HARDWARE, Settings
from .console import CHECKPOINT_HELP, say
from .requests import class_names
from .sample import NFE, check_guidance, check_together, chosen_plan


def export(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)],
    out: Annotated[Path, typer.Option(help="a new folder for the engine")],
    solver: Annotated[str | None, typer.Option(help="see `fastdiff solvers`; default the tuned plan, or auto")] = None,
    nfe: Annotated[int | None, typer.Option(min=1, help=f"evaluations of the denoiser; default {NFE}")] = None,
    grid: Annotated[str | None, typer.Option(help="time grid; default the solver's recommended one")] = None,
    end: Annotated[str | None, typer.Option(help="zero (clean data, default) or sigma_min")] = None,
    plan: Annotated[Path | None, typer.Option(help="a saved plan.json, instead of solver, nfe, grid and end")] = None,
    force: Annotated[bool, typer.Option("--force", help="use a plan tuned for another checkpoint or guidance")] = False,
    guidance: Annotated[
        float, typer.Option(min=0, help="other than 1: the scale becomes an input with this default, a call costs two")
    ] = 1.0,
    form: Annotated[str, typer.Option("--format", help="onnx, tensorrt or tensorrt-rtx")] = "onnx",
    precision: Annotated[str, typer.Option(help="fp32, or fp16 with norms and the sampler's state in fp32")] = "fp32",
    target: Annotated[str | None, typer.Option(help="onnxruntime (opset 20), tensorrt (21); default the format's")] = None,
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

    from ..checkpoints import load
    from ..export.folder import Wish
    from ..export.folder import export as write
    from .plans import guided

    if threads:
        torch.set_num_threads(threads)
    fixed = {"--solver": solver, "--nfe": nfe, "--grid": grid, "--end": end}
    check_together(fixed, {}, plan, False)
    build = _settings(form, profile, hardware, capabilities, version_compatible, refit)
    denoiser = load(checkpoint)
    check_guidance(denoiser, guidance)
    chosen = chosen_plan(denoiser, plan, fixed, guidance, force)
    wish = Wish(precision, target or "", unroll, class_names(denoiser, checkpoint), build)
    began = time.perf_counter()
    manifest = write(guided(denoiser, guidance), chosen, out, wish, form)
    worst = max(found["max"] for part in ("sampler", "network") for found in manifest["parity"][part])
    say(
        f"{chosen.provenance.get('auto', chosen.name)}, {chosen.nfe} evaluations, {precision}, opset {manifest['opset']}: within "
        f"{worst:.1g} of the eager sampler ({time.perf_counter() - began:.0f} s) -> {out}; `fastdiff run {out}` or "
        f"`python {out / 'run.py'}` makes images"
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
    return Settings({"batch": (low, usual, high)}, hardware or "own", version_compatible, refit, capabilities=names)
