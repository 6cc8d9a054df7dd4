"""`make artefacts`: everything that follows from the shipped checkpoint, made again from it, in stages that can be resumed.

model       installs a new checkpoint beside its hash (only with --checkpoint)
converged   the endpoints of 256 seeds by which the demo measures paired errors without computing them
quality     the figures of the model itself: a converged sampler at n = 10,000, and with guidance at n = 2,048
quick, full the records of both presets, with their pictures; full-2048 the second half of the full preset, after it
card        the model card, from the checkpoint's own record and the figures above
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
from ..bench import Bench
from ..bench.cells import Cell, Setup, full_cells, quick_cells
from ..bench.converged import GRID as REFERENCE_GRID
from ..bench.converged import MOST_STEPS, SHIPPED_FILE, SOLVER, converge, rmse, shipped
from ..bench.results import versions
from ..bench.runner import PAIRED
from ..bench.scoring import JudgeScorer
from ..checkpoints import load, native
from ..denoiser import Denoiser
from ..sampling import sample
from ..shipped import FASHION_MNIST, write_hashed
from ..solvers import plan
from .bench import BEST, FEW, best, measure
from .console import console, progress_bar

STAGES = ("model", "converged", "quality", "quick", "full", "full-2048", "card")
QUALITY = {"solver": "ipndm-3", "grid": "beta", "nfe": 20}  # the converged sampler of the figures; its error is in the record
SCALES = (2.0,)
KEPT = ("results.json", "results.csv", "frontier.png", "samples.png")


def install(checkpoint: Path) -> None:
    """Copies a run's EMA weights into the package, after they were loaded once."""
    path = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    native.load(path)
    write_hashed(FASHION_MNIST / "model.safetensors", path.read_bytes())


def store_converged(denoiser: Denoiser, work: Path) -> None:
    """converged.npz: endpoints of the first 256 seeds, fine enough for an error as small as the best solver's at NFE 20."""
    setup = Setup(PAIRED)
    with progress_bar() as bar:
        task = bar.add_task("converged ODE", total=None)

        def endpoints(steps: int, n: int) -> torch.Tensor:
            path = work / f"endpoints-{denoiser.hash[:12]}-{steps}-{n}.npy"
            if not path.exists():
                out = []
                for seeds, den in Setup(n, batch=setup.batch).batches(denoiser):
                    out.append(sample(den, plan(SOLVER, den, steps, grid=REFERENCE_GRID), seeds=seeds).numpy())
                    bar.update(task, advance=steps * len(seeds))
                with files.atomic(path) as temporary, open(temporary, "wb") as f:
                    np.save(f, np.concatenate(out))
            return torch.from_numpy(np.load(path))

        probes = [Cell(s, g, 20) for s, g in (("unipc-2", "uniform_t"), ("ipndm-3", "beta"))]
        solutions = [_sample(denoiser, cell, PAIRED) for cell in probes]
        found = converge(endpoints, PAIRED, solutions)
    about = {
        "checkpoint": denoiser.hash, "solver": SOLVER, "grid": REFERENCE_GRID, "steps": found.steps, "movement": found.movement,
        "versions": versions(),
    }  # fmt: skip
    buffer = io.BytesIO()
    np.savez_compressed(buffer, about=np.array(json.dumps(about)), x=found.x.half().numpy())
    write_hashed(FASHION_MNIST / SHIPPED_FILE, buffer.getvalue())
    console.print(f"converged: {found.steps} of at most {MOST_STEPS} steps, the last doubling moved them by {found.movement:.5f}")


def _sample(denoiser: Denoiser, cell: Cell, n: int, scale: float = 1.0) -> torch.Tensor:
    table = cell.plan(denoiser)
    batches = Setup(n, guidance=scale).batches(denoiser)
    return torch.cat([sample(den, table, seeds=seeds) for seeds, den in batches])


def quality(denoiser: Denoiser, out: Path, sizes: tuple[int, int] = (10_000, 2048)) -> None:
    """quality.json: the model's own figures, with a sampler whose distance to the converged ODE is stated beside them."""
    scorer, cell = JudgeScorer(), Cell(QUALITY["solver"], QUALITY["grid"], QUALITY["nfe"])  # type: ignore[arg-type]
    path = out / "quality.json"
    record: dict[str, Any] = {"checkpoint": denoiser.hash, "sampler": QUALITY, "versions": versions(), "rows": []}
    head = None
    for n, scale in ((sizes[0], 1.0), *((sizes[1], s) for s in SCALES)):
        console.print(f"quality: n = {n}, guidance {scale:g}")
        x = _sample(denoiser, cell, n, scale)
        row = {"guidance": scale, **scorer.score(denoiser.images(x), Setup(n).labels(denoiser))}
        head = x[:PAIRED] if head is None else head
        record["rows"].append(row)
    record["anchors"] = {str(m): scorer.anchor(m) for m in sizes}
    stored = shipped(denoiser, PAIRED)
    if head is not None and stored is not None:
        record["rows"][0]["rmse"] = rmse(head, stored.x)
    files.write_text(path, json.dumps(record, indent=1) + "\n")


