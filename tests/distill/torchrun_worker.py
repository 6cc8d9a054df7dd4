"""One process of a run that `test_torchrun.py` starts: method, mode, checkpoint, data, folder and the parts of a batch on each
process are its arguments; "stop" asks the second process to stop after the first update of the second stage."""

import sys
from pathlib import Path

import torch

import fastdiff as fd
from fastdiff.distill import Consistency, Distiller, Guided, Progressive, Settings, Trajectory
from fastdiff.training.data import load_images

SHORT = {"updates": 2, "batch": 4}
METHODS = {
    "progressive": (Progressive(8, 2, **SHORT), 0), "trajectory": (Trajectory(2, calls=2, **SHORT), 0),
    "consistency": (Consistency(inner=4, **SHORT), 0), "guided": (Guided(start=4, steps=2, **SHORT), 0),
    "lora": (Progressive(8, 2, **SHORT), 4), "counts": (Trajectory(counts=(1, 2), calls=1, **SHORT), 0),
}  # fmt: skip


def method_of(name):
    """A method and the rank of its student, 0 = full."""
    return METHODS[name]


def main(name, mode, checkpoint, data, out, accumulate, *stop):
    torch.set_num_threads(1)
    method, rank = method_of(name)
    settings = Settings(accumulate=int(accumulate), lora=rank, sharded=mode == "fsdp")
    run = Distiller(fd.load(checkpoint), method, Path(out), load_images(data) if method.needs_data else None, settings)

    def told(progress):
        if stop and run.world.rank == 1 and (progress.stage, progress.update) == (1, 1):
            raise KeyboardInterrupt

    run.run(told)


if __name__ == "__main__":
    main(*sys.argv[1:])
