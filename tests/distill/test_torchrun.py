"""Two processes of plain `torchrun`, with whole networks (DDP) or shares of them (FSDP2), train the student that one process
trains from the same two parts of every batch."""

import subprocess
import sys
from pathlib import Path

import hub
import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torchrun_worker import method_of

import fastdiff as fd
from fastdiff.distill import Distiller, Settings
from fastdiff.errors import FastdiffError
from fastdiff.training.data import load_images
from fastdiff.training.parallel import _blocks

WORKER = Path(__file__).with_name("torchrun_worker.py")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER, *arguments]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, timeout=900)


def farthest(a, b):
    """The largest difference between two networks' weights."""
    return max(float((p - q).abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def share_beyond(bound, a, b):
    """The share of weights that differ by more."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return float(torch.cat([((p - q).abs() > bound).flatten() for p, q in pairs]).float().mean())


@pytest.mark.parametrize(("name", "mode"), [
    ("progressive", "ddp"), pytest.param("trajectory", "ddp", marks=pytest.mark.slow),
    *(pytest.param(name, "fsdp", marks=pytest.mark.slow) for name in ("progressive", "consistency", "guided", "lora", "counts")),
])  # fmt: skip
def test_two_processes_are_one_run(name, mode, tmp_path):
    if name == "lora":
        pytest.importorskip("peft")
    # 64 channels for shares: where a group of GroupNorm is one channel, as with 32, the biases before it have no gradient but
    # rounding, which Adam makes steps of (6e-5 apart; all other weights 3e-6)
    network = tiny.network(model_channels=64 if mode == "fsdp" else 32)
    checkpoint, data = tiny.checkpoint(tmp_path / "t.safetensors", network), tiny.npz(tmp_path / "x.npz")
    done = torchrun(name, mode, checkpoint, data, tmp_path / "two", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    method, rank = method_of(name)
    images = load_images(data) if method.needs_data else None
    settings = Settings(accumulate=2, lora=rank)
    one = Distiller(fd.load(checkpoint), method, tmp_path / "one", images, settings).run()
    two = fd.load(tmp_path / "two")
    if mode == "ddp":
        assert farthest(one.network, two.network) < 2e-6
    else:  # the second stage's teacher differs by the first's rounding, of which Adam makes more where a gradient is next to none
        first = next((tmp_path / "one").glob("stage-1-*")).name
        assert farthest(*(fd.load(tmp_path / run / first).network for run in ("one", "two"))) < 1e-5
        assert share_beyond(1e-5, one.network, two.network) < 1e-4
    if name not in ("guided", "counts"):  # whose students have one input more
        assert farthest(one.network, fd.load(checkpoint).network) > 1e-4
    assert two.plan == one.plan and not list(tmp_path.glob("two/.*"))
    again = Distiller(fd.load(checkpoint), method, tmp_path / "two", images, settings)  # its parts are ours, its state is whole
    assert again.finished


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode", "bound"), [("trajectory", "ddp", 2e-6), ("progressive", "fsdp", 1e-5), ("lora", "fsdp", 1e-5)]
)
def test_two_processes_teach_a_network_of_diffusers(name, mode, bound, tmp_path):
    """Shares are of each block in a list of modules, and of the rest; a stage's student, whole again, teaches the next."""
    if name == "lora":
        pytest.importorskip("peft")
    folder = hub.save(tmp_path / "m", hub.unet(), DDPMScheduler(**hub.VPS))
    shape = fd.load(folder).shape
    x = np.random.default_rng(0).integers(0, 256, (24, *shape[1:], shape[0]), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x.squeeze())
    done = torchrun(name, mode, folder, tmp_path / "x.npz", tmp_path / "two", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    method, rank = method_of(name)
    images = load_images(tmp_path / "x.npz") if method.needs_data else None
    one = Distiller(fd.load(folder), method, tmp_path / "one", images, Settings(accumulate=2, lora=rank)).run()
    two = fd.load(tmp_path / "two").network
    assert share_beyond(bound, one.network, two) < 1e-4
    assert farthest(one.network, fd.load(folder).network) > 1e-5


@pytest.mark.slow
def test_a_sharded_run_stops_together_and_goes_on_bit_for_bit(tmp_path):
    """One process alone is told to stop, inside the second stage: both do, and the state has averages, teacher and optimiser."""
    checkpoint, data = tiny.checkpoint(tmp_path / "t.safetensors"), tiny.npz(tmp_path / "x.npz")
    whole = torchrun("progressive", "fsdp", checkpoint, data, tmp_path / "whole", 1)
    assert whole.returncode == 0, whole.stderr[-2000:]
    stopped = torchrun("progressive", "fsdp", checkpoint, data, tmp_path / "parts", 1, "stop")
    assert stopped.returncode != 0 and "KeyboardInterrupt" in stopped.stderr
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert (state["stage"], state["update"]) == (1, 1)
    assert all(type(v) is torch.Tensor for v in state["student"].values())
    went_on = torchrun("progressive", "fsdp", checkpoint, data, tmp_path / "parts", 1)
    assert went_on.returncode == 0, went_on.stderr[-2000:]
    assert fd.load(tmp_path / "parts").hash == fd.load(tmp_path / "whole").hash


def test_what_is_gathered_by_itself():
    """Our U-Net's blocks, inside of LoRA too; the entries of another's lists; nothing of DiT, which reaches into one."""
    lora = pytest.importorskip("fastdiff.distill.lora")
    pytest.importorskip("peft")
    ours = [len(_blocks(net)) for net in (tiny.network(), lora.adapt(tiny.network(), 2))]
    assert ours[0] == ours[1] > 1
    assert len(_blocks(hub.unet())) > 1
    assert _blocks(DiTTransformer2DModel(2, 8, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=1)) == []


def test_shares_need_processes(tmp_path):
    method, _ = method_of("trajectory")
    with pytest.raises(FastdiffError, match="torchrun --nproc-per-node 2"):
        Distiller(fd.load(tiny.checkpoint(tmp_path / "t.safetensors")), method, tmp_path / "no", None, Settings(sharded=True))
    assert not (tmp_path / "no").exists()
