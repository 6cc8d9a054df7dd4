"""The stage `train` of benches/gpu.sh, dry: the same code on the CPU, with a tiny network and next to no time."""

import json
import os
from pathlib import Path

import pytest
import tiny
import torch

import fastdiff as fd
from fastdiff import ops
from fastdiff.cli import artefacts

BENCHES = Path(__file__).resolve().parents[2] / "benches"
NETWORK = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "attention": [], "head_channels": 32}


@pytest.fixture
def stage(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    import gpu_train

    monkeypatch.setattr(gpu_train, "TRIED", 0.0)
    return gpu_train


def run(stage, folder, *more):
    options = {"--data": tiny.npz(folder / "x.npz"), "--out": folder / "run", "--records": folder, "--device": "cpu"}
    options |= {"--network": json.dumps(NETWORK), "--batch": 4, "--seconds": 0, "--judge": 0}
    code = stage.main([*(str(word) for pair in options.items() for word in pair), "--no-compile", *more])
    (record,) = folder.glob("gpu-*.json")
    return code, json.loads(record.read_text())


def test_it_trains_records_and_goes_on(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "PART", 300_000)
    code, (first,) = run(stage, tmp_path)
    assert code == 0 and first["stage"] == "train" and {"torch", "device", "triton", "time"} <= set(first)
    torchs, ours, trained = first["rows"]
    assert (torchs["way"], ours["way"]) == ("torch", "our kernels")
    assert 0 < torchs["gradient error"] == ours["gradient error"] < 0.1  # on the CPU both are torch's operations
    assert trained["steps"] == 1 and trained["images/s"] > 0 and trained["loss"] > 0
    assert trained["sha256"] == fd.load(tmp_path / "run").hash
    assert fd.load(tmp_path / "run").info["time_scale"] == 100.0
    files = {p.name: p.stat().st_size for p in (tmp_path / "run").iterdir()}
    assert "state.pt" not in files and all(size <= 300_000 for name, size in files.items() if name.startswith("state.pt."))
    code, (_, second) = run(stage, tmp_path)
    assert code == 0 and (second["rows"][-1]["from step"], second["rows"][-1]["steps"]) == (1, 2)
    stage.join(tmp_path / "run" / "state.pt")
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 2



def test_a_way_with_another_gradient_is_not_taken(stage, tmp_path, monkeypatch):
    honest = ops.group_norm_silu
    monkeypatch.setattr(ops, "group_norm_silu", lambda *a, **k: 1.5 * honest(*a, **k))
    code, (record,) = run(stage, tmp_path)
    assert code == 1 and "further away" in record["rows"][1]["problem"]
    assert record["rows"][-1]["way"] == "torch" and record["rows"][-1]["steps"] == 1


def test_missing_images_are_one_line(stage, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        stage.main(["--device", "cpu", "--data", str(tmp_path / "none.npz")])
    said = capsys.readouterr().out
    assert end.value.code == stage.SKIPPED and len(said.splitlines()) == 1 and "none.npz" in said


def test_parts_make_the_file_again(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "PART", 10)
    path, data = tmp_path / "state.pt", bytes(range(57)) * 2
    path.write_bytes(data)
    stage.split(path)
    assert len(list(tmp_path.iterdir())) == 12 and not path.exists()
    stage.join(path)
    assert path.read_bytes() == data and len(list(tmp_path.iterdir())) == 1


def test_the_model_card_says_what_it_was_trained_on():
    shipped = artefacts.trained({"warmup": 200})
    assert shipped["machine"] == "two CPU cores" and shipped["how"] == "--threads 1"
    settings = {"device": "NVIDIA H200", "warmup": 500, "ema": 0.9995, "time_scale": 100.0, "bf16": True}
    found = artefacts.trained(settings)
    assert found["machine"] == "one NVIDIA H200" and "two CPU" not in str(found)
    assert found["how"] == "--warmup 500 --ema 0.9995 --time-scale 100 --device cuda --bf16"


@pytest.mark.slow
def test_a_way_is_tried_in_a_process_of_its_own(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCHES.parent), str(BENCHES)]))
    options = ["--device", "cpu", "--data", str(tiny.npz(tmp_path / "x.npz")), "--network", json.dumps(NETWORK), "--batch", "4"]
    row = stage.attempt_apart(stage.Way(ours=True), options)
    assert row["way"] == "our kernels" and row["images/s"] > 0 and "problem" not in row
    assert "ended with" in stage.attempt_apart(stage.Way(), [*options, "--batch", "none"])["problem"]
