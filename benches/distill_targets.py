"""What a student of 4 calls gains when its targets come from a higher-order solver, at equal cost.

    python benches/distill_targets.py --data fashion_mnist.npz      # results/distill_targets.json; 45 minutes of one core

Progressive distillation of the shipped model into 4 steps, four ways to spend the same forward passes (a backward pass counts
two). The paper's: two DDIM steps of the teacher are one of the student's, from 8 steps at once or by halves from 16; and the
target of one stage by UniPC-2, with as many calls, or with twice as many and fewer updates. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import fastdiff as fd
from fastdiff import files
from fastdiff.bench.results import versions
from fastdiff.bench.scoring import scorer_for
from fastdiff.cli.distilled import Figures
from fastdiff.distill import Distiller, Progressive
from fastdiff.training.data import load_images

OUT = Path(__file__).parent / "results" / "distill_targets.json"
STEPS, PASSES, RATE, BATCH = 4, 3000, 3e-4, 16  # PASSES: forward passes of each image of the batch, over the whole run
WAYS: dict[str, dict[str, Any]] = {
    "DDIM, 2 calls": {"start": 8, "solver": "ddim", "calls": 2},
    "DDIM, 2 calls, by halves from 16": {"start": 16, "solver": "ddim", "calls": 2},
    "UniPC-2, 2 calls": {"start": 8, "solver": "unipc-2", "calls": 2},
    "UniPC-2, 4 calls": {"start": 8, "solver": "unipc-2", "calls": 4},
}


def method(start: int, solver: str, calls: int) -> Progressive:
    """As many updates a stage as the passes pay for: `calls` of the teacher, one forward and one backward pass of the student."""
    stages = (start // STEPS).bit_length() - 1
    updates = round(PASSES / stages / (calls + 3))
    return Progressive(start, STEPS, updates=updates, lr=RATE, batch=BATCH, solver=solver, calls=calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the training images")
    parser.add_argument("--work", type=Path, default=Path("out/distill_targets"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--n", type=int, default=2048)
    args = parser.parse_args()
    teacher, data = fd.load("fashion-mnist"), load_images(args.data)
    head = {"teacher": teacher.hash, "n": args.n, "passes": PASSES, "batch": BATCH, "lr": RATE}
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows: list[dict[str, Any]] = kept.get("rows", []) if {k: kept.get(k) for k in head} == head else []
    figures = Figures(teacher, args.n, scorer_for(teacher))
    for number, (name, way) in enumerate(WAYS.items()):
        if any(row["targets"] == name for row in rows):
            continue
        how, folder = method(**way), args.work / str(number)
        Distiller(teacher, how, folder, data).run()
        student = fd.load(folder / "model.safetensors")
        assert student.plan is not None
        row = figures.row(student, student.plan)
        rows.append({"targets": name, "updates": how.updates, "stages": len(how.stages()), **row})
        print(f"{name}: RMSE {row['rmse']:.4f}, FD-clf {row['fd_clf']:.3f}", flush=True)
        files.write_text(args.out, json.dumps({**head, "versions": versions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
