"""`fastdiff run`: the pictures of `fastdiff sample`, from an exported engine."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import FastdiffError
from .console import progress_bar, say
from .pictures import check_folder, import_pillow, write_pictures
from .requests import Request, parse_classes, parse_seeds, requests

if TYPE_CHECKING:
    from torch import Tensor

    from ..export.runtime import Ask, Engine


def run(
    engine: Annotated[Path, typer.Argument(help="a folder that `fastdiff export` wrote")],
    seeds: Annotated[str, typer.Option(help="such as 0-15 or 1,2,7; the noise belongs to the seed alone")] = "0-15",
    classes: Annotated[
        str | None, typer.Option(help="numbers, names or all: every seed in each; default: seed mod number of classes")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="guidance scale; default the engine's own")] = None,
    provider: Annotated[str, typer.Option(help="auto, engine (its own TensorRT engine), tensorrt, cuda or cpu")] = "auto",
    plan: Annotated[Path | None, typer.Option(help="another plan.json, for an engine with --plan-input")] = None,
    size: Annotated[str | None, typer.Option(help="such as 32x48, for an engine with --dynamic-size")] = None,
    rtol: Annotated[float | None, typer.Option(help="relative tolerance, for an adaptive engine")] = None,
    atol: Annotated[float | None, typer.Option(help="absolute tolerance, for an adaptive engine")] = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures and grid.png")] = Path("out/run"),
    batch: Annotated[int, typer.Option(min=1, help="samples at once")] = 64,
    scale: Annotated[int, typer.Option(min=1, max=64, help="enlarge every pixel to scale x scale")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of the cpu provider")] = None,
) -> None:
    """Run an engine: the pictures of `fastdiff sample`, one PNG for each seed and class, and grid.png."""
    from ..export.runtime import Ask, Engine
    from ..plans import Plan

    import_pillow()
    check_folder(out)
    ask = Ask(guidance, Plan.load(plan) if plan else None, _size(size), rtol, atol)
    numbers = parse_seeds(seeds)
    loaded = Engine(engine, "sampler", provider, threads)
    names = tuple(loaded.manifest["source"]["classes"])
    for note in loaded.notes:
        say(note)
    wanted = requests(numbers, parse_classes(classes, names), names)
    began = time.perf_counter()
    images = _run(loaded, wanted, batch, ask)
    seconds = time.perf_counter() - began
    columns = len(numbers) if classes is not None else None
    write_pictures(out, {r.file_name: image for r, image in zip(wanted, images, strict=True)}, scale, columns)
    made = ask.plan or loaded.manifest["plan"]
    name, calls = (made.name, made.nfe) if isinstance(made, Plan) else (made["name"], made["nfe"])
    say(
        f"{name}, {calls or loaded.evaluations} evaluations, {loaded.manifest['precision']} on {loaded.provider}: "
        f"{len(wanted)} samples in {seconds:.2f} s -> {out / 'grid.png'}"
    )


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+x\d+", text):
        raise FastdiffError(f"--size is heightxwidth, such as 32x48; given {text!r}")
    height, width = map(int, text.split("x"))
    return height, width


def _run(engine: Engine, wanted: list[Request], batch: int, ask: Ask) -> Tensor:
    """All images (n, C, H, W) uint8; nothing is written before they are."""
    import numpy as np
    import torch

    found = []
    with progress_bar() as bar:
        task = bar.add_task(engine.manifest["plan"]["name"], total=len(wanted))
        for i in range(0, len(wanted), batch):
            part = wanted[i : i + batch]
            labels = [r.label for r in part if r.label is not None]
            made = engine.images([r.seed for r in part], labels or None, ask)
            found.append((made * 255).round().astype(np.uint8))
            bar.advance(task, len(part))
    return torch.from_numpy(np.concatenate(found))
