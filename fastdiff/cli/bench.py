"""`fastdiff bench` and `fastdiff demo`: network calls against quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import CHECKPOINT_HELP, CONDITION_HELP, console, progress_bar, say

if TYPE_CHECKING:
    from ..bench import Bench, Cell, Setup
    from ..bench.scoring import Scorer
    from ..denoiser import Denoiser

Checkpoint = Annotated[str, typer.Argument(help=CHECKPOINT_HELP)]
AGAIN = 2048  # images that the full preset measures the best lines with
BEST = 1  # lines per NFE that it measures so, at few calls, where they still differ
FEW = 10


def bench(
    checkpoint: Checkpoint = "fashion-mnist",
    preset: Annotated[str, typer.Option(help="quick (5 solvers, 128 images) or full (all, 256, 2,048 for the best)")] = "quick",
    solvers: Annotated[str, typer.Option(help="comma-separated solvers instead of the preset's")] = "",
    grids: Annotated[str, typer.Option(help="comma-separated grids for them; default: each one's recommended grid")] = "",
    nfe: Annotated[str, typer.Option(help="comma-separated budgets for them")] = "5,8,10,20",
    n: Annotated[int, typer.Option("--n", "-n", help="images a cell; 0 = the preset's")] = 0,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale; 1 = none")] = 1.0,
    prompt: Annotated[str | None, typer.Option(help="for a text-conditioned checkpoint; default the empty one")] = None,
    condition: Annotated[Path | None, typer.Option(help=CONDITION_HELP)] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="a saved plan to measure too (may be given more than once)")] = None,
    student: Annotated[list[str] | None, typer.Option(help="a student to measure beside this, its teacher (or several)")] = None,
    force: Annotated[bool, typer.Option("--force", help="measure plans tuned for another checkpoint or guidance")] = False,
    first_seed: Annotated[int, typer.Option(min=0)] = 0,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    inception: Annotated[Path | None, typer.Option(help="FID's Inception weights (pt_inception-2015-12-05), with --data")] = None,
    data: Annotated[Path | None, typer.Option(help="real images for --inception: .npz or a folder")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="run the network through torch.compile")] = False,
    out: Annotated[Path, typer.Option(help="folder for results, pictures and report.html")] = Path("out/bench"),
    resume: Annotated[bool, typer.Option(help="go on in a folder that holds results; finished cells are not run again")] = False,
) -> None:
    """Measure solvers, grids and budgets on a checkpoint; write a table, two pictures and a report."""
    from ..bench import Setup, full_cells, quick_cells
    from ..bench.cells import cells, tuned_cells
    from ..bench.pictures import need_matplotlib
    from ..bench.scoring import InceptionScorer, scorer_for
    from ..checkpoints import load
    from ..errors import FastdiffError
    from .methods import latent
    from .requests import conditioned

    need_matplotlib()
    if preset not in ("quick", "full"):
        raise FastdiffError(f"--preset must be quick or full; given {preset!r}")
    if (inception is None) != (data is None):
        raise FastdiffError("--inception and --data go together: FID compares with real images")
    if (out / "cells").exists() and not resume:
        raise FastdiffError(f"{out} holds results already: give --resume to go on there, or another --out")
    if solvers or grids:
        chosen = cells(_names(solvers) or ["ddim", "dpmpp-2m", "unipc-3"], _names(grids) or None, _numbers(nfe))
    else:
        chosen = quick_cells() if preset == "quick" else full_cells()
    count = n or (128 if preset == "quick" else 256)
    denoiser, conditions = conditioned(load(checkpoint), prompt, condition, AGAIN if preset == "full" and not n else count)
    if inception and latent(denoiser):
        raise FastdiffError(f"--inception judges images; samples of {denoiser.shape} are latents that nothing decodes here")
    if denoiser.step_counts and not (solvers or grids):
        chosen = [cell for cell in chosen if cell.nfe in denoiser.step_counts]  # the others such a student refuses
    scorer = InceptionScorer(inception, data) if inception and data else scorer_for(denoiser)
    setup = Setup(count, first_seed, guidance, batch, conditions)
    chosen += _given(denoiser, setup, plan or [], force, student or [])
    if not (solvers or grids):
        chosen += tuned_cells(denoiser, setup)
    measured = measure(denoiser, chosen, setup, out, scorer, compile=compile)
    if preset == "full" and not n:
        console.print(f"\nthe best {BEST} of each NFE again, with {AGAIN:,} images")
        again = Setup(AGAIN, first_seed, guidance, batch, conditions)
        measure(denoiser, best(measured, chosen), again, out / "n2048", scorer, compile=compile)


def _given(denoiser: Denoiser, setup: Setup, plans: list[Path], force: bool, students: list[str]) -> list[Cell]:
    """The cells of plans and students that the command names."""
    from ..bench.cells import Cell, student_cells
    from ..checkpoints import load
    from .plans import load_plan

    saved = [(path.stem, load_plan(path, denoiser, setup.guidance, force)) for path in plans]
    cells = [Cell(name, "plan", table.nfe, table) for name, table in saved]
    for path, name in student_names(students).items():
        cells += student_cells(load(path), denoiser, setup, name)
    return cells


def student_names(students: list[str]) -> dict[str, str]:
    """Checkpoints of students and the names of their lines: "student" for one, the last part of the path too for several."""
    names = {path: "student" if len(students) == 1 else f"student {Path(path).name}" for path in students}
    if len(set(names.values())) < len(names):
        names = {path: f"student {path}" for path in students}
    return names


def best(measured: Bench, chosen: list[Cell]) -> list[Cell]:
    """The cells with the smallest paired error at each small NFE, and tuned plans and DDIM beside them."""
    from ..bench.tables import ordered

    ranked = [(r["line"], r["nfe"]) for r in ordered(measured.records) if r["grid"] != "plan"]
    small = {nfe for _, nfe in ranked if nfe <= FEW}
    kept = {key for nfe in small for key in [k for k in ranked if k[1] == nfe][:BEST]}
    return [c for c in chosen if (c.line, c.nfe) in kept or c.saved or (c.line == "ddim · uniform_t" and c.nfe in small)]


def demo(
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("out/demo"),
) -> None:
    """The main job on the shipped model: five solvers and the tuned plans at 4 to 20 network calls and its student at 1, 2 and
    4, in a few minutes."""
    from ..bench import Setup, quick_cells
    from ..bench.cells import student_cells, tuned_cells
    from ..bench.scoring import scorer_for
    from ..checkpoints import load

    denoiser, student = load("fashion-mnist"), load("fashion-mnist-student")
    console.print("the shipped model: class-conditional Fashion-MNIST, 28x28; the same noise for every solver")
    setup = Setup(128)
    cells = [*quick_cells(), *tuned_cells(denoiser, setup), *student_cells(student, denoiser, setup)]
    measure(denoiser, cells, setup, out, scorer_for(denoiser))


def measure(
    denoiser: Denoiser, cells: list[Cell], setup: Setup, out: Path, scorer: Scorer | None, paired_n: int = 0,
    compile: bool = False,
) -> Bench:  # fmt: skip
    """Runs the cells with a progress bar and writes everything; what is finished when interrupted is kept."""
    from ..bench import Bench, pictures, report, results
    from ..bench.runner import PAIRED
    from ..bench.tables import table

    run = Bench(denoiser, setup, out, scorer, paired_n or PAIRED, compile)
    total = run.cost(cells)
    with progress_bar() as bar:
        task = bar.add_task("benchmark", total=total)
        done = 0

        def show(what: str, evaluations: int) -> None:
            nonlocal done, total
            done += evaluations
            total = max(total, done)  # the converged ODE may need more steps than were counted
            bar.update(task, completed=done, total=total, description=what)

        run.run(cells, show)
        bar.update(task, completed=total, description="benchmark")
    record = results.collect(run)
    results.write(record, out)
    pictures.frontier(record, out / "frontier.png")
    pictures.samples(record, run.pictures, out / "samples.png")
    report.write(record, out)
    console.print(table(record, console.width))
    if not record["converged"]["ok"]:
        console.print("the converged ODE is too coarse for the smallest errors above: read them as upper bounds", style="yellow")
    say(f"{out / 'report.html'} has the pictures; {out / 'frontier.png'} and {out / 'samples.png'} are them alone")
    return run


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    from ..errors import FastdiffError

    try:
        return [int(part) for part in _names(text)]
    except ValueError as e:
        raise FastdiffError(f"--nfe takes whole numbers separated by commas; given {text!r}") from e


__all__ = ["bench", "best", "demo", "measure"]
