"""`fastdiff tune`: writes a plan that says where it comes from, goes on where it stopped, and refuses nonsense in one line."""

import subprocess
import sys

import pytest
import tiny
import torch

import fastdiff as fd


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tune") / "m.safetensors")


def run(checkpoint, folder, *arguments):
    command = [sys.executable, "-m", "fastdiff", "tune", str(checkpoint), "--out", str(folder / "plan.json"), "--cache",
               str(folder / "pairs"), "--pairs", "6", "--validation", "4", "--batch", "3", *arguments]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True)


def test_a_tuned_plan_runs_like_any_other_and_knows_its_origin(checkpoint, tmp_path):
    done = run(checkpoint, tmp_path, "--nfe", "3", "--steps", "2")
    assert done.returncode == 0, done.stderr
    plan, den = fd.Plan.load(tmp_path / "plan.json"), fd.load(checkpoint)
    assert plan.nfe == 3 and plan.mean == plan.spread == "exact"
    assert plan.provenance["tuned_for"]["checkpoint"] == den.hash
    errors = plan.provenance["validation_rmse"]
    assert errors["after"] <= errors["before"]
    x = fd.sample(den.bind(class_labels=torch.tensor([0, 1])), plan, seeds=[0, 1])
    assert x.shape == (2, 1, 8, 8)
    again = run(checkpoint, tmp_path, "--nfe", "3", "--steps", "2")
    assert again.returncode == 0 and "resuming at step 2 of 2" in again.stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--nfe", "1"], "--nfe"),
        (["--nfe", "4", "--pairs", "2"], "more pairs"),
        (["--nfe", "4", "--grid", "karras"], "--start"),
        (["--nfe", "4", "--start", "heun"], "cannot be tuned"),
        (["--nfe", "4", "--freedom", "weights"], "freedom must be one of"),
        (["--nfe", "4", "--lr", "-1"], "lr > 0"),
    ],
)
def test_bad_input_is_one_line(checkpoint, tmp_path, arguments, said):
    done = run(checkpoint, tmp_path, *arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "plan.json").exists()
