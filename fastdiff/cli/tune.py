"""`fastdiff tune`: the best plan for one checkpoint and one budget, learned or searched for."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import CHECKPOINT_HELP, console, progress_bar, say

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..plans import Plan
    from ..schedule import NoiseSchedule
    from ..tuning import NodeSearch, Pairs, Table, Tuner

VALIDATION_SEED, TRAIN_SEED = 1_000_000, 2_000_000  # far from the seeds that people look at and benchmark
FREEDOMS = ("nodes", "coefficients", "full")
STEPS = 300  # of Adam; the shipped plans' number
CHOICE = 64  # validation pairs that choose where to start: as 256 do at 4, 5, 6, 8 and 10 calls of the shipped model
SHOWN = 16  # seeds in the picture


def tune(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)] = "fashion-mnist",
    nfe: Annotated[int, typer.Option(min=1, help="evaluations of the denoiser")] = 8,
    out: Annotated[Path, typer.Option(help="the plan; the state to resume from lies beside it")] = Path("out/plan.json"),
    search: Annotated[bool, typer.Option("--search", help="no learning: the best solver and grid of the whole registry")] = False,
    freedom: Annotated[str, typer.Option(help="nodes (times), coefficients (and times) or full (every weight)")] = "full",
    start: Annotated[str | None, typer.Option(help="solver or plan.json to start from; default the best of a few")] = None,
    grid: Annotated[str | None, typer.Option(help="grid to start from, with a solver as --start")] = None,
    derivative_free: Annotated[bool, typer.Option("--derivative-free", help="nodes only, by COBYQA")] = False,
    guidance: Annotated[str, typer.Option(help="scales that one plan is for, such as 2 or 1,2,4; 1 = none")] = "1",
    pairs: Annotated[int, typer.Option(min=2, help="noise-image pairs of each scale to train on")] = 512,
    validation: Annotated[int, typer.Option(min=2, help="pairs of each scale to choose by")] = 256,
    steps: Annotated[int | None, typer.Option(min=1, help="Adam steps, or evaluations without derivatives")] = None,
    batch: Annotated[int, typer.Option(min=2)] = 32,
    lr: Annotated[float, typer.Option(help="learning rate at the start; falls along a cosine")] = 0.05,
    relax: Annotated[float, typer.Option(help="radius of LD3's relaxed target, in norms of the start noise")] = 0.0,
    distribution: Annotated[float, typer.Option(help="weight of the MMD in random features; 0 = off")] = 0.0,
    time_budget: Annotated[str, typer.Option(help="stop training after 10m, 90s or 1h; 0 = none")] = "0",
    checkpointing: Annotated[bool, typer.Option(help="recompute activations: less memory, a third more time")] = False,
    force: Annotated[bool, typer.Option("--force", help="start from a plan tuned for another checkpoint")] = False,
    seed: int = 0,
    cache: Annotated[Path, typer.Option(help="folder of the computed endpoints")] = Path("out/pairs"),
) -> None:
    """Find a plan: no weight of the network changes. Ctrl-C keeps the best so far; the same command goes on."""
    from ..bench.cells import Setup
    from ..checkpoints import load
    from ..errors import FastdiffError
    from ..tuning import SearchConfig, TuneConfig, rivals

    scales, budget = parse_scales(guidance), parse_duration(time_budget)
    freedom = "nodes" if derivative_free else freedom
    if freedom not in FREEDOMS:
        raise FastdiffError(f"--freedom must be one of {', '.join(FREEDOMS)}; given {freedom!r}")
    if not search and pairs < batch:
        raise FastdiffError(f"--pairs {pairs} is less than one batch of {batch}: give more pairs or a smaller --batch")
    config = TuneConfig(steps or STEPS, batch, lr, seed, relax=relax, distribution=distribution, checkpointing=checkpointing)
    denoiser = load(checkpoint)
    validates = [Setup(validation, VALIDATION_SEED, scale) for scale in scales]
    if search:
        ranking(denoiser, nfe, _pairs(denoiser, validates, cache), out)
        return
    tables = _tables(denoiser, start, grid, nfe, freedom, scales[0], force)
    trains = [Setup(pairs, TRAIN_SEED, scale) for scale in scales]
    found = _pairs(denoiser, [*trains, *validates], cache)
    train, held = found[: len(scales)], found[len(scales) :]
    table = best_table(tables, held)
    state = out.with_suffix(".state.json" if derivative_free else ".state.pt")
    from ..tuning import NodeSearch, SolverNodes, Tuner

    tuner: Tuner | NodeSearch
    if derivative_free:
        assert isinstance(table, SolverNodes)
        tuner = NodeSearch(table, train, held, SearchConfig(steps or 120, batch), state)
    else:
        tuner = Tuner(table, train, held, config, state)
        if tuner.step:
            say(f"resuming at step {tuner.step} of {config.steps}")
    to_beat = best_known(tuner, [] if start else rivals(denoiser.schedule, nfe))
    finish(tuner, steps or (120 if derivative_free else STEPS), budget, to_beat, out)


def finish(tuner: Tuner | NodeSearch, steps: int, budget: float, to_beat: tuple[str, float], out: Path) -> None:
    """Runs to the end, the budget or an interrupt, and writes the best plan so far whichever it was."""
    from ..tuning import provenance

    with progress_bar() as bar:
        task = bar.add_task("tune", total=steps, completed=getattr(tuner, "step", 0))
        try:
            tuner.run(budget, lambda p: bar.update(
                task, completed=p.step, description=f"validation {p.best.rmse:.4f}, hand-made {to_beat[1]:.4f}"))  # fmt: skip
        finally:
            write(tuner.best, provenance(tuner), out)
    before, after = tuner.start, tuner.best_score
    say(
        f"{out}: paired error {after.rmse:.4f} (MMD {after.mmd:.4f}) on {sum(p.setup.n for p in tuner.validation)} validation "
        f"images; it began as {tuner.table.label} with {before.rmse:.4f} ({before.mmd:.4f}); "
        f"the best hand-made plan tried, {to_beat[0]}, has {to_beat[1]:.4f}"
    )
    picture(tuner, out.with_suffix(".png"))


def picture(tuner: Tuner | NodeSearch, out: Path) -> None:
    """A sheet of the first validation seeds: the plan as it was, as it is, and the converged ODE; blur would show here."""
    import importlib.util

    from ..files import write_bytes
    from ..tuning import endpoints
    from .pictures import png, sheet

    pairs = tuner.validation[0]
    shape = pairs.denoiser.shape or ()
    if len(shape) != 3 or shape[0] not in (1, 3) or importlib.util.find_spec("PIL") is None:
        return
    shown = range(min(SHOWN, pairs.setup.n))
    rows = [endpoints(tuner.source, pairs, shown), endpoints(tuner.best, pairs, shown), pairs.target[: len(shown)]]
    images = [(pairs.denoiser.images(x) * 255).round().byte().permute(0, 2, 3, 1).numpy() for x in rows]
    write_bytes(out, png(sheet([image for row in images for image in row], len(shown))))
    say(f"{out}: one column a seed; {tuner.table.label}, then the tuned plan, then the converged ODE")


def write(plan: Plan, provenance: dict[str, Any], out: Path) -> None:
    """A plan with its provenance, under the name that says what it is."""
    from dataclasses import replace

    replace(plan, name=f"tuned-{plan.nfe}", provenance=provenance).save(out)


def ranking(denoiser: Denoiser, nfe: int, pairs: list[Pairs], out: Path) -> None:
    """The finalists of the registry as a table; the first goes to `out`."""
    from dataclasses import replace

    from rich.table import Table as RichTable

    from ..errors import FastdiffError
    from ..tuning.search import candidates, cost, halving

    if len(pairs) != 1:
        raise FastdiffError("--search ranks for one guidance scale: give one")
    plans = candidates(denoiser.schedule, nfe)
    with progress_bar() as bar:
        task = bar.add_task(f"{len(plans)} solvers and grids", total=cost(plans, pairs[0].setup.n))
        ranked = halving(plans, pairs[0], lambda n: bar.advance(task, n))
    table = RichTable(title=f"best of {len(plans)} at {nfe} evaluations, {pairs[0].setup.n} seeds")
    for column in ("solver · grid", "paired error", "95 % interval", "excess over the best in mean squared error"):
        table.add_column(column)
    for i, r in enumerate(ranked):
        excess = f"{r.behind[0]:.2e} to {r.behind[1]:.2e}" if i else "-"
        table.add_row(r.plan.name, f"{r.rmse:.4f}", f"{r.low:.4f} to {r.high:.4f}", excess)
    console.print(table)
    replace(ranked[0].plan, provenance={"search": f"best of {len(plans)} on {pairs[0].setup.n} seeds"}).save(out)
    say(f"{out}: {ranked[0].plan.name}; `--start {out}` tunes it further")


def _tables(
    denoiser: Denoiser, start: str | None, grid: str | None, nfe: int, freedom: str, scale: float, force: bool
) -> list[Table]:
    """The tables to start from: a plan file's, a solver's, or where none is asked for `starts`."""
    from ..errors import FastdiffError
    from ..solvers.registry import find, recommended_grid
    from ..tuning import LearnedTable, starts
    from .plans import load_plan

    if grid and not start:
        raise FastdiffError("--grid goes with --start")
    if start and start.endswith(".json"):
        loaded = load_plan(start, denoiser, scale, force)
        if grid or freedom == "nodes":
            raise FastdiffError("a plan file has its own weights: leave out --grid, and choose --freedom coefficients or full")
        if loaded.nfe != nfe:
            raise FastdiffError(f"{start} makes {loaded.nfe} evaluations: give --nfe {loaded.nfe}, or another start")
        return [LearnedTable(loaded, denoiser.schedule, freedom)]
    pairs = [(start, grid or recommended_grid(find(start), denoiser.schedule))] if start else starts(denoiser.schedule)
    return tables_of(denoiser.schedule, nfe, freedom, pairs)


def _pairs(denoiser: Denoiser, setups: list[Any], cache: Path) -> list[Pairs]:
    from ..tuning import make_pairs

    with progress_bar() as bar:
        task = bar.add_task("converged endpoints", total=sum(s.n for s in setups))
        return [make_pairs(denoiser, s, cache, lambda n: bar.advance(task, n)) for s in setups]


def tables_of(schedule: NoiseSchedule, nfe: int, freedom: str, pairs: list[tuple[str, str]]) -> list[Table]:
    """A table for each solver and grid, at step 0 that solver's plan."""
    from ..solvers import plan
    from ..tuning import LearnedTable, SolverNodes

    if freedom == "nodes":
        return [SolverNodes(solver, schedule, nfe, grid) for solver, grid in pairs]
    return [LearnedTable(plan(s, schedule, nfe, grid=g), schedule, freedom, f"{s} · {g}") for s, g in pairs]


