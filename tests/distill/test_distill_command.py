"""`fastdiff distill`: a student that samples with no flags; a mistake is one line and leaves nothing."""

import pytest
import tiny

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
