"""Student updates per second of the distiller against a hand-written loop with the same network calls, interleaved.

`python benches/distill_bench.py` writes results/distill_bench.json, the medians and their ratio (the bar: at least 0.9);
progressive distillation of the shipped model, two DDIM steps of the teacher and one forward and backward pass of the student an
update.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastdiff as fd
from fastdiff import files
from fastdiff.bench.results import versions
from fastdiff.distill import Distiller, Progressive
from fastdiff.training.data import Images

OUT = Path(__file__).parent / "results" / "distill_bench.json"
STEPS = 8
BAR = 0.9  # student updates per second, of a hand-written loop's


def by_hand(teacher: fd.Denoiser, data: Images, batch: int) -> Callable[[], None]:
    """One update as a user would write it for this teacher: v prediction, cosine schedule, labels."""
    net = teacher.network
    student = copy.deepcopy(net).requires_grad_(True)
    adam, schedule = torch.optim.Adam(student.parameters(), lr=2e-4), teacher.schedule
    times = torch.linspace(schedule.t_max, schedule.t_min, 2 * STEPS + 1, dtype=torch.float64)
    alphas, sigmas = (f(times).float().view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))

    def predict(network: torch.nn.Module, z: torch.Tensor, i: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return alphas[i] * z - sigmas[i] * network(z, (times[i] * 1000).float(), y)

    def update() -> None:
        index = torch.randint(len(data.x), (batch,))
        x0, y = data.x[index].float() / 127.5 - 1, data.y[index]
        i = 2 * torch.randint(STEPS, (batch,))
        z = alphas[i] * x0 + sigmas[i] * torch.randn_like(x0)
        with torch.no_grad():
            w = z
            for k in (0, 1):
                ratio = sigmas[i + k + 1] / sigmas[i + k]
                w = ratio * w + (alphas[i + k + 1] - alphas[i + k] * ratio) * predict(net, w, i + k, y)
            ratio = sigmas[i + 2] / sigmas[i]
            goal = (w - ratio * z) / (alphas[i + 2] - ratio * alphas[i])
        weight = (alphas[i] / sigmas[i]).square().clamp_min(1)
        loss = (weight * (predict(student, z, i, y) - goal).square()).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        adam.step()
        loss.item()

    return update


def measure(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each update, in turns; a first round, not kept, warms up. On one thread its own time, not the wall's."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, update in list(candidates.items())[:: 1 if number % 2 else -1]:
            begin = clock()
            update()
            if number:
                seconds[name].append(clock() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    teacher = fd.load("fashion-mnist")
    pixels = torch.randint(0, 256, (512, 1, 28, 28), dtype=torch.uint8)
    data = Images(pixels, torch.arange(512) % 10, (), "random")
    with tempfile.TemporaryDirectory() as folder:
        run = Distiller(teacher, Progressive(2 * STEPS, STEPS, updates=10_000, batch=args.batch), Path(folder), data)
        candidates = {"by hand": by_hand(teacher, data, args.batch), "distiller": lambda: run.step(run.stages[0])}
        medians = {name: statistics.median(values) for name, values in measure(candidates, args.rounds).items()}
    record = {
        "batch": args.batch, "rounds": args.rounds, "load_average": os.getloadavg()[0], "versions": versions(), "bar": BAR,
        "updates_per_second": {name: 1 / value for name, value in medians.items()},
        "ratio": medians["by hand"] / medians["distiller"],
    }  # fmt: skip
    files.write_text(args.out, json.dumps(record, indent=1) + "\n")
    for name, value in medians.items():
        print(f"{name}: {1 / value:.2f} updates/s of {args.batch} images ({torch.get_num_threads()} threads)")
    print(f"distiller / by hand: {record['ratio']:.3f} (bar: {BAR})")


if __name__ == "__main__":
    main()
