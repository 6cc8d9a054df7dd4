"""Stage `export` of benches/gpu.sh: engines of the shipped model on a GPU, compared with the eager sampler and timed against it.

    benches/gpu.sh --only export                        # exports here: needs onnx, onnxscript and onnxruntime
    benches/gpu.sh --only export -- --engine FOLDER     # exported elsewhere: needs no onnx, no onnxscript

Every provider that is here is run: the folder's TensorRT engine, and ONNX
Runtime's tensorrt and cuda. Medians of rounds that take turns, the device synchronised on both ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_record import RESULTS, Record, now, show
from gpu_stage import SKIPPED

import fastdiff as fd
from fastdiff.errors import FastdiffError

PROVIDERS = ("engine", "tensorrt", "cuda")


def missing(exports: bool) -> str:
    """What this machine lacks, or ""."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no NVIDIA GPU"
    here = {n for n in ("onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx") if importlib.util.find_spec(n)}
    if exports and (lacking := {"onnx", "onnxscript", "onnxruntime"} - here):
        return f"not installed: {', '.join(sorted(lacking))} (pip install 'fastdiff[onnx]', or give --engine FOLDER)"
    if not here & {"onnxruntime", "tensorrt", "tensorrt_rtx"}:
        return "nothing here runs an engine: pip install onnxruntime-gpu or tensorrt"
    return ""


def made(folder: Path, nfe: int) -> Path:
    """The shipped model, exported for TensorRT where one is here."""
    from fastdiff.export.folder import Wish, export
    from fastdiff.export.tensorrt import FORMS, NotHere, flavour_of

    den, form = fd.load("fashion-mnist"), "onnx"
    for name in FORMS:
        try:
            flavour_of(name)
            form = name
            break
        except NotHere:
            continue
    export(den, fd.plan("unipc-2", den, nfe), folder / "engine", Wish(precision="fp16"), form)
    return folder / "engine"


def runs(folder: Path, batch: int) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What makes the same `batch` images, and why some providers do not."""
    from fastdiff.export.runtime import Engine
    from fastdiff.plans import Plan

    labels, seeds = torch.arange(batch, device="cuda") % 10, list(range(batch))
    den = fd.load("fashion-mnist").to("cuda").bind(class_labels=labels)
    plan = Plan.load(folder / "plan.json")
    found: dict[str, Callable[[], Any]] = {"eager": lambda: fd.sample(den, plan, seeds=seeds).cpu().numpy()}
    refused = {}
    for provider in PROVIDERS:
        try:
            engine = Engine(folder, provider=provider)
        except FastdiffError as e:
            refused[provider] = str(e)
            continue
        found[provider] = lambda engine=engine: engine.sample(seeds, labels.tolist())
    return found, refused


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn, after two runs that set up."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name in sorted(calls, reverse=bool(i % 2)):
            torch.cuda.synchronize()
            began = time.perf_counter()
            calls[name]()
            torch.cuda.synchronize()
            if i >= 2:
                seen[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seen.items()}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engine", type=Path, help="a folder that `fastdiff export` wrote of the shipped model")
    options.add_argument("--nfe", type=int, default=8)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--records", type=Path, default=RESULTS, help="folder of the record")
    given = options.parse_args()
    if why := missing(given.engine is None):
        print(f"export: skipped: {why}")
        return SKIPPED
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = given.engine or made(Path(name), given.nfe)
        built = json.loads((folder / "manifest.json").read_text())
        for batch in (1, 16):
            calls, refused = runs(folder, batch)
            images = {who: call() for who, call in calls.items()}
            for who, seconds in measure(calls, given.rounds).items():
                off = float(abs(images[who] - images["eager"]).max())
                rows.append({"batch": batch, "runs": who, "ms": 1000 * seconds, "largest_difference": off,
                             "precision": built["precision"], "nfe": given.nfe})  # fmt: skip
            rows += [{"batch": batch, "runs": who, "refused": why} for who, why in refused.items()]
    show(rows)
    Record.begin(given.records, stage="export", time=now()).add(*rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
