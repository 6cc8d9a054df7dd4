"""`fastdiff sample`: images from a checkpoint, as a sheet of pictures, or streamed to a folder in any number."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FastdiffError
from ..parallel import World, join
from ..streaming import Batches, Layout, Npz, Pictures, Request, Stream, Work
from .console import CHECKPOINT_HELP, CONDITION_HELP, progress_bar, say
from .methods import Made, Maker, by_adaptive_steps, by_plan, latent
from .pictures import check_folder, import_pillow, png, write_pictures
from .requests import check_device, class_names, conditioned, in_turn, parse_classes, parse_seeds, requests, varied

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..plans import Plan

SOLVER, NFE = "unipc-2", 10  # the solver where only a grid or an end is given
SEEDS, SHARD = "0-15", 256
LATENTS = "latents.safetensors"  # x (n, C, H, W) and seed (n,), of a checkpoint without an autoencoder
LAYOUTS: dict[str, Layout] = {"npz": Npz(), "png": Pictures(png)}
BATCH = {"cpu": 64, "cuda": 256}  # where a batch of this size does not fit in memory, it is halved


def sample(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)] = "fashion-mnist",
    solver: Annotated[str | None, typer.Option(help="see `fastdiff solvers`; default the tuned plan, or auto")] = None,
    nfe: Annotated[int | None, typer.Option(min=1, help=f"evaluations of the denoiser; default {NFE}")] = None,
    grid: Annotated[str | None, typer.Option(help="time grid; default the solver's recommended one")] = None,
    end: Annotated[str | None, typer.Option(help="zero (clean data, default) or sigma_min")] = None,
    plan: Annotated[Path | None, typer.Option(help="a saved plan.json, instead of solver, nfe, grid and end")] = None,
    seeds: Annotated[str | None, typer.Option(help=f"such as 1,2,7; noise belongs to the seed alone; default {SEEDS}")] = None,
    n: Annotated[int | None, typer.Option("-n", min=1, help="instead, stream seeds 0 to n-1 to --out; again: go on")] = None,
    classes: Annotated[
        str | None, typer.Option(help="numbers, names or all: every seed in each; default: seed mod number of classes")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="for a text-conditioned checkpoint; guidance: against ''")] = None,
    condition: Annotated[Path | None, typer.Option(help=CONDITION_HELP)] = None,
    force: Annotated[bool, typer.Option("--force", help="use a plan tuned for another checkpoint or guidance")] = False,
    guidance: Annotated[float, typer.Option(min=0, help="classifier-free guidance scale; 1 = none")] = 1.0,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("out/samples"),
    layout: Annotated[str | None, typer.Option("--format", help="of -n: npz (shards; default) or png (a file each)")] = None,
    shard: Annotated[int | None, typer.Option(min=1, help=f"of -n: images held and written at once; default {SHARD}")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="samples at once: 64, GPU 256; halved if memory is short")] = None,
    scale: Annotated[int | None, typer.Option(min=1, max=64, help="enlarge every pixel to scale x scale")] = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="adaptive step size, each sample on its own")] = False,
    rtol: Annotated[float | None, typer.Option(help="relative tolerance of --adaptive; default 0.01")] = None,
    atol: Annotated[float | None, typer.Option(help="absolute tolerance of --adaptive; default 0.01")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default cuda where there is one")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads")] = None,
    variant: Annotated[str, typer.Option(help="how the network runs: plain, auto (measured, CPU), bf16, ...")] = "plain",
    compile: Annotated[bool, typer.Option("--compile", help="of --variant auto: try torch.compile too")] = False,
) -> None:
    """Sample images: one PNG for each seed and class, and grid.png with all of them; with -n any number, also under torchrun."""
    import torch

    from ..checkpoints import load

    check_folder(out)
    if threads:
        torch.set_num_threads(threads)
    fixed = {"--solver": solver, "--nfe": nfe, "--grid": grid, "--end": end}
    check_together(fixed, {"--rtol": rtol, "--atol": atol}, plan, adaptive)
    check_kind(n, {"--seeds": seeds, "--scale": scale}, {"--format": layout, "--shard": shard})
    numbers: Sequence[int] = range(n) if n else parse_seeds(SEEDS if seeds is None else seeds)
    world = World() if n is None else join()
    where = check_device(device or world.device)
    denoiser, conditions = conditioned(load(checkpoint).to(where), prompt, condition, len(numbers))
    names = class_names(denoiser, checkpoint)
    labels = parse_classes(classes, names)
    _check_network(denoiser, guidance, n)
    method = by_adaptive_steps(rtol, atol) if adaptive else by_plan(chosen_plan(denoiser, plan, fixed, guidance, force))
    size = batch or BATCH.get(where.type, BATCH["cuda"])
    most = min(size, n or len(numbers) * len(labels or [0])) * (1 if guidance == 1.0 else 2)
    denoiser, how = varied(denoiser, variant, compile, most, world)
    make = Maker(denoiser, method, guidance, conditions, {} if conditions is None else conditions.places(numbers))
    if n is None:
        _draw(out, make, requests(numbers, labels, names), size, scale or 1, None if classes is None else len(numbers))
    else:
        about = {"checkpoint": denoiser.hash or checkpoint, "guidance": guidance, "prompt": prompt, "classes": labels}
        about |= how if conditions is None else {**how, "condition": conditions.hash}
        work = Work(n, shard or SHARD, LAYOUTS[layout or "npz"], partial(in_turn, classes=labels, names=names),
                    method.identity | about)  # fmt: skip
        _stream(out, make, work, size, world)


def _draw(out: Path, make: Maker, wanted: list[Request], size: int, scale: int, columns: int | None) -> None:
    """A sheet of pictures; nothing is written before all are made."""
    import torch
    from safetensors.torch import save

    began = time.perf_counter()
    made: list[Made] = []
    with progress_bar() as bar:
        task = bar.add_task(make.method.title, total=len(wanted))
        for batch in Batches(make, size, say)(wanted):
            made.append(batch)
            bar.advance(task, len(batch.calls))
    seconds = time.perf_counter() - began
    images, calls = torch.cat([batch.images for batch in made]), [n for batch in made for n in batch.calls]
    latents = [batch.latents for batch in made if batch.latents is not None]
    more = {LATENTS: save({"x": torch.cat(latents), "seed": torch.tensor([r.seed for r in wanted])})} if latents else {}
    write_pictures(out, {r.file_name: image for r, image in zip(wanted, images, strict=True)}, scale, columns, more)
    mean = sum(calls) / len(calls)
    if latents:
        say(f"no autoencoder decodes these latents: they are in {out / LATENTS}, and the pictures show their first channels")
    say(
        f"{make.method.title}, guidance {make.guidance:g}: {mean:g} network calls a sample, {len(wanted)} samples "
        f"in {seconds:.2f} s on {make.denoiser.device} -> {out / 'grid.png'}"
    )


def _stream(out: Path, make: Maker, work: Work, size: int, world: World) -> None:
    """Adds the images that the folder lacks; one of several processes speaks for all."""
    began = time.perf_counter()
    stream = Stream(out, work, world)
    if world.first and stream.lacking < work.count:
        say(f"{out} holds {work.count - stream.lacking} of {work.count} images already")
    with progress_bar(world.first) as bar:
        task = bar.add_task(make.method.title, total=stream.assigned)
        for more in stream.run(Batches(lambda part: make(part).images, size, say)):
            bar.advance(task, more)
    if world.first:
        say(
            f"{make.method.title}, guidance {make.guidance:g}: {stream.lacking} images made in "
            f"{time.perf_counter() - began:.2f} s on {make.denoiser.device}, {work.count} in {out}"
        )


def check_kind(n: int | None, alone: dict[str, Any], many: dict[str, Any]) -> None:
    """-n and a sheet of pictures each have options that the other would ignore; --format is a known one; pictures need pillow."""
    given = [name for name, value in (many if n is None else alone).items() if value is not None]
    if given and n is None:
        raise FastdiffError(f"{', '.join(given)} only acts with -n: add it, or leave out {', '.join(given)}")
    if given:
        raise FastdiffError(f"-n streams seeds 0 to n - 1 as they are: leave out {', '.join(given)}, or leave out -n")
    if n is not None and (many["--format"] or "npz") not in LAYOUTS:
        raise FastdiffError(f"--format must be one of {', '.join(LAYOUTS)}; given {many['--format']!r}")
    if n is None or many["--format"] == "png":
        import_pillow()


def check_together(
    fixed: dict[str, str | int | None], tolerances: dict[str, float | None], plan: Path | None, adaptive: bool
) -> None:
    """Options that would be ignored are refused."""
    given = [name for name, value in fixed.items() if value is not None]
    if plan is not None and given:
        raise FastdiffError(f"--plan says it all: leave out {', '.join(given)}, or leave out --plan")
    if adaptive and (given or plan is not None):
        given = [*given, *(["--plan"] if plan is not None else [])]
        raise FastdiffError(f"--adaptive chooses its own steps: leave out {', '.join(given)}, or leave out --adaptive")
    if not adaptive and (idle := [name for name, value in tolerances.items() if value is not None]):
        raise FastdiffError(f"{', '.join(idle)} only acts with --adaptive: add it, or leave out {', '.join(idle)}")


def _check_network(denoiser: Denoiser, guidance: float, n: int | None) -> None:
    if denoiser.shape is None or len(denoiser.shape) != 3:
        raise FastdiffError(f"pictures need samples of shape (C, H, W); this checkpoint makes {denoiser.shape}")
    if n is not None and latent(denoiser):
        raise FastdiffError(f"-n streams images; samples of {denoiser.shape} are latents that nothing decodes here: leave out -n")
    check_guidance(denoiser, guidance)


def check_guidance(denoiser: Denoiser, guidance: float) -> None:
    """Refuses guidance with nothing to lead away from."""
    null = getattr(denoiser.network, "null_label", None)
    if guidance != 1.0 and denoiser.encode is None and denoiser.contrast is None and null is None:
        raise FastdiffError(
            f"--guidance {guidance:g} needs a network with a null class (trained with label dropout), a pipeline with text "
            "encoders, or negative.NAME tensors in the file of --condition; here is none: leave --guidance at 1"
        )


def chosen_plan(
    denoiser: Denoiser, path: Path | None, fixed: dict[str, str | int | None], guidance: float, force: bool
) -> Plan:
    """The plan asked for; without any wish the one the checkpoint ships with, or is tuned for it, else a hand-made one."""
    from ..solvers import plan as make
    from .plans import guided, load_plan

    if path is not None:
        return load_plan(path, denoiser, guidance, force)
    if denoiser.plan is not None and all(value is None for value in fixed.values()):
        return denoiser.plan
    nfe, grid = int(fixed["--nfe"] or NFE), fixed["--grid"]
    if all(fixed[name] is None for name in ("--solver", "--grid", "--end")):
        return make("auto", guided(denoiser, guidance), nfe)
    return make(
        str(fixed["--solver"] or SOLVER), denoiser, nfe=nfe,
        grid=None if grid is None else str(grid), end=str(fixed["--end"] or "zero"),
    )  # fmt: skip
