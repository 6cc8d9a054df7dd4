"""The students of the shipped model and their records, stages of `make artefacts`: one training run a method, then its figures.

distill-teacher  the teacher at 1 to 50 calls, with DDIM and with the best hand-made one of `LINES` (by its paired error)
distill-METHOD   trains in the work folder (a stage that is interrupted goes on there), then measures every finished student
distill-table    DISTILL.md from the records; a method without one reads "not trained"

Budget: one core each, so that two run at once. An image's forward pass of the shipped model takes 7 ms, forward and backward 20;
in bfloat16 4.1 and 11.4 (AMD EPYC of 2023, batches of 32 and 128 alike; a processor without its instructions gains nothing). In
bfloat16 an image costs, and a run should take:

    progressive        3 calls of the teacher, 23 ms, later 2, 19    900 updates of 32 in each of 4 stages   39 min
    guided             2 x 2 calls, 27 ms, then 1 or 2, 17           700 updates of 32 in each of 4 stages   31 min
    trajectory         16 calls and 1 + 2 + 4 of the student, 144    600 updates of 16                       23 min
    trajectory-guided  2 x 16 calls and the same, 208 ms             700 updates of 16                       39 min
    consistency        2 calls and 1 of the average, 23 ms           1,200 updates of 32                     15 min
    ect                1 call of the student, 15 ms                  120 updates of 128 in each of 4 phases  16 min

They took what DISTILL.md says, a quarter to a third more beside tests. Looking at the student adds 1 to 2 minutes; measuring
takes 14 s a call for 2,048 images, three sets of them, and the teacher's rows an hour once.

Why these settings. Batches of 16 and 32: time goes with images, so a small batch makes more updates of them, and the targets are
exact (no data noise in them). ECT's target is its own, so it keeps the paper's 128. Rates of 2e-4 to 4e-4 are a quarter to a
half of the rate that trained this teacher (8e-4); the papers' 5e-5 to 1e-4 are for 10 to 100 times as many updates. The
teacher's target by UniPC-2: from the same noise, its restarts in 4 equal intervals end (RMSE from the converged ODE, 40 seeds)

    calls in each   DDIM    DPM++(2M)  DEIS-2  iPNDM-2  UniPC-2
    3               0.104   0.094      0.080   0.062    0.057
    4               -       -          -       -        0.028

and in 8 intervals DDIM with 2 calls 0.074, UniPC-2 0.049, with 3 calls 0.026: no student can be nearer than its target. What that
buys in a student, at equal cost (results/distill_targets.json, 4 calls): 0.106 with 4 calls of UniPC-2, 0.160 with DDIM's 2.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..bench import Setup
from ..bench.cells import Cell
from ..bench.converged import GRID, SOLVER, rmse, shipped
from ..bench.results import versions
from ..bench.runner import ANCHOR_STEPS, PAIRED
from ..bench.scoring import Scorer, scorer_for
from ..checkpoints import load
from ..denoiser import Denoiser
from ..distill import ECT, Consistency, Distiller, Guided, Method, Progressive, Settings, Trajectory
from ..distill.view import View
from ..plans import Plan
from ..sampling import sample
from ..solvers import plan
from ..training.data import Images
from .console import console
from .distill import follow
from .student_tables import read

RECIPES: dict[str, Method] = {
    "progressive": Progressive(start=16, steps=1, updates=900, lr=3e-4, batch=32, solver="unipc-2", calls=3),
    "guided": Guided(counts=(1, 2, 4, 8), updates=700, lr=3e-4, batch=32, solver="unipc-2", calls=2),
    "trajectory": Trajectory(counts=(1, 2, 4), updates=600, lr=4e-4, batch=16, solver="unipc-2", calls=4),
    "trajectory-guided": Trajectory(
        counts=(1, 2, 4), scales=(1.0, 5.0), updates=700, lr=4e-4, batch=16, solver="unipc-2", calls=4
    ),
    "consistency": Consistency(
        steps=4, segments=1, inner=16, updates=1200, lr=2e-4, batch=32, ema=0.998, solver="unipc-2", calls=2
    ),
    "ect": ECT(steps=4, phases=4, updates=120, lr=2e-4, batch=128, ema=0.99),
}
HOW = Settings(bf16=True)
LINES = (
    ("ddim", "uniform_t"), ("dpmpp-2m", "uniform_lambda"), ("dpmpp-3s", "uniform_t"), ("unipc-2", "uniform_t"),
    ("unipc-3", "uniform_t"), ("ipndm-2", "beta"), ("ipndm-3", "beta"),
)  # fmt: skip
CALLS = (1, 2, 4, 8, 16, 50)
SEEDS = (0, 1_000_000, 2_000_000)  # first seeds of the three sets a student is measured on; the teacher's rows take the first
SCALES = (1.5, 2.0, 3.0, 5.0)
GUIDED = (4, (("ipndm-3", "beta"),))  # evaluations of the guided teacher, and by which lines; students of more are not guided
NEAREST = 1.5  # the scale at which the shipped student's set lies nearest to the data
N = 2048
MANY = 10_000  # of what the README says of the shipped student
LOOKS = 10  # at a student while it learns
CHOICE = 64  # seeds that choose the teacher's best hand-made solver


class Figures:
    """Measures plans of one denoiser at n images, scored and, where it draws no noise, paired with the teacher's endpoints."""

    def __init__(self, teacher: Denoiser, n: int, scorer: Scorer | None) -> None:
        self.teacher, self.n, self.scorer = teacher, n, scorer
        self.paired = min(PAIRED, n)
        self._endpoints: Tensor | None = None

    def row(self, denoiser: Denoiser, table: Plan, seeds: Sequence[int] = SEEDS[:1], scale: float = 1.0) -> dict[str, Any]:
        """The means over the sets of seeds, with each set's own figures beside them."""
        runs: list[dict[str, Any]] = []
        calls = 0
        for first in seeds:
            setup = Setup(self.n, first, scale)
            x, calls = draw(denoiser, table, setup)
            found = self.scorer.score(self.teacher.images(x), setup.labels(self.teacher)) if self.scorer else {}
            if first == 0 and scale == 1.0 and not table.stochastic:
                found["rmse"] = rmse(x[: self.paired], self.endpoints())
            runs.append(found)
        means = {k: float(np.mean([r[k] for r in runs if k in r])) for k in runs[0] if isinstance(runs[0][k], float)}
        head = {"plan": table.name, "nfe": table.nfe, "network_calls": calls, "guidance": scale, "n": self.n}
        return {**head, **means, "runs": runs}

    def endpoints(self) -> Tensor:
        """Where the teacher's converged ODE takes the first seeds: its stored endpoints, or `ANCHOR_STEPS` steps."""
        if self._endpoints is None:
            stored = shipped(self.teacher, self.paired)
            table = plan(SOLVER, self.teacher, ANCHOR_STEPS, grid=GRID)
            self._endpoints = stored.x if stored else draw(self.teacher, table, Setup(self.paired))[0]
        return self._endpoints


