"""What fd.patch costs where no kernel runs: diffusers' U-Nets on the CPU, patched and not, in turns. The bar is 2 %.

    python benches/patching.py --rounds 40      # writes results/patching.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

import fastdiff as fd
from fastdiff.files import write_text

BAR = 1.02


def networks() -> dict[str, tuple[torch.nn.Module, tuple[Any, ...]]]:
    """A CIFAR-sized pixel U-Net and a small text-conditional latent one, with one call's arguments."""
    pixels = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(64, 128), layers_per_block=2, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    latents = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    t = torch.tensor([500])
    return {
        "pixels": (pixels, (torch.randn(1, 3, 32, 32), t)),
        "latents with text": (latents, (torch.randn(1, 4, 16, 16), t, torch.randn(1, 77, 64))),
    }


def measure(network: torch.nn.Module, example: tuple[Any, ...], rounds: int) -> dict[str, Any]:
    """Median milliseconds of a call by the processor's time, which other processes hardly stretch. One network, patched and
    undone in turns: a copy of it lies elsewhere in memory, which alone can make some percent."""
    report = fd.patch(network, example=example)
    report.undo()
    seen: dict[str, list[float]] = {"plain": [], "patched": []}
    with torch.inference_mode():
        for i in range(rounds + 2):
            for name in sorted(seen, reverse=bool(i % 2)):
                swapped = fd.patch(network) if name == "patched" else None
                network(*example)  # what patching left in the caches is gone
                began = time.thread_time()
                network(*example)
                if i >= 2:
                    seen[name].append(time.thread_time() - began)
                if swapped is not None:
                    swapped.undo()
    medians = {f"{name} ms": 1000 * statistics.median(times) for name, times in seen.items()}
    ratios = [p / q for p, q in zip(seen["patched"], seen["plain"], strict=True)]
    return {**medians, "ratio": statistics.median(ratios), "sites": len(report.sites), "error": report.error}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "patching.json")
    given = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {name: measure(net.eval(), example, given.rounds) for name, (net, example) in networks().items()}
    for name, row in results.items():
        print(f"{name}: {row['plain ms']:.1f} ms, patched {row['patched ms']:.1f} ms, ratio {row['ratio']:.3f} (bar {BAR})")
    setting = {"torch": torch.__version__, "diffusers": diffusers.__version__, "rounds": given.rounds, "load": os.getloadavg()[0]}
    write_text(given.out, json.dumps({"setting": setting, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
