"""One process of a run that `test_torchrun.py` starts: the method, the checkpoint, the data and the folder are its arguments."""

import sys
from pathlib import Path

import torch

import fastdiff as fd
from fastdiff.distill import METHODS, Distiller
from fastdiff.training.data import load_images

name, checkpoint, data, out = sys.argv[1:]
torch.set_num_threads(1)
settings = {"progressive": {"start": 4, "steps": 2}, "trajectory": {"steps": 2, "calls": 2}}[name]
method = METHODS[name](updates=2, batch=4, **settings)
Distiller(fd.load(checkpoint), method, Path(out), load_images(data) if method.needs_data else None).run()
