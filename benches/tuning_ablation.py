"""What each freedom, each number of pairs and each option of `fastdiff tune` is worth on the shipped model, at five calls.

    python benches/tuning_ablation.py [--data fashion_mnist.npz]     # results/tuned/ablation.json; half an hour on two cores

Every variant has the same start, seeds and number of steps; errors are on 512 seeds that no plan saw. Finished variants are
kept in the work folder. With --data the transfer to a fine-tuned checkpoint is measured too.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff import files
from fastdiff.bench.cells import Setup
from fastdiff.bench.results import versions
from fastdiff.bench.scoring import JudgeScorer
from fastdiff.cli.tuned import BUDGETS
from fastdiff.metrics import bootstrap, frechet_distance
from fastdiff.plans import Plan
from fastdiff.training.data import batch_indices, load_images
from fastdiff.training.losses import noised, sample_times
from fastdiff.tuning import LearnedTable, Pairs, SolverNodes, Table, TuneConfig, Tuner, make_pairs
from fastdiff.tuning.features import Distribution
from fastdiff.tuning.targets import endpoints, squared_errors

NFE, STEPS, START = 5, 60, ("unipc-3", "uniform_t")
TRAIN, HELD, TEST = 2_000_000, 1_000_000, 0  # first seeds
REAL = 2048  # real images that distances are measured to
HAND_MADE = [("ipndm-2", "beta"), ("ipndm-3", "beta"), ("unipc-3", "uniform_t"), ("ddim", "uniform_t")]
TRANSFERRED = 128  # seeds of the plans that are carried to another guidance or checkpoint
GUIDANCE = 2.0
FINE_TUNING_STEPS, FINE_TUNING_LR, FINE_TUNED_ON = 100, 1e-4, [5, 7, 9]  # batches of 64, of shoes only

# what is varied: (freedom, pairs, settings)
VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "full": ("full", 512, {}),
    "coefficients": ("coefficients", 512, {}),
    "nodes": ("nodes", 512, {}),
    "full, 128 pairs": ("full", 128, {}),
    "full, 2,048 pairs": ("full", 2048, {}),
    "full, relaxed target 0.02": ("full", 512, {"relax": 0.02}),
    "full, MMD term": ("full", 512, {"distribution": 1.0}),
    "full, squared error": ("full", 512, {"rounding": (8.0, 8.0)}),
}


def table(den: fd.Denoiser, freedom: str) -> Table:
    solver, grid = START
    if freedom == "nodes":
        return SolverNodes(solver, den.schedule, NFE, grid)
    return LearnedTable(fd.plan(solver, den, NFE, grid=grid), den.schedule, freedom)


def row(plan: Plan, test: Pairs) -> dict[str, Any]:
    """RMSE with its interval, and the MMD of random features, on the test pairs."""
    x = endpoints(plan, test)
    error = squared_errors(x, test.target).double()
    found = bootstrap(lambda rows: float(error[rows].mean().sqrt()), len(error))
    mmd = math.sqrt(float(Distribution(test.target).squared(x, test.target)))
    return {"rmse": found.value, "rmse_lo": found.lo, "rmse_hi": found.hi, "mmd": mmd, "n": len(error)}


def excess(plan: Plan, test: Pairs, scorer: JudgeScorer) -> dict[str, float]:
    """FD-clf of the plan's samples beyond that of the converged ODE's, against 2,048 real images."""

    def distance(x: Tensor) -> float:
        features = scorer.judge.features(test.denoiser.images(x) * 2 - 1).numpy()
        return frechet_distance(scorer.reference.train_features[:REAL], features)

    return {"fd_excess": distance(endpoints(plan, test)) - distance(test.target)}


def variants(
    den: fd.Denoiser, work: Path, pairs: Callable[[fd.Denoiser, Setup], Pairs], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Every variant in turn; `keep` is given all that is finished after each."""
    test, held = pairs(den, Setup(512, TEST)), pairs(den, Setup(256, HELD))
    scorer, out = JudgeScorer(), {}
    for solver, grid in HAND_MADE:
        plan = fd.plan(solver, den, NFE, grid=grid)
        out[f"hand-made: {solver} · {grid}"] = row(plan, test) | excess(plan, test, scorer)
    for name, (freedom, n, settings) in VARIANTS.items():
        path = work / f"{name.replace(' ', '_').replace(',', '')}.json"
        if not path.exists():
            config = TuneConfig(steps=STEPS, lr=0.05, validate_every=25, **settings)
            tuner = Tuner(table(den, freedom), [pairs(den, Setup(n, TRAIN))], [held], config)
            replace(tuner.run(), provenance={"seconds": tuner.seconds}).save(path)
        plan = Plan.load(path)
        about = {"freedom": freedom, "pairs": n, **settings, "seconds": plan.provenance["seconds"]}
        out[name] = about | row(plan, test) | excess(plan, test, scorer)
        print(name, json.dumps(out[name]), flush=True)
        keep({k: out[k] for k in sorted(out, key=lambda k: float(out[k]["rmse"]))})


