"""The parity table on the shipped model: a plan of every family x {fp32, fp16} x batch, engine against the eager sampler; and the
pictures of `run.py`, `fastdiff run` and `fastdiff sample`, for a hand-made plan and for the tuned one at 5 calls.

    python benches/export_parity.py            # writes results/export_parity.json; about a quarter of an hour on one quiet core
    python benches/export_parity.py --solvers ddim --precisions fp32 --out out/parity.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import fastdiff as fd
from fastdiff.export import network
from fastdiff.export.folder import Wish, export
from fastdiff.export.manifest import versions
from fastdiff.export.runtime import Engine
from fastdiff.files import write_text
from fastdiff.shipped import shipped_path

FAMILIES = "ddim,heun,lms-3,dpmpp-2m,dpmpp-3s,unipc-2,deis-tab-3,ipndm-3,ddpm,euler-ancestral,dpmpp-2m-sde"
HERE = Path(__file__).resolve().parent
TUNED = shipped_path("fashion-mnist").parent / "plans" / "nfe-05.json"


def once() -> None:
    """The network is traced once for each form."""
    trace, kept = network.trace, {}

    def known(denoiser: Any, form: Any = None) -> Any:
        if form not in kept:
            kept[form] = trace(denoiser, form)
        return kept[form]

    network.trace = known


def pictures(folder: Path, plan: fd.Plan, seeds: str = "0-11") -> dict[str, Any]:
    """Largest differences of images in [0, 1], and of the pixels that the three programs write."""
    import torch
    from PIL import Image

    den = fd.load("fashion-mnist")
    export(den, plan, folder / "engine", Wish(class_names=tuple(map(str, range(10)))))
    numbers = list(range(12))
    labels = [n % 10 for n in numbers]
    want = den.images(fd.sample(den.bind(class_labels=torch.tensor(labels)), plan, seeds=numbers)).numpy()
    made = Engine(folder / "engine", provider="cpu").images(numbers, labels)
    found: dict[str, Any] = {"images": float(np.abs(made - want).max())}
    plan.save(folder / "plan.json")
    line = [sys.executable, "-m", "fastdiff"]
    commands = {
        "run.py": [sys.executable, folder / "engine" / "run.py", "--seeds", seeds, "--out", folder / "run.py"],
        "run": [*line, "run", folder / "engine", "--seeds", seeds, "--out", folder / "run"],
        "sample": [*line, "sample", "--plan", folder / "plan.json", "--seeds", seeds, "--out", folder / "sample"],
    }
    seen = {}
    for name, command in commands.items():
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        seen[name] = np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted((folder / name).glob("seed*.png"))])
    for name in ("run.py", "run"):
        off = np.abs(seen[name] - seen["sample"])
        found[name] = {"largest_step_of_255": int(off.max()), "pixels_that_differ": float((off > 0).mean())}
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--solvers", default=FAMILIES)
    options.add_argument("--precisions", default="fp32,fp16")
    options.add_argument("--nfe", type=int, default=8)
    options.add_argument("--out", type=Path, default=HERE / "results" / "export_parity.json")
    given = options.parse_args()
    den = fd.load("fashion-mnist")
    found: dict[str, Any] = {"versions": versions(), "nfe": given.nfe, "sampler": {}, "pictures": {}}
    once()
    for precision in given.precisions.split(","):
        for solver in given.solvers.split(","):
            with tempfile.TemporaryDirectory() as name:
                made = export(den, fd.plan(solver, den, given.nfe), Path(name) / "engine", Wish(precision=precision))
            found["sampler"][f"{solver}, {precision}"] = made["parity"]["sampler"]
            print(f"{solver}, {precision}: " + ", ".join(f"batch {f['batch']} {f['max']:.1e}" for f in made["parity"]["sampler"]))
    for title, plan in (("unipc-2, 8 calls", fd.plan("unipc-2", den, 8)), ("tuned, 5 calls", fd.Plan.load(TUNED))):
        with tempfile.TemporaryDirectory() as name:
            found["pictures"][title] = pictures(Path(name), plan)
            print(f"{title}: {json.dumps(found['pictures'][title])}")
    write_text(given.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
