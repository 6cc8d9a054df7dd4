"""`fastdiff sample`: images from a checkpoint, one PNG each and all of them on one sheet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import FastdiffError
from .console import CHECKPOINT_HELP, progress_bar, say
from .pictures import check_folder, import_pillow, write_pictures
from .requests import Request, check_device, class_names, parse_classes, parse_seeds, prompted, requests

if TYPE_CHECKING:
    from torch import Tensor

    from ..denoiser import Denoiser
    from ..plans import Plan

SOLVER, NFE = "unipc-2", 10  # the solver where only a grid or an end is given


@dataclass(frozen=True)
class Method:
    """How samples are made: `run` gives a batch (B, C, H, W) and each sample's network calls; `title` names it."""

    title: str
    run: Callable[[Denoiser, list[int]], tuple[Tensor, list[int]]]


def sample(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)] = "fashion-mnist",
    solver: Annotated[str | None, typer.Option(help="see `fastdiff solvers`; default the tuned plan, or auto")] = None,
    nfe: Annotated[int | None, typer.Option(min=1, help=f"evaluations of the denoiser; default {NFE}")] = None,
    grid: Annotated[str | None, typer.Option(help="time grid; default the solver's recommended one")] = None,
    end: Annotated[str | None, typer.Option(help="zero (clean data, default) or sigma_min")] = None,
    plan: Annotated[Path | None, typer.Option(help="a saved plan.json, instead of solver, nfe, grid and end")] = None,
    seeds: Annotated[str, typer.Option(help="such as 0-15 or 1,2,7; the noise belongs to the seed alone")] = "0-15",
    classes: Annotated[
        str | None, typer.Option(help="numbers, names or all: every seed in each; default: seed mod number of classes")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="for a text-conditioned checkpoint; guidance: against ''")] = None,
    force: Annotated[bool, typer.Option("--force", help="use a plan tuned for another checkpoint or guidance")] = False,
    guidance: Annotated[float, typer.Option(min=0, help="classifier-free guidance scale; 1 = none")] = 1.0,
    out: Annotated[Path, typer.Option(help="folder for the pictures and grid.png")] = Path("out/samples"),
    batch: Annotated[int, typer.Option(min=1, help="samples at once")] = 64,
    scale: Annotated[int, typer.Option(min=1, max=64, help="enlarge every pixel to scale x scale")] = 1,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="adaptive step size, each sample on its own")] = False,
    rtol: Annotated[float | None, typer.Option(help="relative tolerance of --adaptive; default 0.01")] = None,
    atol: Annotated[float | None, typer.Option(help="absolute tolerance of --adaptive; default 0.01")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default cuda where there is one")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads")] = None,
) -> None:
    """Sample images: one PNG for each seed and class, and grid.png with all of them."""
    import torch

    from ..checkpoints import load

    import_pillow()
    check_folder(out)
    if threads:
        torch.set_num_threads(threads)
    numbers = parse_seeds(seeds)
    fixed = {"--solver": solver, "--nfe": nfe, "--grid": grid, "--end": end}
    check_together(fixed, {"--rtol": rtol, "--atol": atol}, plan, adaptive)
    where = check_device(device)
    denoiser = prompted(load(checkpoint).to(where), prompt)
    names = class_names(denoiser, checkpoint)
    wanted = requests(numbers, parse_classes(classes, names), names)
    _check_network(denoiser, guidance)
    method = _adaptive(rtol, atol) if adaptive else _fixed(chosen_plan(denoiser, plan, fixed, guidance, force))
    began = time.perf_counter()
    images, calls = _run(denoiser, method, wanted, batch, guidance)
    seconds = time.perf_counter() - began
    columns = len(numbers) if classes is not None else None
    write_pictures(out, {r.file_name: image for r, image in zip(wanted, images, strict=True)}, scale, columns)
    mean = sum(calls) / len(calls)
    say(
        f"{method.title}, guidance {guidance:g}: {mean:g} network calls a sample, {len(wanted)} samples "
        f"in {seconds:.2f} s on {where} -> {out / 'grid.png'}"
    )


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


def _check_network(denoiser: Denoiser, guidance: float) -> None:
    if denoiser.shape is None or len(denoiser.shape) != 3 or not (denoiser.decoder or denoiser.shape[0] in (1, 3)):
        raise FastdiffError(f"pictures need samples of shape (1 or 3, H, W); this checkpoint makes {denoiser.shape}")
    check_guidance(denoiser, guidance)


def check_guidance(denoiser: Denoiser, guidance: float) -> None:
    """Refuses guidance of a network without a null class."""
    if guidance != 1.0 and denoiser.encode is None and getattr(denoiser.network, "null_label", None) is None:
        raise FastdiffError(
            f"--guidance {guidance:g} needs a network with a null class (trained with label dropout); this one has "
            "none: leave --guidance at 1"
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


def _fixed(plan: Plan) -> Method:
    from ..sampling import sample as run_plan

    def run(denoiser: Denoiser, seeds: list[int]) -> tuple[Tensor, list[int]]:
        times = [row.t for row in plan.rows if row.calls]
        calls = sum(denoiser.calls_at(t) for t in times)
        return run_plan(denoiser, plan, seeds=seeds), [calls] * len(seeds)

    return Method(f"{plan.provenance.get('auto', plan.name)}, {plan.nfe} evaluations", run)


def _adaptive(rtol: float | None, atol: float | None) -> Method:
    import warnings

    from ..adaptive import Control, sample_adaptive

    default = Control()
    control = Control(default.rtol if rtol is None else rtol, default.atol if atol is None else atol)

    def run(denoiser: Denoiser, seeds: list[int]) -> tuple[Tensor, list[int]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said once, below, in the command's own words
            found = sample_adaptive(denoiser, seeds=seeds, rtol=control.rtol, atol=control.atol)
        if bool(found.unfinished.any()):
            tired = [seed for seed, flag in zip(seeds, found.unfinished.tolist(), strict=True) if flag]
            say(f"seeds {tired} reached {control.max_nfe} evaluations before the end: raise --rtol or --atol")
        return found.x, [n * denoiser.calls for n in found.nfe.tolist()]

    return Method(f"adaptive, rtol {control.rtol:g}, atol {control.atol:g}", run)


def _run(
    denoiser: Denoiser, method: Method, wanted: list[Request], batch: int, guidance: float
) -> tuple[Tensor, list[int]]:
    """All images (n, C, H, W) uint8 on the CPU, and the network calls of each; nothing is written before they are."""
    import torch

    from ..guide import cfg

    images, calls = [], []
    with progress_bar() as bar:
        task = bar.add_task(method.title, total=len(wanted))
        for i in range(0, len(wanted), batch):
            part = wanted[i : i + batch]
            bound = denoiser
            if part[0].label is not None:
                labels = torch.tensor([r.label for r in part], device=denoiser.device)
                bound = denoiser.bind(class_labels=labels)
            if guidance != 1.0:
                bound = cfg(bound, guidance, negative=bound.unprompted)
            x, each = method.run(bound, [r.seed for r in part])
            images.append((denoiser.images(x) * 255).round().to("cpu", torch.uint8))
            calls += each
            bar.advance(task, len(part))
    return torch.cat(images), calls
