"""At which NFE each solver reaches diffusers' own 50-step DDIM, on a model that diffusers itself trained and saved.

    python benches/diffusers_quality.py --data fashion_mnist.npz --work out/diffusers

A small UNet2DModel is trained by diffusers' DDPM loss (16 x 16 Fashion-MNIST, a few CPU minutes) and saved by
`DDPMPipeline.save_pretrained`; `fd.load` reads the folder as any user's. Quality is the paired error: the RMSE to where the
converged probability-flow ODE takes the same noise. diffusers' own run is `DDIMPipeline` with its defaults (eta 0, leading times,
50 steps; clipping off, which would be another equation). Writes record.json into the work folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fastdiff as fd
from fastdiff.bench import Bench, Setup
from fastdiff.bench.cells import cells
from fastdiff.bench.results import versions
from fastdiff.noise import normal

SIDE = 16
SOLVERS = ("ddim", "dpmpp-2m", "unipc-2", "ipndm-3", "deis-tab-3")
BUDGETS = (5, 6, 8, 10, 12, 16, 20)


def images(path: Path) -> torch.Tensor:
    """(n, 1, 16, 16) in [-1, 1]: the middle 28 x 28 pixels padded to 32, halved."""
    with np.load(path, allow_pickle=False) as f:
        x = torch.from_numpy(f["x_train" if "x_train" in f else "x"][:20_000])
    x = F.pad(x.float().view(-1, 1, 28, 28) / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return F.avg_pool2d(x, 2)


def train(x: torch.Tensor, folder: Path, steps: int) -> float:
    """diffusers' model, scheduler and loss (its unconditional training example, without accelerate); seconds taken."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=SIDE, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDPMScheduler(clip_sample=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    began = time.monotonic()
    for step in range(steps):
        clean = x[torch.randint(len(x), (32,))]
        noise, t = torch.randn_like(clean), torch.randint(1000, (32,))
        loss = F.mse_loss(model(scheduler.add_noise(clean, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        optimiser.step()
        optimiser.zero_grad()
    DDPMPipeline(model.eval(), scheduler).save_pretrained(folder)
    print(f"trained {steps} steps in {time.monotonic() - began:.0f} s, last loss {loss.item():.4f}", flush=True)
    return time.monotonic() - began


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/diffusers"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--n", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.work / "pipeline"
    if not (folder / "model_index.json").exists():
        train(images(args.data), folder, args.steps)
    den = fd.load(folder)
    bench = Bench(den, Setup(args.n, batch=64), args.work / "bench", None)
    bench.run(cells(SOLVERS, None, BUDGETS))
    ends = bench.reference.x.float()
    noise = normal(list(range(args.n)), 0, SIDE * SIDE).view(args.n, 1, SIDE, SIDE)
    theirs = {steps: float((their_ddim(folder, noise, steps) - ends).square().mean().sqrt()) for steps in (10, 20, 50)}
    errors = {s: {r["nfe"]: r["rmse"] for r in bench.records if r["solver"] == s} for s in SOLVERS}
    reached = {s: min((n for n, e in found.items() if e <= theirs[50]), default=None) for s, found in errors.items()}
    record = {
        "n": args.n, "converged": {k: bench.converged[k] for k in ("steps", "movement", "ok")}, "diffusers_ddim": theirs,
        "rmse": errors, "nfe_that_reaches_ddim_50": reached, "versions": versions(),
    }  # fmt: skip
    (args.work / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"diffusers' DDIM, RMSE to the converged ODE: {theirs}")
    for solver, nfe in reached.items():
        found = ", ".join(f"{n}: {e:.4f}" for n, e in errors[solver].items())
        print(f"{solver:10} reaches its 50 steps at {nfe} calls: {found}")


if __name__ == "__main__":
    main()
