"""What `fd.fastest` is worth on this processor: the shipped U-Net in the variant that it chooses against torch's default.

    python benches/cpu.py                              # batch 1 and 16, on one thread and on all, without and with compile=True
    python benches/cpu.py --busy --out out/cpu.json    # even on a busy machine

It writes results/cpu.json. After the choice both are timed anew, in turns, the order turned around every other round: the median
of the rounds' ratios, beside BARS. `images` is how far the samples of 8 calls lie apart (root mean square; pixels from -1 to 1).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastdiff as fd
from fastdiff.bench.results import versions
from fastdiff.files import write_text

BARS = {1: 1.0, 16: 1.3}
MOST_LOAD = 0.3
HERE = Path(__file__).resolve().parent


@torch.no_grad()
def again(plain: fd.Denoiser, chosen: fd.Denoiser, batch: int, rounds: int) -> float:
    """How many times as fast the chosen variant's call is."""
    labels = torch.arange(batch) % plain.num_classes
    calls = [den.bind(class_labels=labels) for den in (plain, chosen)]
    assert plain.shape is not None
    x, ratios = torch.randn(batch, *plain.shape), []
    for i in range(rounds + 2):
        seconds = {}
        for k in sorted((0, 1), reverse=bool(i % 2)):
            began = time.perf_counter()
            calls[k](x, 0.5)
            seconds[k] = time.perf_counter() - began
        if i >= 2:
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def measure(batch: int, rounds: int, compile: bool) -> dict[str, Any]:
    torch._dynamo.reset()  # else what is compiled for a second batch size is compiled for any
    plain = fd.load("fashion-mnist")
    chosen, report = fd.fastest(plain, batch, compile=compile, seconds=5.0)
    print(report, flush=True)
    seeds, labels = range(batch), torch.arange(batch) % plain.num_classes
    plan = fd.plan("unipc-2", plain, nfe=8)
    x, y = (fd.sample(den.bind(class_labels=labels), plan, seeds=seeds) for den in (plain, chosen))
    ratio = 1.0 if chosen is plain else again(plain, chosen, batch, rounds)
    return {
        "chosen": report.chosen, "ratio": ratio, "images": float((x - y).square().mean().sqrt()), "ms": report.ms,
        "times": report.times, "errors": report.errors, "left": report.left,
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    options.add_argument("--busy", action="store_true", help="measure even on a busy machine")
    options.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    given = options.parse_args()
    load = os.getloadavg()[0]
    if load > MOST_LOAD and not given.busy:
        sys.exit(f"the load average is {load:.2f}: timings would say nothing. Wait until it is below {MOST_LOAD}, or give --busy")
    results = {}
    for threads, batch, compile in itertools.product(given.threads, BARS, (False, True)):
        torch.set_num_threads(threads)
        how = f"batch {batch}, threads {threads}{', compile asked for' if compile else ''}"
        found = results[how] = measure(batch, given.rounds, compile)
        print(f"{how}: {found['chosen']}, {found['ratio']:.2f} times torch's default (bar {BARS[batch]})", flush=True)
    setting = {"rounds": given.rounds, "bars": BARS, "load": load}
    write_text(given.out, json.dumps({"setting": setting, "versions": versions(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
