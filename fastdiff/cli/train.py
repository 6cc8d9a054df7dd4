"""`fastdiff train`: a checkpoint from images, new or going on from one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import CONDITION_HELP, progress_bar, say
from .pictures import check_folder
from .running import interrupts, plot_losses

if TYPE_CHECKING:
    import torch

    from ..checkpoints.conditions import Conditions
    from ..denoiser import Denoiser
    from ..training.config import TrainConfig
    from ..training.data import Images
    from ..training.trainer import Trainer


def train(
    data: Annotated[Path, typer.Option(help=".npz with x/x_train (or latents) and y/y_train, or a folder of images")],
    out: Annotated[Path, typer.Option(help="run folder: a checkpoint (EMA), state.pt, loss.png")],
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps in all; a resumed run may change it")] = 5000,
    batch: Annotated[int, typer.Option(min=1, help="images of a step, of all processes together")] = 64,
    lr: Annotated[float, typer.Option(help="peak learning rate; falls linearly to 0")] = 5e-4,
    warmup: Annotated[int, typer.Option(min=0)] = 200,
    schedule: Annotated[str, typer.Option(help='name, or JSON such as {"name": "flow", "shift": 3}')] = "vp_cosine",
    prediction: Annotated[str, typer.Option(help="eps, x0, v, flow, score, edm or both (x0 and eps)")] = "v",
    weighting: Annotated[str, typer.Option(help="simple, edm or min_snr")] = "simple",
    times: Annotated[str, typer.Option(help="uniform, lognormal or logit_normal")] = "uniform",
    time_scale: Annotated[float, typer.Option(help="the network gets time_scale * t; 0 = t (edm: log-noise)")] = 1000.0,
    ema: Annotated[float, typer.Option(min=0, max=1)] = 0.999,
    label_dropout: Annotated[float, typer.Option(min=0, max=1, help="fraction of labels made the null class")] = 0.1,
    vlb: Annotated[float, typer.Option(min=0, help="learn DDPM's variance too: weight of its bound, usually 0.001")] = 0.0,
    vlb_steps: Annotated[int, typer.Option(min=2, help="steps of the chain whose bound that is")] = 1000,
    clip: Annotated[float, typer.Option(help="largest gradient norm")] = 1.0,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast of the network")] = False,
    seed: int = 0,
    network: Annotated[str, typer.Option(help="JSON of U-Net settings (see fastdiff.models.UNetConfig)")] = "{}",
    source: Annotated[
        str | None, typer.Option("--from", help="a checkpoint to go on from: its network, schedule, prediction and time")
    ] = None,
    condition: Annotated[Path | None, typer.Option(help=f"of --from, 1 row or one an image: {CONDITION_HELP}")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="crop and resize a folder's images to this side")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; exact resuming needs the same")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default cuda where there is one")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="run the network through torch.compile")] = False,
    save_every: Annotated[float, typer.Option(help="seconds between checkpoints")] = 60.0,
) -> None:
    """Train a U-Net, or the network of --from, also under torchrun; the same command goes on where an interrupted run stopped."""
    import torch

    from ..parallel import join
    from ..training.config import TrainConfig
    from ..training.data import load_images
    from ..training.trainer import Trainer
    from .requests import check_device

    if threads:
        torch.set_num_threads(threads)
    named = schedule if schedule.startswith("{") else json.dumps({"name": schedule})
    config = TrainConfig(
        steps, batch, lr, warmup, parse_settings("--schedule", named), prediction, weighting, times, time_scale or None, ema,
        label_dropout, clip, bf16, seed, parse_settings("--network", network), vlb=vlb, vlb_steps=vlb_steps,
    )  # fmt: skip
    check_folder(out)
    images = load_images(data, size, latents=True)
    where = check_device(device or join().device)
    config, start, conditions = beginning(config, source, condition, images, out, where)
    trainer = Trainer(config, images, out, start, conditions, where)
    if compile:
        trainer.compile()
    run(trainer, save_every)
    if trainer.world.first:
        plot_losses(trainer.losses, out / "loss.png")
        written = out / "model.safetensors" if (out / "model.safetensors").exists() else out
        say(f"{written}: {trainer.step} steps, {trainer.step * batch} images")


def beginning(
    config: TrainConfig, source: str | None, condition: Path | None, images: Images, out: Path, where: torch.device
) -> tuple[TrainConfig, Denoiser | None, Conditions | None]:
    """The configuration of a run that begins with `source`, that checkpoint for samples of the images' shape, and what its
    network is told of each image."""
    from ..checkpoints import load
    from ..checkpoints.conditions import read_conditions
    from ..errors import FastdiffError
    from ..training.config import continuing

    if source is None:
        if condition is not None:
            raise FastdiffError("--condition belongs to the network of --from: add it, or leave out --condition")
        return config, None, None
    if config.network:
        raise FastdiffError("--from brings its network: leave out --network")
    if Path(source).resolve() in (out.resolve(), (out / "model.safetensors").resolve()):
        raise FastdiffError(f"--out {out} is the checkpoint of --from, which would be overwritten: choose another folder")
    start = load(source, shape=images.x.shape[1:]).to(where)
    conditions = None if condition is None else read_conditions(condition, start, len(images.x), "image")
    return continuing(config, start, conditions), start, conditions


def run(trainer: Trainer, save_every: float) -> None:
    """Trains to the end with a progress bar; an interrupt ends it after its step."""
    from ..training.trainer import Progress

    steps = trainer.config.steps
    if trainer.step and trainer.world.first:
        say(f"resuming {trainer.out} at step {trainer.step} of {steps}")
    with progress_bar(trainer.world.first) as bar, interrupts() as interrupted:
        task = bar.add_task("train", total=steps, completed=trainer.step)

        def show(p: Progress) -> None:
            bar.update(task, completed=p.step, description=f"loss {p.loss:.4f}  {p.images_per_second:.0f} images/s")
            if trainer.world.any(interrupted()):
                raise KeyboardInterrupt

        trainer.run(show, save_every)


def parse_settings(option: str, text: str) -> dict[str, Any]:
    """The JSON object that an option holds."""
    from ..errors import FastdiffError

    try:
        found = json.loads(text)
    except json.JSONDecodeError as e:
        raise FastdiffError(f"{option} takes JSON: {e}; given {text!r}") from e
    if not isinstance(found, dict):
        raise FastdiffError(f'{option} takes a mapping, a JSON object such as {{"name": value}}; given {text!r}')
    return found
