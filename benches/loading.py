"""What loading costs in memory: the peak of fd.load and one call of the network, against the size of the weights.

    python benches/loading.py     # results/loading.json; five minutes, 2 GB of files under out/loading, needs diffusers

A network of random weights is written in each container. A process of its own loads it, after a tiny one of the same kind (so
that all imports and libraries are there), and runs it once, so that every mapped page was touched. Counted is the growth of the
process' high-water mark (VmHWM), mapped pages of the file included. The bar: at most 1.2 times the weights. Two controls: a
loader that reads the file and copies it shows about 2 by the same measure; and diffusers' own from_pretrained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff import files
from fastdiff.bench.results import versions
from fastdiff.checkpoints import native
from fastdiff.models import UNet, UNetConfig

OUT = Path(__file__).parent / "results" / "loading.json"
BAR, COPIES = 1.2, 1.9  # times the weights: the most of fd.load, the least of the copying control
SIDE = 8  # pixels: what the network computes is small beside its weights


# the files: each writer makes one of `channels` under a folder and gives the path that is loaded


def _diffusers(folder: Path, channels: int, dtype: torch.dtype = torch.float32, **how: bool) -> Path:
    from diffusers import DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    model = UNet2DModel(sample_size=SIDE, block_out_channels=(channels, 2 * channels, 2 * channels), **blocks)
    for p in model.parameters():
        p.data = p.data.to(dtype)  # model.to(dtype) would warn of modules that this class does not have
    model.save_pretrained(folder, **how)
    DDPMScheduler().save_pretrained(folder)
    return folder


def _unet(channels: int) -> UNet:
    return UNet(UNetConfig(model_channels=channels, channel_mult=(1, 2, 2), attention=(), use_scale_shift_norm=True))


def _native(folder: Path, channels: int) -> Path:
    network = _unet(channels)
    description = {"network": network.config.asdict(), "schedule": {"name": "vp_cosine"}, "prediction": "v",
                   "time_scale": 1000.0, "data_range": [-1, 1], "shape": [3, SIDE, SIDE]}  # fmt: skip
    native.save(folder / "model.safetensors", network.state_dict(), description)
    return folder / "model.safetensors"


def _guided_diffusion(folder: Path, channels: int, zipped: bool = True) -> Path:
    torch.save(_unet(channels).state_dict(), folder / "model.pt", _use_new_zipfile_serialization=zipped)
    flags = {"image_size": SIDE, "num_channels": channels, "num_res_blocks": 2, "channel_mult": "1,2,2",
             "attention_resolutions": "", "num_head_channels": 64}  # fmt: skip
    (folder / "model.json").write_text(json.dumps(flags))
    return folder / "model.pt"


CASES: dict[str, Callable[[Path, int], Path]] = {
    "fastdiff's .safetensors": _native,
    "diffusers folder, .safetensors": _diffusers,
    "diffusers folder, .bin": lambda folder, channels: _diffusers(folder, channels, safe_serialization=False),
    "diffusers folder, fp16 brought to fp32": lambda folder, channels: _diffusers(folder, channels, torch.float16),
    "guided-diffusion .pt": _guided_diffusion,
    "guided-diffusion .pt of before torch 1.6": lambda folder, channels: _guided_diffusion(folder, channels, zipped=False),
}


# the loaders: each returns the bytes of the weights it loaded


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _fastdiff(path: Path) -> int:
    denoiser = fd.load(path)
    assert isinstance(denoiser.network, nn.Module)
    denoiser(torch.zeros(1, 3, SIDE, SIDE), denoiser.schedule.t_max / 2)
    return _size(denoiser.network.state_dict().values())


def _copying(path: Path) -> int:
    """The control: all of a file in memory, and copied into what a network would own."""
    from safetensors.torch import load_file

    place = path if path.is_file() else next(path.glob("diffusion_pytorch_model.*"))
    found = load_file(place) if place.suffix == ".safetensors" else torch.load(place, weights_only=True)
    return _size([t.clone() for t in found.values()])


def _from_pretrained(path: Path) -> int:
    from diffusers import UNet2DModel

    model = UNet2DModel.from_pretrained(path)
    model(torch.zeros(1, 3, SIDE, SIDE), 500)
    return _size(model.state_dict().values())


LOADERS = {"fastdiff": _fastdiff, "copying control": _copying, "diffusers": _from_pretrained}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


@torch.no_grad()
def growth(loader: str, path: Path, tiny: Path) -> dict[str, int]:
    """Bytes of the weights, and by how much this process' peak grew while they were loaded and used."""
    LOADERS[loader](tiny)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew here
    before = _status("VmRSS")
    weights = LOADERS[loader](path)
    return {"weights": weights, "peak": _status("VmHWM") - before}


def measure(case: str, folder: Path, channels: int) -> list[dict[str, object]]:
    """A row for each loader that reads this case."""
    paths = []
    for name, width in (("large", channels), ("tiny", 32)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        paths.append(str(CASES[case](folder / name, width)))
    rows: list[dict[str, object]] = []
    for loader in LOADERS:
        if loader == "diffusers" and not case.startswith("diffusers"):
            continue
        done = subprocess.run([sys.executable, __file__, "--child", loader, *paths], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{loader} on {case}: {done.stderr[-500:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"case": case, "loader": loader, **found, "ratio": round(found["peak"] / found["weights"], 3)})
        print(f"{case:42} {loader:16} peak {rows[-1]['ratio']:5.2f} x the weights ({found['weights'] / 1e6:.0f} MB)", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("out/loading"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(growth(args.child[0], Path(args.child[1]), Path(args.child[2]))))
        return
    rows = [row for i, case in enumerate(CASES) for row in measure(case, args.work / str(i), args.channels)]
    record = {"bar": BAR, "at_least_by_the_control": COPIES, "versions": versions(), "rows": rows}
    files.write_text(args.out, json.dumps(record, indent=1) + "\n")
    kept = all(row["ratio"] <= BAR for row in rows if row["loader"] == "fastdiff")
    seen = all(row["ratio"] >= COPIES for row in rows if row["loader"] == "copying control")
    raise SystemExit(None if kept and seen else f"not as it should be: at most {BAR}, and {COPIES} for the control at least")


if __name__ == "__main__":
    main()
