"""`make artefacts`: everything that follows from the shipped checkpoint, made again from it, in stages that can be resumed.

model       installs a new checkpoint beside its hash (only with --checkpoint)
converged   the endpoints of 256 seeds by which the demo measures paired errors without computing them
quality     the figures of the model itself: a converged sampler at n = 10,000, and with guidance at n = 2,048
quick, full the records of both presets, with their pictures; full-2048 the second half of the full preset, after it
plans       the plans tuned for the checkpoint at 4 to 10 calls; tuned: their record on 2,048 seeds beside the best of a search
student     the figures of the shipped few-step student at n = 10,000; with --student a new one is installed first
analytic    the record of every solver on every grid at every budget on analytic data: needs no checkpoint
distill-*   students, by `--only` alone: see `fastdiff.cli.distilled` (they need --data)
card        the model card and the README's figures, from the checkpoint's own record and those above
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import files
from ..bench import Bench, analytic
from ..bench.cells import Cell, Setup, full_cells, quick_cells, student_cells, tuned_cells
from ..bench.converged import GRID, SHIPPED_FILE, SOLVER, rmse, shipped
from ..bench.results import versions
from ..bench.runner import PAIRED
from ..bench.scoring import JudgeScorer
from ..checkpoints import load, native
from ..denoiser import Denoiser
from ..sampling import sample
from ..shipped import FASHION_MNIST, STUDENT, write_hashed
from ..training.data import load_images
from . import distilled, figures, student_tables, tuned
from .bench import BEST, FEW, best, measure
from .console import console, progress_bar

STAGES = ("model", "converged", "quality", "plans", "tuned", "quick", "full", "full-2048", "student", "analytic", "card")
STUDENTS = ("distill-teacher", *(f"distill-{name}" for name in distilled.RECIPES), "distill-table")  # only by name: hours
QUALITY = {"solver": "ipndm-3", "grid": "beta", "nfe": 20}  # the converged sampler of the figures; its error is in the record
PROBES = [Cell("unipc-2", "uniform_t", 20), Cell("ipndm-3", "beta", 20)]  # the smallest errors that a preset reports
SIZES = ((10_000, 1.0), (2048, 2.0))  # (n, guidance): what the model card says
KEPT = ("results.json", "results.csv", "frontier.png", "samples.png")


def install(checkpoint: Path, folder: Path = FASHION_MNIST) -> None:
    """Copies a run's weights into the package, after they were loaded once."""
    path = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    native.load(path)
    write_hashed(folder / "model.safetensors", path.read_bytes())


def store_converged(denoiser: Denoiser, work: Path) -> None:
    """converged.npz: endpoints of the first 256 seeds, fine enough for an error as small as the best solver's at NFE 20."""
    if shipped(denoiser, PAIRED) is not None:
        console.print("converged: made for this checkpoint already")
        return
    bench = Bench(denoiser, Setup(PAIRED), work / "converged", None)
    with progress_bar() as bar:
        task = bar.add_task("converged ODE", total=bench.cost(PROBES))
        bench.run(PROBES, lambda what, evaluations: bar.update(task, advance=evaluations, description=what))
    found = bench.reference
    about = {
        "checkpoint": denoiser.hash, "solver": SOLVER, "grid": GRID, "steps": found.steps, "movement": found.movement,
        "versions": versions(),
    }  # fmt: skip
    buffer = io.BytesIO()
    np.savez_compressed(buffer, about=np.array(json.dumps(about)), x=found.x.half().numpy())
    write_hashed(FASHION_MNIST / SHIPPED_FILE, buffer.getvalue())
    console.print(f"converged: {found.steps} steps, the last doubling moved them by {found.movement:.5f}")


def _sample(denoiser: Denoiser, cell: Cell, n: int, scale: float = 1.0) -> torch.Tensor:
    table = cell.plan(denoiser)
    batches = Setup(n, guidance=scale).batches(denoiser)
    return torch.cat([sample(den, table, seeds=seeds) for seeds, den in batches])


