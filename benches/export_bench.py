"""Engines against torch's eager mode and against a host loop over network.onnx, interleaved; written to results/export.json.

    python benches/export_bench.py                  # the shipped model, batch 1 and 16, unipc-2 at 8 calls
    python benches/export_bench.py --rounds 3 --batches 1 --busy --out out/export.json

Who: `eager` is fd.sample on torch, `host` is the same loop calling network.onnx, `engine` is sampler.onnx, `unrolled` the same
without a Loop. All run in turn in one process on the same threads, the order reversed every other round; medians of wall time.
BARS are printed beside them. A busy machine stretches all of them and not evenly: the load average is stored, and a run that
starts above MOST_LOAD is refused without --busy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastdiff as fd
from fastdiff.export.folder import Wish, export
from fastdiff.export.manifest import versions
from fastdiff.export.runtime import Engine
from fastdiff.files import write_text

BARS = ("engine / host at most 1.05; eager / engine at least 1.1 at batch 1, 1.3 at batch 16; export under 60 s; "
        "each file at most 600,000 bytes beyond its weights")  # fmt: skip
MOST_LOAD = 0.3
HERE = Path(__file__).resolve().parent


def loops(folder: Path, batch: int, threads: int, solver: str, nfe: int) -> dict[str, Callable[[], Any]]:
    """One call of each makes the same `batch` samples."""
    labels = torch.arange(batch) % 10
    seeds = list(range(batch))
    torch_model = fd.load("fashion-mnist").bind(class_labels=labels)
    plan = fd.plan(solver, torch_model, nfe)
    host = fd.load(folder / "loop").bind(class_labels=labels)
    host.engine = Engine(folder / "loop", "network", "cpu", threads)
    engines = {name: Engine(folder / name, "sampler", "cpu", threads) for name in ("loop", "unrolled")}
    return {
        "eager": lambda: fd.sample(torch_model, plan, seeds=seeds),
        "host": lambda: fd.sample(host, plan, seeds=seeds),
        "engine": lambda: engines["loop"].sample(seeds, labels.tolist()),
        "unrolled": lambda: engines["unrolled"].sample(seeds, labels.tolist()),
    }


def measure(made: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each, run in turn."""
    seen: dict[str, list[float]] = {name: [] for name in made}
    for call in made.values():
        call()
        call()
    for i in range(rounds):
        for name in sorted(made, reverse=bool(i % 2)):
            began = time.perf_counter()
            made[name]()
            seen[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seen.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    options.add_argument("--batches", default="1,16")
    options.add_argument("--solver", default="unipc-2")
    options.add_argument("--nfe", type=int, default=8)
    options.add_argument("--busy", action="store_true", help="measure even on a busy machine")
    options.add_argument("--out", type=Path, default=HERE / "results" / "export.json")
    given = options.parse_args()
    load = os.getloadavg()[0]
    if load > MOST_LOAD and not given.busy:
        sys.exit(f"the load average is {load:.2f}: timings would say nothing. Wait until it is below {MOST_LOAD}, or give --busy")
    torch.set_num_threads(given.threads)
    setting = {name: value for name, value in vars(given).items() if name != "out"}
    found: dict[str, Any] = {"setting": setting, "versions": versions(), "results": {}}
    found["bars"] = BARS
    found["machine"] = {"cpu": platform.processor(), "cores": os.cpu_count(), "load_average": load}
    with tempfile.TemporaryDirectory() as name:
        folder, den = Path(name), fd.load("fashion-mnist")
        began = time.perf_counter()
        manifest = export(den, fd.plan(given.solver, den, given.nfe), folder / "loop")
        found["export_seconds"] = time.perf_counter() - began
        weights = 4 * sum(p.numel() for p in den.network.parameters())
        found["bytes_beyond_the_weights"] = {n: manifest["files"][n]["bytes"] - weights for n in ("sampler.onnx", "network.onnx")}
        export(den, fd.plan(given.solver, den, given.nfe), folder / "unrolled", Wish(unroll=True))
        for batch in map(int, given.batches.split(",")):
            seconds = measure(loops(folder, batch, given.threads, given.solver, given.nfe), given.rounds)
            ratios = {f"{a} / {b}": seconds[a] / seconds[b] for a, b in (("engine", "host"), ("eager", "engine"))}
            found["results"][f"batch {batch}"] = {"seconds": seconds, "ratios": ratios}
            found["machine"]["load_average_after"] = os.getloadavg()[0]
            print(f"batch {batch}: " + ", ".join(f"{k} {1e3 * v:.1f} ms" for k, v in seconds.items()))
            print("  " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    print(f"bars: {BARS}")
    write_text(given.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
