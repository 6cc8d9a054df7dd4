"""`fastdiff distill`: a student of few network calls from a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import CHECKPOINT_HELP, progress_bar, say
from .pictures import check_folder
from .running import interrupts, plot_losses

if TYPE_CHECKING:
    from ..distill import Method


def distill(
    out: Annotated[Path, typer.Option(help="run folder: model.safetensors (the latest finished stage), state.pt, loss.png")],
    teacher: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)] = "fashion-mnist",
    method: Annotated[str, typer.Option(help="progressive (halves the steps, needs --data) or trajectory")] = "progressive",
    steps: Annotated[int, typer.Option(min=1, help="network calls of the student")] = 4,
    start: Annotated[int | None, typer.Option(help="progressive: the teacher's steps, --steps times a power of two")] = None,
    updates: Annotated[int | None, typer.Option(min=1, help="optimiser steps of each stage")] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate at the start of each stage; falls linearly to 0")] = None,
    solver: Annotated[str | None, typer.Option(help="solver of the teacher inside a student step")] = None,
    calls: Annotated[int | None, typer.Option(min=1, help="teacher calls inside a student step")] = None,
    weighting: Annotated[str | None, typer.Option(help="progressive: truncated, snr+1 or x0")] = None,
    data: Annotated[Path | None, typer.Option(help=".npz or folder of images, where the method needs them")] = None,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; exact resuming needs the same")] = None,
    save_every: Annotated[float, typer.Option(help="seconds between checkpoints")] = 60.0,
) -> None:
    """Distil a student; it is saved with its plan, so that `fastdiff sample` and `bench` need no flags. Resumes by itself."""
    import torch

    from ..checkpoints import load
    from ..distill import Distiller, Progress
    from ..training.data import load_images

    if threads:
        torch.set_num_threads(threads)
    given = {"steps": steps, "start": start, "updates": updates, "batch": batch, "lr": lr, "solver": solver, "calls": calls,
             "weighting": weighting}  # fmt: skip
    recipe = make_method(method, {k: v for k, v in given.items() if v is not None})
    check_folder(out)
    run = Distiller(load(teacher), recipe, out, load_images(data) if data else None, seed)
    total = sum(stage.updates for stage in run.stages)
    if run.stage or run.update:
        say(f"resuming {out} at stage {run.stage + 1} of {len(run.stages)}, update {run.update}")
    with progress_bar() as bar, interrupts() as interrupted:
        task = bar.add_task("distill", total=total)

        def show(p: Progress) -> None:
            done = sum(stage.updates for stage in run.stages[: p.stage]) + p.update
            what = f"{run.stages[p.stage].steps} steps  loss {p.loss:.4f}  {p.images_per_second:.0f} images/s"
            bar.update(task, completed=done, description=what)
            if interrupted():
                raise KeyboardInterrupt

        student = run.run(show, save_every)
    plot_losses(run.losses, out / "loss.png")
    assert student.plan is not None
    say(f"{out / 'model.safetensors'}: {method}, {student.plan.nfe} network calls; `fastdiff sample {out}` runs it")


def make_method(name: str, settings: dict[str, Any]) -> Method:
    """The method with its settings.

    Raises:
        FastdiffError: an unknown method, or a setting it does not have.
    """
    import dataclasses

    from ..distill import METHODS
    from ..errors import FastdiffError

    if name not in METHODS:
        raise FastdiffError(f"--method must be one of {', '.join(METHODS)}; given {name!r}")
    known = {f.name for f in dataclasses.fields(METHODS[name]) if not f.name.startswith("_")}  # type: ignore[arg-type]
    if unknown := [k for k in settings if k not in known]:
        raise FastdiffError(f"method {name} has no setting {', '.join('--' + k for k in unknown)}; leave it out")
    return METHODS[name](**settings)
