"""The stages of benches/gpu.sh, dry: the same code on the CPU at small shapes, the kernels in Triton's interpreter; and how a
stage outlives the cases that fail, die or never end."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import interpreted
import pytest
import torch

from fastdiff.models.unet import UNet, UNetConfig

BENCHES = Path(__file__).resolve().parents[2] / "benches"
needs_triton = pytest.mark.skipif(not interpreted.PRESENT, reason="not installed: triton (the extra `gpu`)")
SMALL = UNetConfig(in_channels=1, out_channels=1, model_channels=32, channel_mult=(1, 2), attention=(2,), num_res_blocks=1)


@pytest.fixture
def load(monkeypatch):
    """A module of benches/, imported anew for a dry run."""
    monkeypatch.syspath_prepend(str(BENCHES))
    monkeypatch.setenv("FASTDIFF_STAGE_DEVICE", "cpu")
    for name in [name for name in sys.modules if name.startswith("gpu_")]:
        monkeypatch.delitem(sys.modules, name)

    yield lambda name: importlib.import_module(f"gpu_{name}")
    for name in [name for name in sys.modules if name.startswith("gpu_")]:
        del sys.modules[name]


@pytest.fixture
def dry(load, as_on_a_gpu, monkeypatch, tmp_path):
    """Runs a stage's cases in this process, some settings of its module replaced; its rows."""
    timing = load("timing")
    monkeypatch.setattr(timing, "BEYOND_L2", 0)
    monkeypatch.setattr(timing, "ROUNDS", 1)

    def run(name, **settings):
        module = load(name)
        for setting, value in settings.items():
            monkeypatch.setattr(module, setting, value)
        assert module.stage.main(["--share", "0/1", "--records", str(tmp_path)]) == 0
        (path,) = tmp_path.glob("gpu-*.json")
        (found,) = json.loads(path.read_text())
        assert found["stage"] == name and {"torch", "triton", "device", "time"} <= set(found)
        assert len(found["rows"]) == found["cases"] > 0 and not [row for row in found["rows"] if "problem" in row]
        module.stage.show(found["rows"])
        return found["rows"]

    return run


@pytest.fixture
def networks(load, monkeypatch):
    monkeypatch.setattr(load("networks"), "NETWORKS", {"small": (lambda: UNet(SMALL), (1, 8, 8))})
    return load("networks").NETWORKS


@needs_triton
def test_check(dry):
    seen = dry(
        "check", SHAPES=[(1, 6, 2, 3, 4), (1, 12)], ATTENTIONS=[(1, 1, 10, 5, 40)], ROWS=[((2, 1, 3, 5), 3, 2)],
        DTYPES=(torch.float32, torch.bfloat16),
    )  # fmt: skip
    assert {row["op"] for row in seen} == {"group_norm", "attention", "combine"}
    found = {name for row in seen for name in row}
    assert all(0 <= row["y"] <= 1 for row in seen) and {"noise", "embedded", "p", "dx", "dk"} <= found


@needs_triton
def test_ops(dry, load):
    made = {name: f for name, f in load("ops").contestants().items() if name != "compiled"}  # half a minute of a compiler
    seen = dry("ops", SITES=[(6, 4)], GROUPS=2, BATCHES=(1, 2), contestants=lambda: made)
    assert len(seen) == 4 and all(row["ours us"] > 0 and row["copy GB/s"] > 0 and row["reads"] == 1 for row in seen)


@needs_triton
def test_attention(dry, capsys):
    seen = dry("attention", SITES=[(2, 16, 24, 40), (1, 32, 32, 64)], BATCHES=(1,), architecture=lambda: 90, MARGIN=1e9)
    assert all(row["ours us"] > 0 and row["flash us"] > 0 for row in seen)
    assert "(90, 40, 16, 32, 2)," in capsys.readouterr().out


@needs_triton
def test_unet(dry, networks, capsys):
    seen = dry("unet", BATCHES=(1, 2), COMPILED=(), NETWORKS=networks)
    assert [row["variant"] for row in seen] == 2 * ["eager", "channels-last", "ours"]
    assert all(0 <= row["difference"] < 0.1 for row in seen if row["variant"] == "ours")
    assert "eager over ours + graph" in capsys.readouterr().out


@needs_triton
def test_sampler(dry, networks):
    seen = dry("sampler", BATCHES=(1,), STATES=[(2, 1, 4, 4)], NFE=3, NETWORKS=networks)
    assert len(seen) == 4 and all(row["torch us/row"] > 0 for row in seen[:3]) and seen[3]["ours ms"] > 0


@pytest.mark.slow
@needs_triton
def test_what_compute_sanitizer_watches(load, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    load("sanitize").kernels()


@needs_triton
def test_launches_are_counted(networks):
    """Of the small U-Net's GroupNorms each is one kernel of ours, and takes in what torch launches beside its three."""
    row = importlib.import_module("count_launches").count("small")
    norms = [module for module in UNet(SMALL).modules() if isinstance(module, torch.nn.GroupNorm)]
    assert row["before"] - row["after"] >= row["norms before"] - row["norms after"] > 2 * len(norms)


STAGE = """
import os, sys, time
from gpu_stage import Case, Stage
from gpu_timing import launched

def fail(): raise ValueError("told to fail")
def good(): return {"value": launched([lambda: 0])}
def cases():
    return [Case({"case": name}, f) for name, f in {
        "good": good, "fails": fail, "dies": lambda: os._exit(77), "hangs": lambda: time.sleep(60), "last": good,
    }.items()]

sys.exit(Stage("odd", cases, seconds=60, longest=1, timed=TIMED).main())
"""


def ran(tmp_path, *options, timed=True):
    """How the stage above ended, what it said, and its runs in the record."""
    (tmp_path / "gpu_odd.py").write_text(STAGE.replace("TIMED", str(timed)))
    paths = os.pathsep.join([str(BENCHES.parent), str(BENCHES)])
    environment = {**os.environ, "FASTDIFF_STAGE_DEVICE": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, tmp_path / "gpu_odd.py", "--records", tmp_path, "--processes", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    (path,) = tmp_path.glob("gpu-*.json")
    return done.returncode, done.stdout, json.loads(path.read_text())


@pytest.mark.parametrize("timed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_stage_outlives_its_cases(tmp_path, timed):
    code, said, runs = ran(tmp_path, timed=timed)
    assert code == 1 and "odd: 5 of 5 rows" in said and not [run for run in runs if "running" in run]
    assert [len(run["rows"]) for run in runs] == ([5] if timed else [3, 2])
    seen = {row["case"]: row for run in runs for row in run["rows"]}
    assert seen["good"]["value"] > 0 and seen["last"]["value"] > 0
    assert seen["fails"]["problem"] == "ValueError: told to fail"
    assert "ended with 77" in seen["dies"]["problem"] and "no case may take 1 s" in seen["hangs"]["problem"]


@pytest.mark.slow
def test_a_stage_out_of_time_is_not_done(tmp_path):
    code, said, (run,) = ran(tmp_path, "--seconds", "-1")
    assert code == 4 and run["rows"] == [] and "0 of 5 rows" in said
