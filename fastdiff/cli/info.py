"""`fastdiff info` and `fastdiff solvers`: what is here, what it can do, and what a checkpoint says of itself."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import CHECKPOINT_HELP, console, say

OPTIONAL = (
    "numpy", "safetensors", "triton", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "diffusers", "matplotlib",
    "PIL", "scipy", "sklearn",
)  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="machine-readable, one object")]


def solvers(
    name: Annotated[str | None, typer.Argument(help="a solver, by any name people know: its options and aliases too")] = None,
    as_json: Json = False,
) -> None:
    """List every solver with its order, cost and recommended grid; with a name, all that is known of that one."""
    from ..solvers import list_solvers
    from ..solvers.registry import find
    from . import solver_table

    chosen = list(list_solvers().values()) if name is None else [find(name)]
    entries = {s.name: solver_table.entry(s) for s in chosen}
    if as_json:
        typer.echo(json.dumps(entries, indent=1))
        return
    if name is not None:
        for solver, entry in entries.items():
            console.print(solver, style="bold", highlight=False)
            for key, value in entry.items():
                if value != "":
                    console.print(f"  {key}: {_plain(value)}", markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(*solver_table.COLUMNS, box=None)
    for s in chosen:
        table.add_row(*solver_table.cells(s))
    table.columns[0].no_wrap = table.columns[4].no_wrap = True
    console.print(table, markup=False)
    say(f"{solver_table.LEGEND}; `fastdiff solvers NAME` has options and aliases")


def info(
    checkpoint: Annotated[str | None, typer.Argument(help=CHECKPOINT_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Show versions, devices and optional packages; with a checkpoint, what it is and how it was trained."""
    found = {"fastdiff": _environment()}
    if checkpoint is not None:
        found["checkpoint"] = _checkpoint(checkpoint)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for title, entries in found.items():
        table = Table(box=None, show_header=False, title=title, title_justify="left")
        for key, value in entries.items():
            table.add_row(key, _plain(_by_value(value) if key == "kernels" else value))
        table.columns[0].no_wrap, table.columns[1].overflow = True, "fold"  # a hash is shown whole
        console.print(table, markup=False)


def _environment() -> dict[str, Any]:
    import torch

    from .. import __version__, ops
    from ..checkpoints import SHIPPED
    from ..variants import has_bf16

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    versions = _versions()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {'with' if has_bf16() else 'without'} instructions for bfloat16",
        "cuda": [torch.cuda.get_device_name(i) for i in range(count)],
        "kernels": ops.backends(),
        "installed": {name: version for name, version in versions.items() if version},
        "not installed": [name for name, version in versions.items() if not version],
        "shipped models": list(SHIPPED),
    }


def _versions() -> dict[str, str | None]:
    """The version of what each module is part of, never imported; None where it is not installed."""
    owners = metadata.packages_distributions()  # once: it reads all that is installed
    known = {name: metadata.version(owners[name][0]) for name in OPTIONAL if name in owners}
    return {name: known.get(name, "of unknown version") if find_spec(name) else None for name in OPTIONAL}


def _checkpoint(name: str) -> dict[str, Any]:
    from torch.nn import Module

    from ..checkpoints import load
    from ..checkpoints.conditions import wanted
    from ..models.unet import count_parameters
    from .requests import class_names

    denoiser = load(name)
    return {
        "path": name,
        "format": form if isinstance(form := denoiser.info.get("format"), str) else "fastdiff",  # ours have a number
        "shape": list(denoiser.shape or ()),
        "parameters": count_parameters([network]) if isinstance(network := denoiser.network, Module) else None,
        "prediction": denoiser.prediction,
        "schedule": _short(denoiser.schedule.config()),
        "variance": denoiser.info.get("variance"),
        "data range": list(denoiser.data_range),
        "classes": list(class_names(denoiser, name)),
        "decoder": None if denoiser.decoder is None else str(getattr(denoiser.decoder, "name", "yes")),
        "prompts": denoiser.encode is not None,
        "conditions": list(wanted(denoiser)),
        "plan": None if denoiser.plan is None else f"{denoiser.plan.name}, {denoiser.plan.nfe} calls",
        "step counts": list(denoiser.step_counts),
        "network": _short(denoiser.info.get("network")),
        "training": _short(denoiser.info.get("training")),
        "sha256": denoiser.hash,
    }


def _short(value: Any) -> Any:
    """The same with long tables, such as a discrete schedule's, cut to their ends."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list | tuple) and len(value) > 40:
        ends = f", {value[0]:.6g} to {value[-1]:.6g}" if isinstance(value[0], float) else ""
        return f"{len(value)} entries{ends}"
    return value


def _by_value(entries: dict[str, str]) -> list[str]:
    """What runs the same way is said once."""
    return [f"{', '.join(k for k, v in entries.items() if v == value)}: {value}" for value in dict.fromkeys(entries.values())]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "none" if value is None else str(value)
