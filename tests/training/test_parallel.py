"""Training on several processes: the gradients and the weights of one process with the same batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from parallel_worker import NETWORK, train

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.parallel import World
from fastdiff.training import trainer as trainer_module
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import load_images
from fastdiff.training.trainer import Trainer

WORKER = Path(__file__).with_name("parallel_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ROOT = Path(fd.__file__).parents[1]


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def gradient(trainer, world):
    trainer.world = world
    trainer.network.zero_grad()
    trainer.network.train()
    trainer.loss(torch.Generator().manual_seed(4)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.network.parameters()])


@pytest.mark.parametrize("vlb", [0.0, 0.001])
def test_the_parts_of_a_batch_have_its_gradient(tmp_path, vlb):
    """In one process: what two would compute, averaged. Times, noise, label drops and dropout masks follow the image."""
    config = TrainConfig(steps=5, batch=8, network={**NETWORK, "dropout": 0.2}, label_dropout=0.4, vlb=vlb)
    trainer = Trainer(config, load_images(tiny.npz(tmp_path / "x.npz")), tmp_path / "run")
    trainer.train_step()  # away from the zeros of a new network
    whole = gradient(trainer, World())
    parts = [gradient(trainer, World(rank, 2)) for rank in range(2)]
    scale = float(whole.abs().max())
    assert scale > 1e-2
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=0, atol=1e-5 * scale)
    assert float((parts[0] - whole).abs().max()) > 0.05 * scale, "one part alone has another"


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "join", lambda: World(1, 3))
    with pytest.raises(FastdiffError, match="batch of 8 cannot be shared evenly by 3 processes"):
        Trainer(TrainConfig(steps=1, batch=8, network=NETWORK), load_images(tiny.npz(tmp_path / "x.npz")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """Plain torchrun, gloo: the first gradient to 1e-5, and the weights after five steps of SGD."""
    data = tiny.npz(tmp_path / "x.npz")
    run(*TORCHRUN, WORKER, data, tmp_path / "two")
    one, two = train(data, tmp_path / "one"), torch.load(tmp_path / "two" / "found.pt", weights_only=True)
    assert one.keys() == two.keys() and len(one["losses"]) == 5
    moved = float((one["weights"] - one["start"]).abs().max())
    assert float(one["gradient"].abs().max()) > 1e-2 and moved > 1e-2
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    state = torch.load(tmp_path / "two" / "state.pt", weights_only=True)
    assert state["step"] == 5 and not list((tmp_path / "two").glob(".*"))


@pytest.mark.slow
def test_the_command_under_torchrun_goes_on_with_another_number_of_processes(tmp_path):
    data = tiny.npz(tmp_path / "x.npz")
    wish = ["-m", "fastdiff", "train", "--data", data, "--batch", 8, "--warmup", 2, "--network", json.dumps(NETWORK)]
    two = run(*TORCHRUN, *wish, "--steps", 3, "--out", tmp_path / "two")
    assert two.stdout.count("3 steps, 24 images") == 1, "one process speaks for all"
    one = run(sys.executable, *wish, "--steps", 6, "--out", tmp_path / "two")
    assert "at step 3 of 6" in one.stdout and fd.load(tmp_path / "two").info["training"]["step"] == 6