def draw(denoiser: Denoiser, table: Plan, setup: Setup) -> tuple[Tensor, int]:
    """A setup's samples, and the network calls of one of them."""
    batches = setup.batches(denoiser)
    return torch.cat([sample(den, table, seeds=seeds) for seeds, den in batches]), table.nfe * batches[0][1].calls


def teacher_record(teacher: Denoiser, out: Path, n: int = N, calls: Sequence[int] = CALLS) -> None:
    """distill-teacher.json: DDIM and the best hand-made solver at each number of calls; and guided, at `SCALES`, what a student
    of guidance is held against. Resumes after its rows."""
    scorer = scorer_for(teacher)
    figures, path = Figures(teacher, n, scorer), out / "distill-teacher.json"
    kept = read(path) or {}
    rows = kept["rows"] if (kept.get("teacher"), kept.get("n")) == (teacher.hash, n) else []
    head = {"teacher": teacher.hash, "n": n, "floor": scorer.anchor(n) if scorer else None}
    had = {(r["line"], r["nfe"], r["guidance"]) for r in rows}
    short = Setup(min(CHOICE, figures.paired))

    def measure(line: str, table: Plan, best: bool, scale: float = 1.0) -> None:
        if (line, table.nfe, scale) in had:
            return
        rows.append({"line": line, "best": best, **figures.row(teacher, table, scale=scale)})
        console.print(f"teacher, {table.nfe} evaluations, {line}, scale {scale:g}", highlight=False)
        files.write_text(path, json.dumps({**head, "versions": versions(), "rows": rows}, indent=1) + "\n")

    if getattr(teacher.network, "null_label", None) is not None:
        for scale in SCALES:
            for solver, grid in GUIDED[1]:
                measure(f"{solver} · {grid}", Cell(solver, grid, GUIDED[0]).plan(teacher), False, scale)
    for nfe in (c for c in calls if not any(r["nfe"] == c and r["best"] for r in rows)):
        tables = {f"{s} · {g}": Cell(s, g, nfe).plan(teacher) for s, g in LINES}
        want = figures.endpoints()[: short.n]
        errors = {line: rmse(draw(teacher, table, short)[0], want) for line, table in tables.items()}
        best = min(errors, key=lambda line: errors[line])
        for line in dict.fromkeys((best, "ddim · uniform_t")):
            measure(line, tables[line], line == best)