def preset(denoiser: Denoiser, name: str, work: Path, out: Path) -> None:
    """The record of a preset: its figures and pictures go to `out`, the cells stay in the work folder."""
    scorer = JudgeScorer()
    chosen, n = (quick_cells(), 128) if name == "quick" else (full_cells(), 256)
    if name == "full-2048":
        first = Bench(denoiser, Setup(n), work / "full", scorer)
        first.run(chosen)  # from the cells that `full` left, where it ran
        chosen, n = best(first, chosen), 2048
        console.print(f"the best {BEST} of each NFE up to {FEW} and DDIM, n = {n}")
    measure(denoiser, chosen, Setup(n), work / name, scorer)
    for file in KEPT:
        files.write_bytes(out / name / file, (work / name / file).read_bytes())


def card(denoiser: Denoiser, out: Path) -> None:
    """README.md beside the weights: how they were trained and what they reach, from the records."""
    training = denoiser.info["training"]
    record = json.loads((out / "quality.json").read_text())
    floor = record["anchors"]["10000"]
    rows = "\n".join(
        f"| {r['guidance']:g} | {r['n']:,} | {r['class_accuracy']:.1%} | {r['fd_clf']:.3f} | {1e3 * r['kid_clf']:.2f} | "
        f"{r['precision']:.3f} | {r['recall']:.3f} |"
        for r in record["rows"]
    )
    small = record["anchors"]["2048"]
    settings = {k: training[k] for k in ("steps", "batch", "lr", "warmup", "ema", "label_dropout", "clip", "seed")}
    network = json.dumps(training["network"])
    text = CARD.format(
        sha=denoiser.hash, images=training["images"], data=training["data_sha256"], settings=json.dumps(settings),
        parameters=sum(p.numel() for p in denoiser.network.parameters()),  # type: ignore[attr-defined]
        schedule=json.dumps(denoiser.schedule.config()), prediction=denoiser.prediction, network=network, rows=rows,
        floor=f"{floor['fd_clf']:.4f}", small_floor=f"{small['fd_clf']:.4f}", accuracy=f"{floor['class_accuracy']:.1%}",
        floor_precision=f"{floor['precision']:.3f}", floor_recall=f"{floor['recall']:.3f}",
        **record["sampler"], rmse=f"{record['rows'][0].get('rmse', float('nan')):.4f}", steps=training["steps"],
        batch=training["batch"], lr=training["lr"], seed=training["seed"],
    )  # fmt: skip
    files.write_text(FASHION_MNIST / "README.md", text)


CARD = """# Model card: class-conditional Fashion-MNIST, 28x28

A U-Net of {parameters:,} parameters in the ADM form, prediction `{prediction}`, schedule `{schedule}`; the EMA weights.
sha256 of model.safetensors: `{sha}`

Trained with fastdiff's own command on {images:,} images drawn from the 60,000 training images of Fashion-MNIST (MIT licence,
beside this file; sha256 of the .npz `{data}`), on two CPU cores:

    fastdiff train --data fashion_mnist.npz --out runs/fm --steps {steps} --batch {batch} --lr {lr} --seed {seed} --threads 1 \\
        --network '{network}'

The run was begun with a larger `--steps` and resumed with this one (a resume may change it, and the learning rate then falls to
0 at the new end), so the command alone gives a model like this one, not these bits. Settings: `{settings}`.

## Figures

By the judge (a classifier of {accuracy} test accuracy that took part in no loss), with `{solver}` on the `{grid}` grid at {nfe}
calls, whose endpoints lie {rmse} (RMSE, pixels from -1 to 1) from those of the converged ODE. Classes in turn, seeds from 0.

| guidance | n | class accuracy | FD-clf | KID-clf x1000 | precision | recall |
|---|---|---|---|---|---|---|
{rows}

Real test images against real training images, n = 10,000: FD-clf {floor}, precision {floor_precision}, recall {floor_recall};
n = 2,048: FD-clf {small_floor}. FD-clf depends on n: compare rows of one n only. It is not FID.

Made by `make artefacts`; uses: demonstrations, tests and benchmarks of samplers. It knows ten kinds of clothing and nothing else.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a training run's folder to install first")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, comma-separated")
    parser.add_argument("--records", type=Path, default=Path("benches/results"))
    parser.add_argument("--work", type=Path, default=Path("out/artefacts"), help="where finished cells are kept")
    args = parser.parse_args()
    stages = args.only.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; allowed: {', '.join(STAGES)}")
    if args.checkpoint and "model" in stages:
        install(args.checkpoint)
        shutil.rmtree(args.work, ignore_errors=True)
    denoiser = load("fashion-mnist")
    for stage in stages:
        if stage == "converged":
            store_converged(denoiser, args.work)
        elif stage == "quality":
            quality(denoiser, args.records)
        elif stage in ("quick", "full", "full-2048"):
            preset(denoiser, stage, args.work, args.records)
        elif stage == "card":
            card(denoiser, args.records)


if __name__ == "__main__":
    main()