def transfer(den: fd.Denoiser, others: fd.Denoiser, setup: Setup, pairs: Callable[[fd.Denoiser, Setup], Pairs]) -> dict[str, Any]:
    """The shipped tuned plans, made for `den` without guidance, on another denoiser or setup, beside hand-made ones."""
    test, out = pairs(others, setup), {}
    for nfe in (5, 8):
        plan = next(p for p in den.tuned if p.nfe == nfe)
        rows = {"tuned": row(plan, test)}
        rows |= {f"{s} · {g}": row(fd.plan(s, others, nfe, grid=g), test) for s, g in HAND_MADE}
        out[str(nfe)] = rows
        print(nfe, json.dumps({k: round(v["rmse"], 4) for k, v in rows.items()}), flush=True)
    return out


def fine_tuned(den: fd.Denoiser, data: Path, path: Path) -> fd.Denoiser:
    """The shipped network after a short training on some of its classes, by its own loss."""
    network = copy.deepcopy(den.network)
    assert isinstance(network, nn.Module)
    other = copy.copy(den)
    other.network, other.hash = network, "fine-tuned"
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return other
    images = load_images(data)
    assert images.y is not None
    kept = torch.isin(images.y, torch.tensor(FINE_TUNED_ON)).nonzero().flatten()
    network.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(network.parameters(), lr=FINE_TUNING_LR)
    generator = torch.Generator().manual_seed(0)
    for step in range(FINE_TUNING_STEPS):
        index = kept[batch_indices(len(kept), 64, step, 0)]
        x0, t = images.x[index].float() / 127.5 - 1, sample_times(den.schedule, len(index), "uniform", generator)
        x, _, _, sigma = noised(x0, t, den.schedule, generator)
        denoised = other.bind(class_labels=images.y[index])(x, t)
        loss = ((denoised - x0).square() / sigma.square()).mean()  # (D - x0)^2 / sigma^2 = (F - v)^2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    network.eval().requires_grad_(False)
    torch.save(network.state_dict(), path)
    return other


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    variants = record["variants"]
    n = next(iter(variants.values()))["n"]
    lines = [
        "# What tuning a plan is worth, piece by piece", "",
        f"The shipped model at {record['nfe']} calls, {record['steps']} Adam steps of 32 pairs from {record['start']}; errors on "
        f"{n} seeds that no plan saw, MMD in",
        "random features (0 = the converged ODE's own set of images); excess: FD-clf beyond the converged ODE's. "
        "Made by `python benches/tuning_ablation.py --data fashion_mnist.npz`; [record](ablation.json).", "",
        "| plan | pairs | RMSE, 95 % interval | MMD | excess | tuning took |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, r in variants.items():
        took = f"{r['seconds'] / 60:.1f} min" if "seconds" in r else "-"
        lines.append(f"| {name} | {r.get('pairs', '-')} | {_interval(r)} | {r['mmd']:.4f} | {r['fd_excess']:.3f} | {took} |")
    where = {"guidance": "under guidance, though tuned without", "fine_tuned": "after fine-tuning on three classes"}
    for key, title in where.items():
        if key in record:
            about = ", ".join(f"{k} {v}" for k, v in record[key].items() if not isinstance(v, dict))
            lines += ["", f"## The shipped tuned plans {title}", "", f"({about})", ""]
            lines += ["| calls | plan | RMSE | MMD |", "|---|---|---|---|"]
            for nfe in (k for k, v in record[key].items() if isinstance(v, dict)):
                ranked = sorted(record[key][nfe].items(), key=lambda item: item[1]["rmse"])
                lines += [f"| {nfe} | {name} | {_interval(r)} | {r['mmd']:.4f} |" for name, r in ranked]
    return "\n".join(lines) + "\n"


def _interval(r: dict[str, Any]) -> str:
    return f"{r['rmse']:.4f} [{r['rmse_lo']:.4f}, {r['rmse_hi']:.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the data set, to fine-tune on")
    parser.add_argument("--work", type=Path, default=Path("out/artefacts/ablation"))
    parser.add_argument("--cache", type=Path, default=Path("out/artefacts/tuned/pairs"))
    parser.add_argument("--out", type=Path, default=Path("benches/results/tuned/ablation.json"))
    args = parser.parse_args()
    den = fd.load("fashion-mnist")
    args.work.mkdir(parents=True, exist_ok=True)

    def pairs(d: fd.Denoiser, setup: Setup) -> Pairs:
        return make_pairs(d, setup, args.cache if d is den else args.work)

    record: dict[str, Any] = {
        "checkpoint": den.hash, "nfe": NFE, "steps": STEPS, "start": " · ".join(START), "versions": versions(),
    }  # fmt: skip

    def keep(**more: Any) -> None:
        record.update(more)
        files.write_text(args.out, json.dumps(record, indent=1) + "\n")
        files.write_text(args.out.parent / "ABLATION.md", markdown(record))

    assert {p.nfe for p in den.tuned} == set(BUDGETS)
    guided = transfer(den, den, Setup(TRANSFERRED, TEST, GUIDANCE), pairs)
    record["guidance"] = {"scale": GUIDANCE, **guided}
    if args.data:
        other = fine_tuned(den, args.data, args.work / "fine-tuned.pt")
        settings = {"steps": FINE_TUNING_STEPS, "batch": 64, "lr": FINE_TUNING_LR, "classes": FINE_TUNED_ON}
        record["fine_tuned"] = {**settings, **transfer(den, other, Setup(TRANSFERRED, TEST), pairs)}
    variants(den, args.work, pairs, lambda found: keep(variants=found))


if __name__ == "__main__":
    main()
