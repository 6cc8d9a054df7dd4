"""Two processes of plain `torchrun` train the student that one process trains from the same two parts of every batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import fastdiff as fd
from fastdiff.distill import Distiller, Progressive, Settings, Trajectory
from fastdiff.training.data import load_images

WORKER = Path(__file__).with_name("torchrun_worker.py")


@pytest.mark.parametrize("name", ["progressive", pytest.param("trajectory", marks=pytest.mark.slow)])
def test_two_processes_are_one_run(name, tmp_path):
    checkpoint, data = tiny.checkpoint(tmp_path / "t.safetensors"), tiny.npz(tmp_path / "x.npz")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, WORKER, name, checkpoint, data, tmp_path / "two"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    method = Progressive(4, 2, updates=2, batch=4) if name == "progressive" else Trajectory(2, updates=2, batch=4, calls=2)
    images = load_images(data) if method.needs_data else None
    one = Distiller(fd.load(checkpoint), method, tmp_path / "one", images, Settings(accumulate=2)).run()
    two = fd.load(tmp_path / "two")
    start = fd.load(checkpoint).network
    for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert max(float((a - c).abs().max()) for a, c in zip(one.network.parameters(), start.parameters(), strict=True)) > 1e-4
    assert two.plan == one.plan and not list(tmp_path.glob("two/.*"))
    again = Distiller(fd.load(checkpoint), method, tmp_path / "two", images, Settings(accumulate=2))  # its parts are ours
    assert again.finished