def quality(denoiser: Denoiser, out: Path) -> None:
    """quality.json: the model's own figures, with a sampler whose distance to the converged ODE is stated beside them."""
    scorer, cell = JudgeScorer(), Cell(QUALITY["solver"], QUALITY["grid"], QUALITY["nfe"])  # type: ignore[arg-type]
    path = out / "quality.json"
    head = {"checkpoint": denoiser.hash, "sampler": QUALITY}
    kept = json.loads(path.read_text()) if path.exists() else {}
    rows = kept.get("rows", []) if {k: kept.get(k) for k in head} == head else []
    for n, scale in SIZES:
        if any(row["n"] == n and row["guidance"] == scale for row in rows):
            continue
        console.print(f"quality: n = {n}, guidance {scale:g}")
        x = _sample(denoiser, cell, n, scale)
        rows.append({"guidance": scale, **scorer.score(denoiser.images(x), Setup(n).labels(denoiser))})
        files.write_text(path, json.dumps({**head, "rows": rows}, indent=1) + "\n")
    stored = shipped(denoiser, PAIRED)
    error = None if stored is None else rmse(_sample(denoiser, cell, PAIRED), stored.x)
    anchors = {str(n): scorer.anchor(n) for n, _ in SIZES}
    record = {**head, "rmse": error, "versions": versions(), "anchors": anchors, "rows": rows}
    files.write_text(path, json.dumps(record, indent=1) + "\n")


def cross_product(out: Path) -> None:
    """analytic.json: the cross product of solvers, grids and budgets on data whose denoiser is known."""
    with progress_bar() as bar:
        task = bar.add_task("analytic", total=None)
        record = analytic.measure(progress=lambda name, cells: bar.update(task, advance=cells, description=name))
    files.write_text(out / "analytic.json", analytic.to_json({**record, "versions": versions()}))


def preset(denoiser: Denoiser, name: str, work: Path, out: Path, compile: bool) -> None:
    """The record of a preset: its figures and pictures go to `out`, the cells stay in the work folder."""
    scorer = JudgeScorer()
    chosen, n = (quick_cells(), 128) if name == "quick" else (full_cells(), 256)
    chosen += [*tuned_cells(denoiser, Setup(n)), *student_cells(load("fashion-mnist-student"), denoiser, Setup(n))]
    if name == "full-2048":
        first = Bench(denoiser, Setup(n), work / "full", scorer)
        first.run(chosen)  # from the cells that `full` left, where it ran
        chosen, n = best(first, chosen), 2048
        console.print(f"the best {BEST} of each NFE up to {FEW} and DDIM, n = {n}")
    measure(denoiser, chosen, Setup(n), work / name, scorer, compile=compile)
    for file in KEPT:
        files.write_bytes(out / name / file, (work / name / file).read_bytes())


def card(denoiser: Denoiser, out: Path) -> None:
    """README.md beside the weights: how they were trained and what they reach, from the records."""
    training = denoiser.info["training"]
    record = json.loads((out / "quality.json").read_text())
    rows = [_card_row(f"{row['guidance']:g}", row) for row in record["rows"]]
    rows += [_card_row("real test images", row) for row in record["anchors"].values()]
    settings = {k: training[k] for k in ("steps", "batch", "lr", "warmup", "ema", "label_dropout", "clip", "seed")}
    text = CARD.format(
        sha=denoiser.hash, images=training["images"], data=training["data_sha256"], settings=json.dumps(settings),
        parameters=sum(p.numel() for p in denoiser.network.parameters()),  # type: ignore[attr-defined]
        schedule=json.dumps(denoiser.schedule.config()), prediction=denoiser.prediction,
        network=json.dumps(training["network"]), rows="\n".join(rows), rmse=f"{record['rmse']:.4f}",
        accuracy=f"{record['anchors']['10000']['class_accuracy']:.1%}", **record["sampler"], **trained(training),
        **{k: training[k] for k in ("steps", "batch", "lr", "seed")},
    )  # fmt: skip
    files.write_text(FASHION_MNIST / "README.md", text)


def student_card(out: Path) -> None:
    """README.md beside the student's weights, from its record."""
    record = json.loads((out / "student.json").read_text())
    files.write_text(STUDENT / "README.md", student_tables.card(load("fashion-mnist-student"), record))


def trained(training: dict[str, Any]) -> dict[str, str]:
    """Where and how a checkpoint was trained: the machine, further options, and what became of `--steps`."""
    if "device" not in training:
        begun = "The run was begun with a larger `--steps` and resumed with this one"
        return {"machine": "two CPU cores", "how": "--threads 1", "begun": begun}
    how = f"--warmup {training['warmup']} --ema {training['ema']} --time-scale {training['time_scale']:g} --device cuda"
    begun = "`benches/gpu.sh --only train` set `--steps` by the time that it had"
    return {"machine": f"one {training['device']}", "how": how + " --bf16" * training["bf16"], "begun": begun}


