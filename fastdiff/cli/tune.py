"""`fastdiff tune`: the best plan for one checkpoint and one budget, learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import CHECKPOINT_HELP, progress_bar, say

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..plans import Plan
    from ..tuning import Pairs

CANDIDATES = (("unipc-2", "uniform_t"), ("ipndm-3", "beta"), ("ipndm-3", "uniform_t"), ("dpmpp-2m", "uniform_lambda"))
VALIDATION_SEED, TRAIN_SEED = 1_000_000, 2_000_000  # far from the seeds that people look at and benchmark


def tune(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)] = "fashion-mnist",
    nfe: Annotated[int, typer.Option(min=2, help="evaluations of the denoiser")] = 8,
    out: Annotated[Path, typer.Option(help="the plan; its state for resuming lies beside it")] = Path("out/plan.json"),
    start: Annotated[str | None, typer.Option(help="solver to start from; default the best of a few by validation")] = None,
    grid: Annotated[str | None, typer.Option(help="grid to start from, with --start")] = None,
    freedom: Annotated[str, typer.Option(help="nodes (times), shares (weights) or full (both)")] = "full",
    guidance: Annotated[float, typer.Option(min=0, help="guidance scale that the plan is for; 1 = none")] = 1.0,
    pairs: Annotated[int, typer.Option(min=2, help="noise-image pairs to train on")] = 256,
    validation: Annotated[int, typer.Option(min=2, help="pairs to choose by")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Adam steps")] = 200,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    lr: Annotated[float, typer.Option(help="learning rate at the start; falls along a cosine")] = 0.02,
    time_budget: Annotated[float, typer.Option(help="minutes after which training stops; 0 = none")] = 0.0,
    checkpointing: Annotated[bool, typer.Option(help="recompute activations: less memory, a third more time")] = False,
    seed: int = 0,
    cache: Annotated[Path, typer.Option(help="folder of the computed endpoints")] = Path("out/pairs"),
) -> None:
    """Learn a plan: no weight of the network changes. Ctrl-C keeps the best so far; the same command goes on."""
    import math

    from ..bench.cells import Setup
    from ..checkpoints import load
    from ..errors import FastdiffError
    from ..tuning import TuneConfig, Tuner

    if grid and not start:
        raise FastdiffError("--grid goes with --start")
    config = TuneConfig(steps, batch, lr, freedom, seed, checkpointing=checkpointing)
    denoiser = load(checkpoint)
    trains, validates = Setup(pairs, TRAIN_SEED, guidance), Setup(validation, VALIDATION_SEED, guidance)
    if pairs < batch:
        raise FastdiffError(f"--pairs {pairs} is less than one batch of {batch}: give more pairs or a smaller --batch")
    starts = _starts(denoiser, start, grid, nfe)
    train_pairs, validation_pairs = _pairs(denoiser, [trains, validates], cache)
    chosen = best_start(starts, validation_pairs)
    tuner = Tuner(chosen, train_pairs, validation_pairs, config, out.with_suffix(".state.pt"))
    if tuner.step:
        say(f"resuming at step {tuner.step} of {steps}")
    with progress_bar() as bar:
        task = bar.add_task("tune", total=steps, completed=tuner.step)
        try:
            tuner.run(
                time_budget * 60 or math.inf,
                lambda p: bar.update(task, completed=p.step, description=f"validation {p.validation:.4f} from {p.start:.4f}"),
            )
        finally:
            write(tuner, out)
    say(f"{out}: paired error {tuner.best_error:.4f} on {validation} validation seeds; {chosen.name} has {tuner.start_error:.4f}")


def _starts(denoiser: Denoiser, start: str | None, grid: str | None, nfe: int) -> list[Plan]:
    """The plans to start from, in order; each keeps its grid in its name."""
    from dataclasses import replace

    from ..solvers import plan
    from ..solvers.registry import find, recommended_grid

    chosen = [(start, grid or recommended_grid(find(start), denoiser.schedule))] if start else list(CANDIDATES)
    return [replace(p, name=f"{p.name} · {g}") for s, g in chosen for p in [plan(s, denoiser, nfe, grid=g)]]


def _pairs(denoiser: Denoiser, setups: list[Any], cache: Path) -> list[Pairs]:
    from ..tuning import make_pairs

    with progress_bar() as bar:
        task = bar.add_task("converged endpoints", total=sum(s.n for s in setups))
        return [make_pairs(denoiser, s, cache, lambda n: bar.advance(task, n)) for s in setups]


def best_start(plans: list[Plan], pairs: Pairs) -> Plan:
    """The plan with the smallest validation error."""
    from ..tuning.tune import paired_error

    return min(plans, key=lambda p: paired_error(p, pairs)) if len(plans) > 1 else plans[0]


def write(tuner: Any, out: Path) -> None:
    """The best plan so far with where it comes from."""
    from dataclasses import replace

    replace(tuner.best, name=f"tuned-{tuner.best.nfe}", provenance=tuner.provenance()).save(out)