def student_record(
    teacher: Denoiser, name: str, method: Method, data: Images | None, work: Path, out: Path, n: int = N
) -> None:  # fmt: skip
    """distill-NAME.json: trains to the end in `work`, or goes on there, and measures every finished stage that has steps of its
    own, the last of each. The last student of a run that takes the scale is measured at `SCALES` too, with the first set of
    seeds as the guided teacher is."""
    run = Distiller(teacher, method, work, data if method.needs_data else None, HOW)
    total = sum(stage.updates for stage in run.stages)
    clock, began = work / "seconds.json", time.monotonic()
    before = float(json.loads(clock.read_text())) if clock.exists() else 0.0
    try:
        follow(run, View(run, max(total // LOOKS, 1), min(n, 128)), 60.0)
    finally:
        if (work / "state.pt").exists():
            files.write_text(clock, json.dumps(before + time.monotonic() - began) + "\n")
    finished = {stage.steps: work / f"stage-{i + 1}-steps-{stage.steps}.safetensors" for i, stage in enumerate(run.stages)}
    figures = Figures(teacher, n, scorer_for(teacher))
    rows = []
    if getattr(run.network, "step_counts", ()):  # the last student is all of them
        finished = dict([finished.popitem()])
    for path in finished.values():
        student = load(path)
        assert student.plan is not None
        plans = student.tuned or (student.plan,)
        for own in plans:
            rows.append({"line": name, **figures.row(student, own, SEEDS)})
            console.print(f"{name}, {own.nfe} calls: {path.name}", highlight=False)
    if getattr(student.network, "guidance_range", None) is not None:
        for own in (p for p in plans if p.nfe <= GUIDED[0]):
            for scale in SCALES:
                rows.append({"line": name, **figures.row(student, own, scale=scale)})
                console.print(f"{name}, {own.nfe} calls, scale {scale:g}", highlight=False)
    record = {
        "method": name, "settings": {**method.settings(), "bf16": HOW.bf16},
        "seconds": json.loads(clock.read_text()), "updates": total, "images": sum(s.updates * s.batch for s in run.stages),
        "units": sum(s.updates * s.batch * method.units(i) for i, s in enumerate(run.stages)),
        "skipped": run.skipped, "teacher": teacher.hash, "rows": rows, "versions": versions(),
    }  # fmt: skip
    files.write_text(out / f"distill-{name}.json", json.dumps(record, indent=1) + "\n")


def shipped_record(teacher: Denoiser, student: Denoiser, out: Path, n: int = MANY) -> None:
    """student.json: the shipped student at each of its numbers of calls, at the scale nearest to the data. Resumes after its
    rows."""
    path, figures = out / "student.json", Figures(teacher, n, scorer_for(teacher))
    same = {"student": student.hash, "teacher": teacher.hash, "n": n}
    kept = read(path) or {}
    rows = kept.get("rows", []) if {k: kept.get(k) for k in same} == same else []
    head = {**same, "floor": figures.scorer.anchor(n) if figures.scorer else None}
    for own in (p for p in student.tuned if p.nfe <= GUIDED[0] and all(r["nfe"] != p.nfe for r in rows)):
        rows.append({"line": "student", **figures.row(student, own, scale=NEAREST)})
        console.print(f"student, {own.nfe} calls, scale {NEAREST:g}", highlight=False)
        files.write_text(path, json.dumps({**head, "versions": versions(), "rows": rows}, indent=1) + "\n")
