"""A better shipped checkpoint in minutes: the trainer of `fastdiff train` in bfloat16 on large batches, and its judgement.

    benches/gpu.sh --only train -- --data fashion_mnist.npz --out runs/fm      # or FASTDIFF_DATA=...; without --out $OUT/train

First the ways to compute a step are tried: torch's operations, our kernels, and the faster of the two through torch.compile. One
whose gradient lies further from the float32 one than it may is not taken, and the stage fails in the end. Then as many steps as
the time allows, the learning rate falling to 0 over them; the same command goes on from what --out holds. The new model and the
shipped one are judged on the same seeds. No file is larger than 15 MB: `state.pt` is left in parts, which are put together again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_networks import plain
from gpu_record import RESULTS, Record, now, show
from gpu_sampler import by_torch
from gpu_stage import SKIPPED, problem, start

import fastdiff as fd
from fastdiff.bench import Cell, Setup
from fastdiff.bench.scoring import scorer_for
from fastdiff.cli.running import interrupts, plot_losses
from fastdiff.errors import FastdiffError
from fastdiff.files import write_bytes
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Images, load_images
from fastdiff.training.trainer import Progress, Trainer

ROOT = Path(__file__).resolve().parent.parent
DATA = "FASTDIFF_DATA"
SETTINGS = {"batch": 512, "lr": 1e-3, "warmup": 500, "ema": 0.9995, "time_scale": 100.0, "bf16": True, "seed": 1}
NETWORK = {"model_channels": 32, "channel_mult": [1, 2, 3], "num_res_blocks": 1, "attention": [4], "head_channels": 32}
LARGEST, PART = 8_000_000, 15_000_000  # bytes of the model, and of any file
TRIED = 3.0  # seconds that a way is timed for
SHARE = 0.95  # of the time left is planned with: the learning rate should reach 0 before the time is up
JUDGING = 60.0  # seconds kept for what follows the training
LIMIT = 120.0  # seconds for a way to be tried
ALLOWED = 2.0  # times the error of torch's own gradient in bfloat16


@dataclasses.dataclass(frozen=True)
class Way:
    """How a step is computed."""

    ours: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        return ("our kernels" if self.ours else "torch") + (", compiled" if self.compiled else "")

    def operations(self) -> Any:
        return contextlib.nullcontext() if self.ours else plain()

    def trainer(self, config: TrainConfig, data: Images, out: Path, device: str) -> Trainer:
        made = Trainer(config, data, out, device=device)
        if self.compiled:
            torch._dynamo.reset()
            made.compile()
        return made


WAYS = {str(way): way for ours in (False, True) for compiled in (False, True) for way in (Way(ours, compiled),)}


def gradient(trainer: Trainer) -> torch.Tensor:
    """Of one batch, after every weight was moved: layers that start at zero would hide what lies before them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainer.network.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    trainer.network.train()
    trainer.loss(torch.Generator(trainer.device).manual_seed(0)).backward()
    return torch.cat([p.grad.double().flatten() for p in trainer.network.parameters() if p.grad is not None])


def rate(trainer: Trainer) -> float:
    """Images a second; every step ends with its loss on the host."""
    for _ in range(3):
        trainer.train_step()
    began, steps = time.monotonic(), 0
    while steps < 3 or time.monotonic() - began < TRIED:
        trainer.train_step()
        steps += 1
    return steps * trainer.config.batch / (time.monotonic() - began)


def attempt(way: Way, config: TrainConfig, data: Images, device: str) -> dict[str, Any]:
    """How far a way's gradient lies from that of torch's operations in float32, and how fast its steps are."""
    row: dict[str, Any] = {"what": "way", "way": str(way)}
    nowhere = Path(__file__) / "nowhere"  # what is tried is not saved
    try:
        with plain():
            right = gradient(Trainer(dataclasses.replace(config, bf16=False), data, nowhere, device=device))
        with way.operations():
            began = time.monotonic()
            trainer = way.trainer(config, data, nowhere, device)
            row["gradient error"] = ((gradient(trainer) - right).norm() / right.norm()).item()
            row["set up s"] = time.monotonic() - began
            row["images/s"] = rate(trainer)
    except Exception as e:  # another way may do
        traceback.print_exc()
        row["problem"] = problem(e)
    return row


