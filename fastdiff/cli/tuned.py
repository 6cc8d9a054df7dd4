"""The tuned plans of the shipped model and their record: two stages of `make artefacts`.

plans   for each budget: the registry searched, a plan tuned, both kept in the work folder; the plans go beside the checkpoint
tuned   the record: tuned plans and the search's finalists on 2,048 seeds that neither saw
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..bench import Bench
from ..bench.cells import Cell, Setup
from ..bench.results import versions
from ..bench.runner import ANCHOR_STEPS
from ..bench.scoring import JudgeScorer
from ..denoiser import Denoiser
from ..metrics import frechet_distance
from ..plans import Plan
from ..shipped import FASHION_MNIST, write_hashed
from ..tuning import Pairs, TuneConfig, Tuner, make_pairs, provenance, starts
from ..tuning.search import candidates, halving
from .console import console, progress_bar
from .tune import STEPS, TRAIN_SEED, VALIDATION_SEED, best_table, tables_of, write

BUDGETS = (4, 5, 6, 8, 10)
PAIRS, HELD = 512, 256
CONFIG = TuneConfig(steps=STEPS, lr=0.05)
HELD_OUT = 2048
DRAWS = 200  # of the bootstrap of Frechet distances


def pairs_of(denoiser: Denoiser, work: Path, n: int = PAIRS) -> tuple[Pairs, Pairs]:
    """Training and validation pairs, kept in the work folder."""
    setups = [Setup(n, TRAIN_SEED), Setup(HELD, VALIDATION_SEED)]
    with progress_bar() as bar:
        task = bar.add_task("converged endpoints", total=sum(s.n for s in setups))
        train, held = (make_pairs(denoiser, s, work / "pairs", lambda k: bar.advance(task, k)) for s in setups)
    return train, held


def plans(denoiser: Denoiser, work: Path) -> None:
    """plans/nfe-NN.json beside the checkpoint, from a search and a tuning run for each budget."""
    train, held = pairs_of(denoiser, work)
    for nfe in BUDGETS:
        best, tuned = search(denoiser, nfe, held, work / f"search-{nfe}.json")["finalists"][0], work / f"plan-{nfe}.json"
        console.print(f"{nfe} calls, hand-made: {best['line']} {best['rmse']:.4f}")
        if not tuned.exists():
            tune(denoiser, nfe, train, held, tuned)
        made = Plan.load(tuned)
        console.print(f"{nfe} calls, tuned: {made.provenance['validation']['after']['rmse']:.4f}")
        write_hashed(FASHION_MNIST / "plans" / f"nfe-{nfe:02d}.json", tuned.read_bytes())


def search(denoiser: Denoiser, nfe: int, held: Pairs, path: Path) -> dict[str, Any]:
    """The best of the registry at one budget, on the validation pairs; kept at `path`."""
    if not path.exists():
        found = candidates(denoiser.schedule, nfe)
        rows = [{"line": r.plan.name, "rmse": r.rmse, "low": r.low, "high": r.high, "behind": r.behind}
                for r in halving(found, held)]  # fmt: skip
        files.write_text(path, json.dumps({"candidates": len(found), "seeds": HELD, "finalists": rows}, indent=1) + "\n")
    return dict(json.loads(path.read_text()))


def tune(denoiser: Denoiser, nfe: int, train: Pairs, held: Pairs, out: Path) -> None:
    """One tuning run with the settings of the record; how long it took, with the choice of its start, goes beside it."""
    began = time.monotonic()
    table = best_table(tables_of(denoiser.schedule, nfe, "full", starts(denoiser.schedule)), [held])
    tuner = Tuner(table, [train], [held], CONFIG, out.with_suffix(".state.pt"))
    choosing = time.monotonic() - began
    with progress_bar() as bar:
        task = bar.add_task(f"tune {nfe}", total=CONFIG.steps, completed=tuner.step)
        tuner.run(callback=lambda p: bar.update(task, completed=p.step))
    write(tuner.best, provenance(tuner), out)
    files.write_text(out.with_suffix(".seconds.json"), json.dumps(choosing + tuner.seconds) + "\n")


def tuned(denoiser: Denoiser, work: Path, out: Path, compile: bool) -> None:
    """The record of tuned plans against the search's finalists, on seeds 0 to 2047: errors, distances, pictures."""
    from .bench import measure

    chosen: list[Cell] = []
    for nfe in BUDGETS:
        finalists = json.loads((work / "tuned" / f"search-{nfe}.json").read_text())["finalists"]
        for solver, grid in (row["line"].split(" · ") for row in finalists):
            chosen.append(Cell(solver, grid, nfe))
        chosen.append(Cell("tuned", "plan", nfe, Plan.load(work / "tuned" / f"plan-{nfe}.json")))
    scorer = JudgeScorer()
    bench = measure(denoiser, chosen, Setup(HELD_OUT), work / "full-2048", scorer, HELD_OUT, compile)
    record = json.loads((work / "full-2048" / "results.json").read_text())
    record["tuning"] = {
        "settings": asdict(CONFIG), "pairs": PAIRS, "validation": HELD, "reference_steps": ANCHOR_STEPS, "versions": versions(),
        "budgets": [_budget(bench, scorer, work / "tuned", chosen, nfe) for nfe in BUDGETS],
    }  # fmt: skip
    files.write_text(out / "tuned" / "results.json", json.dumps(record, indent=1) + "\n")
    for file in ("results.csv", "frontier.png", "samples.png"):
        files.write_bytes(out / "tuned" / file, (work / "full-2048" / file).read_bytes())


