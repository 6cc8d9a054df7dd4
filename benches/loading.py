"""What loading costs: peak memory against the size of the weights, and seconds, beside diffusers' own from_pretrained.

    python benches/loading.py [--channels 256] [--work out/loading]

A UNet2DModel of random weights is saved by diffusers; each loader runs in a process of its own, after all imports. Peak is the
growth of the process' high-water mark (VmHWM), mapped pages of the file included. The bar: at most 1.2 times the weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CHILD = """
import json, sys, time, resource
from pathlib import Path
def status(key):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key)) * 1024
import torch, diffusers
from diffusers import UNet2DModel
import fastdiff as fd
fd.load(sys.argv[3])  # a tiny folder first: every import of the path is done
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here
before, began = status("VmRSS"), time.perf_counter()
x = fd.load(sys.argv[2]) if sys.argv[1] == "fastdiff" else UNet2DModel.from_pretrained(sys.argv[2])
seconds = time.perf_counter() - began
print(json.dumps({"peak": status("VmHWM") - before, "seconds": seconds}))
"""


def save(folder: Path, channels: int) -> int:
    """A model's folder with its scheduler; the bytes of its weights."""
    from diffusers import DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    model = UNet2DModel(sample_size=32, block_out_channels=(channels, 2 * channels, 2 * channels), **blocks)
    model.save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("out/loading"))
    args = parser.parse_args()
    size = save(args.work / "model", args.channels)
    save(args.work / "tiny", 32)
    for loader in ("fastdiff", "diffusers"):
        command = [sys.executable, "-c", CHILD, loader, str(args.work / "model"), str(args.work / "tiny")]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        print(f"{loader:9} peak {found['peak'] / size:.2f} x the weights ({size / 1e6:.0f} MB), {found['seconds']:.2f} s")


if __name__ == "__main__":
    main()
