"""Guidance scale against class accuracy, recall and FD-clf on the shipped model: a record and a picture.

    python benches/guidance.py                              # results/guidance/; 41,000 network calls a scale (n = 2,048)
    python benches/guidance.py --n 32 --scales 1 2 --out out/guidance      # a look; FD-clf needs n >= 2,048

A scale that the record holds already, of the same checkpoint, sampler and n, is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastdiff as fd
from fastdiff import files
from fastdiff.bench.cells import Setup
from fastdiff.bench.pictures import need_matplotlib
from fastdiff.bench.results import versions
from fastdiff.bench.scoring import JudgeScorer

SAMPLER = {"solver": "ipndm-3", "grid": "beta", "nfe": 10}  # 0.058 from the converged ODE without guidance (results/full)
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
KINDS: dict[str, Callable[[fd.Denoiser, float], fd.Denoiser]] = {
    "cfg": lambda den, scale: fd.guide.cfg(den, scale),
    "cfg, sigma/alpha in (0.3, 3]": lambda den, scale: fd.guide.cfg(den, scale, interval=(0.3, 3.0)),
    "apg": lambda den, scale: fd.guide.apg(den, scale),
}
FIGURES = {"class_accuracy": "class accuracy", "recall": "recall", "fd_clf": "FD-clf"}
HERE = Path(__file__).resolve().parent


def measure(den: fd.Denoiser, kind: str, scale: float, n: int, scorer: JudgeScorer) -> dict[str, Any]:
    """One row: the scores of n images, and the network calls that one of them took."""
    plan = fd.plan(SAMPLER["solver"], den, SAMPLER["nfe"], grid=SAMPLER["grid"])
    images, calls = [], 0
    for seeds, bound in Setup(n).batches(den):
        guided = bound if scale == 1.0 else KINDS[kind](bound, scale)
        calls = sum(guided.calls_at(row.t) for row in plan.rows)
        images.append(den.images(fd.sample(guided, plan, seeds=seeds)))
    return {"kind": kind, "scale": scale, "calls": calls, **scorer.score(torch.cat(images), Setup(n).labels(den))}


def record(out: Path, kinds: Sequence[str], scales: Sequence[float], n: int, compiled: bool) -> dict[str, Any]:
    """guidance.json in `out`, completed row by row."""
    den, scorer, path = fd.load("fashion-mnist"), JudgeScorer(), out / "guidance.json"
    den = den.compiled() if compiled else den
    head = {"checkpoint": den.hash, "sampler": SAMPLER, "n": n}
    kept = json.loads(path.read_text()) if path.exists() else {}
    rows = kept.get("rows", []) if {k: kept.get(k) for k in head} == head else []
    made = {**head, "versions": versions(), "anchor": scorer.anchor(n), "rows": rows}
    for kind in kinds:
        for scale in scales:
            if not any((row["kind"], row["scale"]) == (kind, scale) for row in rows):
                rows.append(measure(den, kind, scale, n, scorer))
                rows.sort(key=lambda row: (list(KINDS).index(row["kind"]), row["scale"]))
                out.mkdir(parents=True, exist_ok=True)
                files.write_text(path, json.dumps(made, indent=1) + "\n")
                print({k: row for k, row in rows[-1].items() if k in ("kind", "scale", "calls", *FIGURES)}, flush=True)
    return made


def picture(made: dict[str, Any], path: Path) -> None:
    """A panel a figure, a line a kind, real data dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        for kind in dict.fromkeys(row["kind"] for row in made["rows"]):
            points = [(r["scale"], r[key]) for r in made["rows"] if r["kind"] == kind and r[key] is not None]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", label=kind)
        if made["anchor"][key] is not None:
            axis.axhline(made["anchor"][key], color="black", linestyle=":", label="real data")
        axis.set(xlabel="guidance scale (1: none)", ylabel=label)
    figure.axes[0].legend()
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["cfg"])
    parser.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "guidance")
    given = parser.parse_args(argv)
    need_matplotlib()
    made = record(given.out, given.kinds, given.scales, given.n, given.compile)
    picture(made, given.out / "guidance.png")
    print(f"wrote {given.out}/guidance.json and guidance.png")


if __name__ == "__main__":
    main()