def students(denoiser: Denoiser, what: str, data: Path | None, work: Path, out: Path) -> None:
    """One of the stages of `distilled`."""
    if what == "teacher":
        distilled.teacher_record(denoiser, out)
    elif what == "table":
        files.write_text(out / "DISTILL.md", student_tables.table(out, list(distilled.RECIPES)))
    else:
        images = load_images(data) if data else None
        distilled.student_record(denoiser, what, distilled.RECIPES[what], images, work / f"distill-{what}", out)


def _card_row(name: str, row: dict[str, Any]) -> str:
    distance = "-" if row["fd_clf"] is None else f"{row['fd_clf']:.4f}"
    kid = f"{1e3 * row['kid_clf']:.2f} ± {1e3 * row['kid_error']:.2f}"
    shares = f"{row['precision']:.3f} | {row['recall']:.3f}"
    return f"| {name} | {row['n']:,} | {row['class_accuracy']:.1%} | {distance} | {kid} | {shares} |"


CARD = """# Model card: class-conditional Fashion-MNIST, 28x28

A U-Net of {parameters:,} parameters in the ADM form, prediction `{prediction}`, schedule `{schedule}`; the EMA weights.
sha256 of model.safetensors: `{sha}`

Trained with fastdiff's own command on {images:,} images drawn from the 60,000 training images of Fashion-MNIST (MIT licence,
beside this file; sha256 of the .npz `{data}`), on {machine}:

    fastdiff train --data fashion_mnist.npz --out runs/fm --steps {steps} --batch {batch} --lr {lr} --seed {seed} {how} \\
        --network '{network}'

{begun} (a resume may change it, and the learning rate then falls to
0 at the new end), so the command alone gives a model like this one, not these bits. Settings: `{settings}`.

## Figures

By the judge (a classifier of {accuracy} test accuracy that took part in no loss), with `{solver}` on the `{grid}` grid at {nfe}
calls, whose endpoints lie {rmse} (RMSE, pixels from -1 to 1) from those of the converged ODE. Classes in turn, seeds from 0;
guidance 1 is none.

| guidance | n | class accuracy | FD-clf | KID-clf · 1000 | precision | recall |
|---|---|---|---|---|---|---|
{rows}

FD-clf, precision and recall depend on n: compare rows of one n only. FD-clf is not FID. The rows of real test images say what a
perfect model would get at the same n; their accuracy is the judge's own.

Made by `make artefacts`; uses: demonstrations, tests and benchmarks of samplers. It knows ten kinds of clothing and nothing else.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a training run's folder to install first")
    parser.add_argument("--student", type=Path, help="a distillation run's folder to install first, for the stage student")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, comma-separated")
    parser.add_argument("--records", type=Path, default=Path("benches/results"))
    parser.add_argument("--work", type=Path, default=Path("out/artefacts"), help="where finished cells are kept")
    parser.add_argument("--data", type=Path, help="the training images, for the students of distill-METHOD")
    parser.add_argument("--compile", action="store_true", help="run the network of the long records through torch.compile")
    args = parser.parse_args()
    stages = args.only.split(",")
    if unknown := set(stages) - {*STAGES, *STUDENTS}:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; allowed: {', '.join((*STAGES, *STUDENTS))}")
    if args.checkpoint and "model" in stages:
        install(args.checkpoint)
        shutil.rmtree(args.work, ignore_errors=True)
    if args.student and "student" in stages:
        install(args.student, STUDENT)
    denoiser = load("fashion-mnist")
    for stage in stages:
        if stage == "converged":
            store_converged(denoiser, args.work)
        elif stage == "quality":
            quality(denoiser, args.records)
        elif stage in ("quick", "full", "full-2048"):
            preset(denoiser, stage, args.work, args.records, args.compile)
        elif stage == "plans":
            tuned.plans(denoiser, args.work / "tuned")
            denoiser = load("fashion-mnist")
        elif stage == "tuned":
            tuned.tuned(denoiser, args.work, args.records, args.compile)
        elif stage in STUDENTS:
            students(denoiser, stage.removeprefix("distill-"), args.data, args.work, args.records)
        elif stage == "student":
            distilled.shipped_record(denoiser, load("fashion-mnist-student"), args.records)
        elif stage == "analytic":
            cross_product(args.records)
        elif stage == "card":
            card(denoiser, args.records)
            student_card(args.records)
            figures.write(args.records.parent.parent / "README.md", args.records)


if __name__ == "__main__":
    main()