def attempt_apart(way: Way, arguments: list[str]) -> dict[str, Any]:
    """The same in a process of its own: a kernel that writes where it must not spoils no other way."""
    row: dict[str, Any] = {"what": "way", "way": str(way)}
    command = [sys.executable, __file__, *arguments, "--way", str(way)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT, check=True)
    except subprocess.TimeoutExpired:
        return row | {"problem": f"not done in {LIMIT:.0f} s"}
    except subprocess.CalledProcessError as e:
        return row | {"problem": f"its process ended with {e.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def choose(run: Callable[[Way], dict[str, Any]], compile: bool) -> tuple[Way, list[dict[str, Any]]]:
    """The fastest way that has the right gradient, and what was seen of each."""
    tried: dict[Way, dict[str, Any]] = {}

    def fastest() -> Way:
        good = {way: row["images/s"] for way, row in tried.items() if "problem" not in row}
        if not good:
            sys.exit(f"no way to compute a step works: {list(tried.values())}")
        return max(good, key=lambda way: good[way])

    def consider(way: Way) -> None:
        row = tried[way] = run(way)
        own = tried[Way()].get("gradient error", 0.0)
        if "problem" not in row and not row["gradient error"] <= ALLOWED * own + 1e-6:
            row["problem"] = f"its gradient is further away than {ALLOWED:g} times torch's own"
        print(f"{way}: {row.get('problem') or format(row['images/s'], '.0f') + ' images/s'}", flush=True)

    consider(Way())
    consider(Way(ours=True))
    if compile:
        consider(dataclasses.replace(fastest(), compiled=True))
    return fastest(), list(tried.values())


def train(way: Way, speed: float, config: TrainConfig, data: Images, out: Path, device: str, deadline: float) -> dict[str, Any]:
    """The run itself; a signal or the deadline ends it after a step, and what is done is kept."""
    with way.operations(), interrupts() as interrupted:
        trainer = way.trainer(config, data, out, device)
        first, began = trainer.step, time.monotonic()
        planned = max(1, int(SHARE * (deadline - began) * speed / config.batch))
        trainer.config = dataclasses.replace(config, steps=first + planned)
        print(f"{way}: steps {first} to {first + planned} of {config.batch} images", flush=True)

        def watch(p: Progress) -> None:
            if p.step % max(planned // 10, 1) == 0:
                print(f"  step {p.step}: loss {p.loss:.4f}, {p.images_per_second:.0f} images/s", flush=True)
            if interrupted() or time.monotonic() > deadline:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            trainer.run(watch)
    seconds, model = time.monotonic() - began, out / "model.safetensors"
    plot_losses(trainer.losses, out / "loss.png")
    return {
        "what": "trained", "way": str(way), "images/s": (trainer.step - first) * config.batch / seconds, "seconds": seconds,
        "from step": first, "steps": trainer.step, "planned": first + planned, "batch": config.batch,
        "loss": statistics.fmean(trainer.losses[-100:]), "skipped": trainer.skipped, "bytes": model.stat().st_size,
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
    }  # fmt: skip


def judged(checkpoint: str | Path, n: int, device: str) -> dict[str, Any]:
    """What the judge of the model card says of n samples made by torch's operations; nothing where it does not know the data."""
    den = fd.load(checkpoint).to(device)
    scorer = scorer_for(den)
    if scorer is None:
        return {}
    setup = Setup(n, batch=1024)
    table = Cell("ipndm-3", "beta", 20).plan(den)
    with plain(), by_torch():
        x = torch.cat([fd.sample(part, table, seeds=seeds) for seeds, part in setup.batches(den)])
    found = scorer.score(den.images(x), setup.labels(den))
    return {name: found[name] for name in ("n", "class_accuracy", "fd_clf", "kid_clf", "recall")}


def split(path: Path) -> None:
    """A file above PART bytes, where there is one -> parts that are not, path.0 and on."""
    data = path.read_bytes() if path.exists() else b""
    if len(data) <= PART:
        return
    for i in range(0, len(data), PART):
        write_bytes(path.with_name(f"{path.name}.{i // PART}"), data[i : i + PART])
    path.unlink()


def join(path: Path) -> None:
    """The opposite of `split`; where the whole file is there, its parts are of before."""
    parts = [part for i in range(1000) if (part := path.with_name(f"{path.name}.{i}")).exists()]
    if parts and not path.exists():
        write_bytes(path, b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()


def data_file(given: Path | None) -> Path:
    """The training images; ends the stage as skipped, with one line, where they are not there."""
    if given is None and DATA in os.environ:
        given = Path(os.environ[DATA])
    shared = Path("shared/data/fashion_mnist.npz")
    places = [given] if given else [ROOT / shared, ROOT.parent / shared]
    for place in places:
        if place.exists():
            return place
    print(f"train needs the training images, fashion_mnist.npz: not at {' or '.join(map(str, places))}; give --data or {DATA}")
    sys.exit(SKIPPED)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"the training images (.npz); default {DATA}, then shared/data")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")) / "train", help="the run's folder")
    parser.add_argument("--seconds", type=float, default=420.0, help="of the whole stage, the choice and the judgement with it")
    parser.add_argument("--batch", type=int, default=SETTINGS["batch"])
    parser.add_argument("--network", type=json.loads, default=NETWORK, help="JSON of U-Net settings")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="try torch.compile too")
    parser.add_argument("--judge", type=int, default=2048, help="samples that are judged; 0: none")
    parser.add_argument("--device", default="cuda", help="cpu for a dry run")
    parser.add_argument("--records", type=Path, default=RESULTS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # tried and told of, nothing else
    return parser


def stage(given: argparse.Namespace, began: float, arguments: list[str], rows: list[dict[str, Any]]) -> None:
    """Chooses, trains and judges; what is known so far is in rows."""
    file = data_file(given.data)
    data = load_images(file)
    config = TrainConfig(**{**SETTINGS, "steps": 10**6, "batch": given.batch, "network": given.network})
    if given.way is not None:
        print(json.dumps(attempt(WAYS[given.way], config, data, given.device)))
        return

    def run(way: Way) -> dict[str, Any]:
        if given.device == "cpu":
            return attempt(way, config, data, given.device)
        return attempt_apart(way, [*arguments, "--data", str(file)])

    way, seen = choose(run, given.compile)
    rows += seen
    speed = next(row["images/s"] for row in rows if row["way"] == str(way))
    deadline = began + given.seconds - (JUDGING if given.judge else 0.0)
    join(given.out / "state.pt")
    try:
        rows.append(train(way, speed, config, data, given.out, given.device, deadline))
    finally:
        split(given.out / "state.pt")
    if rows[-1]["bytes"] > LARGEST:
        rows[-1]["problem"] = f"larger than the {LARGEST} bytes that may be shipped"
    if given.judge:
        rows[-1] |= judged(given.out, given.judge, given.device)
        rows.append({"what": "shipped", **judged("fashion-mnist", given.judge, given.device)})


def main(arguments: list[str] | None = None) -> int:
    began, rows = time.monotonic(), []
    arguments = sys.argv[1:] if arguments is None else arguments
    given = options().parse_args(arguments)
    if given.device != "cpu":
        start()
    try:
        stage(given, began, arguments, rows)
    except FastdiffError as e:
        print(f"train: {e}")
        return 2
    finally:
        if rows:
            show(rows)
            Record.begin(given.records, stage="train", time=now()).add(*rows)
    if rows:
        print(f"to ship it: python -m fastdiff.cli.artefacts --checkpoint {given.out}")
    return int(any("problem" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