def _budget(bench: Bench, scorer: JudgeScorer, work: Path, chosen: list[Cell], nfe: int) -> dict[str, Any]:
    """The tuned plan of a budget against the best hand-made one, the bars of the project's plan beside it."""
    rows = [r for r in bench.records if r["nfe"] == nfe]
    mine = next(r for r in rows if r["line"] == "tuned")
    best = min((r for r in rows if r is not mine and "rmse" in r), key=lambda r: float(r["rmse"]))
    samples = {c.line: bench.samples(c) for c in chosen if c.nfe == nfe and c.line in (best["line"], "tuned")}
    three = samples["tuned"], samples[best["line"]], bench.reference.x
    features = [scorer.judge.features(bench.denoiser.images(x) * 2 - 1).numpy() for x in three]
    search = json.loads((work / f"search-{nfe}.json").read_text())
    return {
        "nfe": nfe, "search": search, "seconds": json.loads((work / f"plan-{nfe}.seconds.json").read_text()),
        "hand_made": best["line"], "rmse_hand_made": best["rmse"], "rmse_tuned": mine["rmse"],
        "rmse_ratio": mine["rmse"] / best["rmse"], **_excess(scorer.reference.train_features[:HELD_OUT], *features),
    }  # fmt: skip


def _excess(real: np.ndarray, mine: np.ndarray, best: np.ndarray, converged: np.ndarray) -> dict[str, Any]:
    """FD-clf beyond the converged ODE's, of the tuned and of the hand-made plan, with intervals; and `fd_from_converged_*`, how
    far their sets lie from the converged ODE's own.

    A plan whose errors happen to lead towards the data may lie nearer to it than the network it samples: a small or negative
    excess is then no small error, and the second figure tells the two apart. The bootstrap redraws the same seeds for all three:
    repeated rows bias every distance upwards, and alike, so that the difference of two keeps little of it.
    """
    rng, n = np.random.default_rng(0), len(mine)

    def excess(rows: np.ndarray) -> tuple[float, float]:
        floor = frechet_distance(real, converged[rows])
        return frechet_distance(real, mine[rows]) - floor, frechet_distance(real, best[rows]) - floor

    tuned, hand_made = excess(np.arange(n))
    draws = np.array([excess(rng.integers(0, n, n)) for _ in range(DRAWS)])
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return {
        "fd_excess_tuned": tuned, "fd_excess_tuned_interval": [low[0], high[0]],
        "fd_excess_hand_made": hand_made, "fd_excess_hand_made_interval": [low[1], high[1]],
        "fd_from_converged_tuned": frechet_distance(converged, mine),
        "fd_from_converged_hand_made": frechet_distance(converged, best),
        "fd_excess_ratio": tuned / hand_made, "fd_excess_hand_made_is_noise": bool(low[1] <= 0.0),
    }  # fmt: skip