def best_table(tables: list[Table], pairs: list[Pairs]) -> Table:
    """The table whose plan has the smallest error as it stands, on the first `CHOICE` validation pairs of each scale."""
    from ..tuning import rmse_of

    return min(tables, key=lambda table: rmse_of(table.plan("start", {}), pairs, CHOICE)) if len(tables) > 1 else tables[0]


def best_known(tuner: Tuner | NodeSearch, others: list[Plan]) -> tuple[str, float]:
    """The best plan before any training, with its validation error: the tuner's start or one of the others."""
    from ..tuning import rmse_of

    found = [(p.name, rmse_of(p, tuner.validation)) for p in others]
    return min([(tuner.table.label, tuner.start.rmse), *found], key=lambda item: item[1])


def parse_scales(text: str) -> list[float]:
    """ "1" or "1,2,4" -> guidance scales."""
    from ..errors import FastdiffError

    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(0 <= s < math.inf for s in scales) or len(set(scales)) < len(scales):
        raise FastdiffError(f"--guidance takes scales such as 2 or 1,2,4; given {text!r}")
    return scales


def parse_duration(text: str) -> float:
    """ "10m", "90s", "1h" -> seconds; "0" is no limit."""
    from ..errors import FastdiffError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None and text != "0":
        raise FastdiffError(f"--time-budget takes a duration such as 10m, 90s or 1h, or 0; given {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else math.inf
