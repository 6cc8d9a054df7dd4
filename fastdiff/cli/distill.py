"""`fastdiff distill`: a student of few network calls from a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import CHECKPOINT_HELP, progress_bar, say
from .pictures import check_folder
from .running import interrupts, plot_losses
from .train import parse_settings

if TYPE_CHECKING:
    from ..distill import Distiller, Method, Progress
    from ..distill.view import View


def distill(
    out: Annotated[Path, typer.Option(help="run folder: model.safetensors (the latest finished stage), state.pt, loss.png")],
    teacher: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)] = "fashion-mnist",
    method: Annotated[str, typer.Option(help="progressive, guided, trajectory, consistency or ect")] = "progressive",
    steps: Annotated[str, typer.Option(help="network calls of the student; but for consistency and ect several, as 1,2,4")] = "4",
    start: Annotated[int | None, typer.Option(help="progressive, guided: first steps, --steps times a power of two")] = None,
    updates: Annotated[int | None, typer.Option(min=1, help="optimiser steps of each stage")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="images an update, all processes and parts together")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate at the start of each stage; falls linearly to 0")] = None,
    solver: Annotated[str | None, typer.Option(help="solver of the teacher inside a student step")] = None,
    calls: Annotated[int | None, typer.Option(min=1, help="teacher calls inside a student step")] = None,
    weighting: Annotated[str | None, typer.Option(help="truncated, snr+1 or x0 (progressive, guided, consistency)")] = None,
    scales: Annotated[str | None, typer.Option(help="guided, trajectory: lowest and highest guidance scale, such as 1,5")] = None,
    segments: Annotated[int | None, typer.Option(min=0, help="consistency: 1, or 0 for as many as steps")] = None,
    inner: Annotated[int | None, typer.Option(min=1, help="consistency: points in a segment")] = None,
    self_ema: Annotated[float | None, typer.Option(min=0, max=1, help="consistency: decay of what makes the targets")] = None,
    ema: Annotated[float | None, typer.Option(min=0, max=1, help="consistency, ect: decay of the saved average")] = None,
    phases: Annotated[int | None, typer.Option(min=1, help="ect: stages of ever closer pairs")] = None,
    data: Annotated[Path | None, typer.Option(help=".npz or folder of images, where the method needs them")] = None,
    lora: Annotated[int, typer.Option(min=0, help="rank of a LoRA student (peft), saved merged and as an adapter; 0 = full")] = 0,
    guidance: Annotated[float, typer.Option(help="scale that the teacher is guided with; its student needs none")] = 1.0,
    network: Annotated[str | None, typer.Option(help='U-Net settings of another student, such as {"model_channels": 32}')] = None,
    prediction: Annotated[str | None, typer.Option(help="of the student: v, x0 or both; else what the teacher predicts")] = None,
    match_updates: Annotated[int | None, typer.Option(min=1, help="of its first stage: to predict what the teacher does")] = None,
    match_lr: Annotated[float | None, typer.Option(help="learning rate of that stage")] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="parts of a batch on each process: less memory")] = 1,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast; weights stay float32")] = False,
    checkpointing: Annotated[bool, typer.Option(help="compute activations twice: less memory, more time")] = False,
    fsdp: Annotated[bool, typer.Option(help="under torchrun: each process holds a share of every weight (FSDP2)")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default cuda where there is one")] = None,
    view_every: Annotated[int, typer.Option(min=0, help="updates between looks at the student: report.html; 0 = none")] = 0,
    view_n: Annotated[int, typer.Option(min=8, help="samples of a look; KID needs 20")] = 128,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; exact resuming needs the same")] = None,
    save_every: Annotated[float, typer.Option(help="seconds between checkpoints")] = 60.0,
) -> None:
    """Distil a student; it is saved with its plan, so that `fastdiff sample` and `bench` need no flags. Resumes by itself; under
    `torchrun` the processes share each batch."""
    import torch

    from ..checkpoints import load
    from ..distill import Distiller, Settings
    from ..distill.view import View, need_pictures
    from ..parallel import join
    from ..training.data import load_images
    from .requests import check_device

    torch.set_num_threads(threads or torch.get_num_threads())
    given = {**parse_steps(steps), "start": start, "updates": updates, "batch": batch, "lr": lr, "solver": solver, "calls": calls,
             "weighting": weighting, "scales": parse_scales(scales), "segments": segments, "inner": inner, "self_ema": self_ema,
             "ema": ema, "phases": phases}  # fmt: skip
    changes = None if network is None else parse_settings("--network", network)
    recipe = matched(make_method(method, given), changes=changes, predicts=prediction, updates=match_updates, lr=match_lr)
    need_pictures(view_every, fsdp)
    check_folder(out)
    how = Settings(seed, 1.0, accumulate, bf16, checkpointing, lora, guidance, fsdp)
    where = check_device(device or join(fsdp).device)
    run = Distiller(load(teacher), recipe, out, load_images(data) if data else None, how, where)
    follow(run, View(run, view_every, view_n) if view_every and run.world.first else None, save_every)
    tell(run)


def tell(run: Distiller) -> None:
    """loss.png, and a line with the student's file, how many calls it takes, and what runs it."""
    if not run.world.first:
        return
    plot_losses(run.losses, run.out / "loss.png")
    last = run.stages[-1]
    *fewer, most = [plan.nfe for plan in run.method.plans(last, run.source.schedule)] or [last.steps]
    calls, wish = (f"{', '.join(map(str, fewer))} or {most}", " --nfe N") if fewer else (str(most), "")
    made = f"{run.out / 'model.safetensors'}: {run.method.name}, {calls} network calls"
    say(f"{made}; `fastdiff sample {run.out}{wish}` runs it")


