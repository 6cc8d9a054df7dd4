"""`fastdiff distill`: a student that samples with no flags; a mistake is one line and leaves nothing."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch

import fastdiff as fd


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("distill") / "t.safetensors")


def test_a_student_is_saved_with_its_plan_and_samples_without_flags(fastdiff, teacher, tmp_path):
    data = tiny.npz(tmp_path / "x.npz")
    command = ("distill", teacher, "--data", data, "--start", 8, "--steps", 2, "--updates", 2, "--batch", 4, "--out",
               tmp_path / "s")  # fmt: skip
    code, out, err = fastdiff(*command)
    assert code == 0, err
    assert "2 network calls" in out and (tmp_path / "s" / "loss.png").exists()
    student = fd.load(tmp_path / "s")
    assert student.plan.nfe == 2 and fd.load(tmp_path / "s" / "stage-1-steps-4.safetensors").plan.nfe == 4
    code, out, err = fastdiff("sample", tmp_path / "s", "--seeds", "0", "--out", tmp_path / "p")
    assert code == 0 and "2 network calls a sample" in out
    code, out, err = fastdiff(*command)  # finished already: says so by its result, trains nothing
    assert code == 0 and fd.load(tmp_path / "s").hash == student.hash


def test_trajectory_matching_needs_no_data(fastdiff, teacher, tmp_path):
    code, _, err = fastdiff("distill", teacher, "--method", "trajectory", "--steps", 2, "--updates", 1, "--batch", 2,
                            "--calls", 2, "--out", tmp_path / "s")  # fmt: skip
    assert code == 0, err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--method", "magic"], "progressive, trajectory"),
        (["--method", "trajectory", "--start", "8"], "has no setting --start"),
        (["--start", "8", "--steps", "2"], "needs images"),
        (["--start", "9", "--steps", "2"], "power of two"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--method", "trajectory", "--lr", "-1"], "lr > 0"),
        (["--method", "guided", "--scales", "1"], "such as 1,5"),
        (["--method", "guided", "--scales", "5,1", "--start", "8"], "such as 1,5"),
        (["--method", "trajectory", "--self-ema", "0.5"], "has no setting --self-ema"),
        (["--method", "trajectory", "--batch", "3", "--accumulate", "2"], "2 equal parts"),
        (["--method", "trajectory", "--fsdp"], "torchrun --nproc-per-node 2"),
        (["--method", "trajectory", "--fsdp", "--view-every", "5"], "leave one of them out"),
        (["--method", "trajectory", "--network", "{'model_channels': 32}"], "--network takes JSON"),
        (["--method", "trajectory", "--network", '{"model_channels": 32}'], "needs images"),
        (["--method", "trajectory", "--match-updates", "5"], "belong to a student of another"),
        (["--method", "trajectory", "--prediction", "all"], "unknown prediction 'all'"),
        (["--method", "trajectory", "--prediction", "both"], "needs images"),
    ],
)
def test_bad_input_is_one_line(fastdiff, teacher, tmp_path, arguments, said):
    code, _, err = fastdiff("distill", teacher, "--out", tmp_path / "s", *arguments)
    assert code == 2 and said in err and err.strip().count("\n") == 0
    assert not (tmp_path / "s").exists()


def test_a_guided_student_samples_at_its_scale_in_one_call(fastdiff, teacher, tmp_path):
    code, _, err = fastdiff("distill", teacher, "--method", "guided", "--scales", "1,4", "--start", 4, "--steps", 2, "--batch", 4,
                            "--updates", 1, "--data", tiny.npz(tmp_path / "x.npz"), "--out", tmp_path / "s")  # fmt: skip
    assert code == 0, err
    code, out, err = fastdiff("sample", tmp_path / "s", "--guidance", 3, "--seeds", "0", "--out", tmp_path / "p")
    assert code == 0 and "guidance 3: 2 network calls a sample" in out, (out, err)
    code, _, err = fastdiff("sample", tmp_path / "s", "--guidance", 5, "--seeds", "0", "--out", tmp_path / "q")
    assert code == 2 and "1 to 4" in err and not (tmp_path / "q").exists()


def test_guidance_of_an_unconditional_teacher_is_one_line(fastdiff, tmp_path):
    plain = tiny.checkpoint(tmp_path / "u.safetensors", tiny.network(num_classes=None, null_class=False))
    data = tiny.npz(tmp_path / "x.npz")
    code, _, err = fastdiff("distill", plain, "--method", "guided", "--data", data, "--out", tmp_path / "s")
    assert code == 2 and "null class" in err and not (tmp_path / "s").exists()


def test_data_of_another_shape_or_range_than_the_teachers_is_one_line(fastdiff, tmp_path):
    colour = tiny.npz(tmp_path / "colour.npz", x=np.zeros((24, 8, 8, 3), np.uint8))
    grey = tiny.npz(tmp_path / "grey.npz")
    cases = (({}, colour, "shape (1, 8, 8), the data have (3, 8, 8)"), ({"data_range": [0, 1]}, grey, "0 to 1"))
    for changes, data, said in cases:
        teacher = tiny.checkpoint(tmp_path / "t.safetensors", **changes)
        code, _, err = fastdiff("distill", teacher, "--data", data, "--out", tmp_path / "s")
        assert code == 2 and said in err and err.strip().count("\n") == 0 and not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1], ids=["inside a stage", "after its border"])
def test_a_killed_run_resumes_to_the_same_bits(stage, teacher, tmp_path):
    """SIGKILL a real `fastdiff distill`, run the command again, and compare with a run that was left alone."""
    data = tiny.npz(tmp_path / "x.npz")
    command = [sys.executable, "-c", "from fastdiff.cli import main; main()", "distill", teacher, "--data", data, "--start", 8,
               "--steps", 2, "--updates", 40, "--batch", 4, "--threads", 1]  # fmt: skip
    command, state = [str(c) for c in command], tmp_path / "killed" / "state.pt"
    killed, alone = ([*command, "--out", str(tmp_path / name)] for name in ("killed", "alone"))
    reached = {"stage": -1}
    with subprocess.Popen([*killed, "--save-every", "0"], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (reached["stage"] == stage and reached["update"]):
            time.sleep(0.01)
            if state.exists():
                reached = torch.load(state, weights_only=True)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    for again in (killed, alone):
        subprocess.run(again, capture_output=True, check=True)
    names = [f"stage-{i + 1}-steps-{n}.safetensors" for i, n in enumerate((4, 2))]
    for name in names:
        assert fd.load(tmp_path / "killed" / name).hash == fd.load(tmp_path / "alone" / name).hash


def test_changed_settings_and_a_full_disk_lose_nothing(fastdiff, teacher, tmp_path, monkeypatch):
    command = ("distill", teacher, "--method", "trajectory", "--steps", 2, "--updates", 2, "--batch", 2, "--out", tmp_path / "s")
    assert fastdiff(*command)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    code, _, err = fastdiff(*command, "--seed", 1, "--bf16")
    assert code == 2 and "seed (0 -> 1)" in err and "bf16 (False -> True)" in err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    code, _, err = fastdiff(*command[:-1], tmp_path / "other")
    assert code == 2 and "No space left" in err and not list((tmp_path / "other").iterdir())
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before
