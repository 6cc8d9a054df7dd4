"""At which NFE each solver reaches diffusers' own 50-step DDIM, on a model that diffusers itself trained and saved.

    python benches/diffusers_quality.py --data fashion_mnist.npz     # results/diffusers_quality.json; 10 minutes of one core

A small UNet2DModel is trained by diffusers' DDPM loss (16 x 16 Fashion-MNIST, 6 CPU minutes) and saved by
`DDPMPipeline.save_pretrained`; `fd.load` reads the folder as any user's. Quality is the paired error: the RMSE to where the
converged probability-flow ODE takes the same noise. diffusers' own run is `DDIMPipeline` with its defaults (eta 0, leading times,
50 steps; clipping off, which would be another equation). A folder that holds the trained pipeline already is not trained again.
The record's sentence stands in the README: `--readme` puts it there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import fastdiff as fd
from fastdiff import files
from fastdiff.bench import Bench, Setup
from fastdiff.bench.cells import cells
from fastdiff.bench.results import versions
from fastdiff.noise import normal

SIDE, BATCH = 16, 32
SOLVERS = ("ddim", "dpmpp-2m", "unipc-2", "ipndm-3", "deis-tab-3")
BUDGETS = (5, 6, 8, 10, 12, 16, 20)
THEIRS = (10, 20, 50)  # steps of diffusers' own DDIM; the last is what is to be reached
ROOT = Path(__file__).parents[1]
OUT = ROOT / "benches" / "results" / "diffusers_quality.json"
MARKS = "<!-- diffusers -->\n", "<!-- end of diffusers -->"


def images(path: Path) -> torch.Tensor:
    """(n, 1, 16, 16) in [-1, 1]: the middle 28 x 28 pixels padded to 32, halved."""
    with np.load(path, allow_pickle=False) as f:
        x = torch.from_numpy(f["x_train" if "x_train" in f else "x"][:20_000])
    x = F.pad(x.float().view(-1, 1, 28, 28) / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return F.avg_pool2d(x, 2)


def train(x: torch.Tensor, folder: Path, steps: int) -> None:
    """diffusers' model, scheduler and loss (its unconditional training example, without accelerate), saved as its pipeline."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=SIDE, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDPMScheduler(clip_sample=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    began, losses = time.process_time(), []
    for step in range(steps):
        clean = x[torch.randint(len(x), (BATCH,))]
        noise, t = torch.randn_like(clean), torch.randint(1000, (BATCH,))
        loss = F.mse_loss(model(scheduler.add_noise(clean, noise, t), t).sample, noise)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        optimiser.step()
        optimiser.zero_grad()
    DDPMPipeline(model.eval(), scheduler).save_pretrained(folder)
    made = {"steps": steps, "batch": BATCH, "loss_of_last_100": sum(losses[-100:]) / len(losses[-100:]),
            "cpu_seconds": round(time.process_time() - began)}  # fmt: skip
    files.write_text(folder / "training.json", json.dumps(made) + "\n")
    print(made, flush=True)


@torch.no_grad()
def their_ddim(folder: Path, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """What DDIMPipeline's loop makes of this noise."""
    from diffusers import DDIMPipeline, DDIMScheduler

    pipe = DDIMPipeline.from_pretrained(folder)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t).sample, t, x, eta=0.0).prev_sample
    return x


def compare(folder: Path, work: Path, n: int) -> dict[str, Any]:
    """Errors of our solvers and of diffusers' DDIM from the same n noises, and the fewest calls that reach its 50 steps."""
    den = fd.load(folder)
    bench = Bench(den, Setup(n, batch=64), work / "bench", None)
    bench.run(cells(SOLVERS, None, BUDGETS))
    ends = bench.reference.x.float()
    noise = normal(list(range(n)), 0, SIDE * SIDE).view(n, 1, SIDE, SIDE)
    theirs = {steps: float((their_ddim(folder, noise, steps) - ends).square().mean().sqrt()) for steps in THEIRS}
    errors = {s: {r["nfe"]: r["rmse"] for r in bench.records if r["solver"] == s} for s in SOLVERS}
    bar = theirs[THEIRS[-1]]
    reached = {s: min((nfe for nfe, e in found.items() if e <= bar), default=None) for s, found in errors.items()}
    grids = {r["solver"]: r["grid"] for r in bench.records}
    return {
        "n": n, "spread_of_the_images": float(ends.std()), "diffusers_ddim": theirs, "rmse": errors, "grids": grids,
        "nfe_that_reaches_ddim_50": reached, "converged": {k: bench.converged[k] for k in ("steps", "movement", "ok")},
    }  # fmt: skip


def sentence(record: dict[str, Any]) -> str:
    """What the record says, for the README."""
    best = THEIRS[-1]
    counts = sorted({n for n in record["nfe_that_reaches_ddim_50"].values() if n is not None})
    groups = [f"{' and '.join(f'`{s}`' for s, n in record['nfe_that_reaches_ddim_50'].items() if n == count)} with {count}"
              for count in counts]  # fmt: skip
    never = [f"`{s}`" for s, n in record["nfe_that_reaches_ddim_50"].items() if n is None]
    late = f"; {' and '.join(never)} not within {BUDGETS[-1]}" if never else ""
    ok = record["converged"]["ok"]
    how = "" if ok else " (upper bounds: the reference moves by more than a tenth of the smallest error)"
    return (
        f"On a small model that diffusers trained and saved ({record['training']['steps']:,} steps on 16x16 Fashion-MNIST), "
        f"diffusers' own DDIM lies {record['diffusers_ddim'][best]:.3f} from the converged ODE with {best} steps, "
        f"{record['diffusers_ddim'][THEIRS[0]]:.3f} with {THEIRS[0]} (RMSE, images from -1 to 1, n = {record['n']}).\n"
        f"The quality of its {best} is reached by {', '.join(groups) or 'none'} calls{late}{how} "
        "([record](benches/results/diffusers_quality.json))."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/diffusers"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--readme", type=Path, help="put the sentence between this file's marks")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--n", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, folder = time.process_time(), args.work / "pipeline"
    if not (folder / "training.json").exists():
        train(images(args.data), folder, args.steps)
    record = {**compare(folder, args.work, args.n), "training": json.loads((folder / "training.json").read_text())}
    record |= {"versions": versions(), "sentence": sentence(record), "cpu_seconds": round(time.process_time() - began)}
    files.write_text(args.out, json.dumps(record, indent=1) + "\n")
    if args.readme:
        before, rest = args.readme.read_text().split(MARKS[0])
        files.write_text(args.readme, before + MARKS[0] + record["sentence"] + "\n" + MARKS[1] + rest.split(MARKS[1])[1])
    print(f"{record['sentence']}\n{record['cpu_seconds']} CPU seconds")


if __name__ == "__main__":
    main()