def follow(run: Distiller, view: View | None, save_every: float) -> None:
    """Runs to the end, with a progress bar and, where there is a view, looks at the student on the way and a page at the end."""
    total = sum(stage.updates for stage in run.stages)
    if run.world.first and (run.stage or run.update):
        say(f"resuming {run.out} at stage {run.stage + 1} of {len(run.stages)}, update {run.update}")
    with progress_bar(run.world.first) as bar, interrupts() as interrupted:
        task = bar.add_task("distill", total=total)

        def show(p: Progress) -> None:
            done = sum(stage.updates for stage in run.stages[: p.stage]) + p.update
            what = f"{run.stages[p.stage].steps} steps  loss {p.loss:.4f}  {p.images_per_second:.0f} images/s"
            if view is not None and (line := view.look(p, done)):
                say(line)
            bar.update(task, completed=done, description=what)
            if interrupted():  # the run agrees with the other processes
                raise KeyboardInterrupt

        run.run(show, save_every)
    if view is not None:
        say(f"{view.finish()} has the curves, teacher and student side by side")


def parse_steps(text: str) -> dict[str, Any]:
    """ "4" -> the setting steps; "1,2,4" -> the setting counts.

    Raises:
        FastdiffError: not whole numbers; how large they may be is the method's to say.
    """
    from ..errors import FastdiffError

    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise FastdiffError(f"--steps takes a whole number, or several such as 1,2,4; given {text!r}") from e
    return {"steps": counts[0]} if len(counts) == 1 else {"counts": counts}


def parse_scales(text: str | None) -> tuple[float, float] | None:
    """ "1,5" -> (1.0, 5.0).

    Raises:
        FastdiffError: not two numbers; their order is the network's to check.
    """
    from ..errors import FastdiffError

    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as e:
        raise FastdiffError(f"--scales takes the lowest and the highest scale, such as 1,5; given {text!r}") from e
    return low, high


def make_method(name: str, settings: dict[str, Any]) -> Method:
    """The method with those of the settings that are given.

    Raises:
        FastdiffError: an unknown method, or a setting it does not have.
    """
    import dataclasses

    from ..distill import METHODS
    from ..errors import FastdiffError

    if name not in METHODS:
        raise FastdiffError(f"--method must be one of {', '.join(METHODS)}; given {name!r}")
    settings = {k: v for k, v in settings.items() if v is not None}
    known = {f.name for f in dataclasses.fields(METHODS[name]) if not f.name.startswith("_")}  # type: ignore[arg-type]
    names = {"counts": "--steps of several numbers"}
    if unknown := [names.get(k, "--" + k.replace("_", "-")) for k in settings if k not in known]:
        raise FastdiffError(f"method {name} has no setting {', '.join(unknown)}; leave it out")
    if {"counts", "start"} <= settings.keys():
        raise FastdiffError("--start follows from --steps of several numbers: leave it out")
    return METHODS[name](**settings)


def matched(method: Method, **settings: Any) -> Method:
    """The method, behind a stage that makes another network or prediction of the student's its teacher's equal, where asked for.

    Raises:
        FastdiffError: settings of that stage without a student that needs it.
    """
    from ..distill import Match
    from ..errors import FastdiffError

    settings = {k: v for k, v in settings.items() if v is not None}
    if not settings:
        return method
    if not settings.keys() & {"changes", "predicts"}:
        raise FastdiffError("--match-updates and --match-lr belong to a student of another --network or --prediction")
    return Match(method, **settings)
