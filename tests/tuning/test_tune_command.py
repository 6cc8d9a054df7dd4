"""`fastdiff tune`: writes a plan that says where it comes from, goes on where it stopped, and refuses nonsense in one line."""

import pytest
import tiny
import torch
from PIL import Image

import fastdiff as fd
from fastdiff.cli.tune import parse_duration, parse_scales
from fastdiff.errors import FastdiffError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tune") / "m.safetensors")


@pytest.fixture
def run(fastdiff, checkpoint):
    """`fastdiff tune` with few pairs into a folder."""

    def run(folder, *arguments):
        return fastdiff("tune", checkpoint, "--out", folder / "plan.json", "--cache", folder / "pairs", "--pairs", 6,
                        "--validation", 4, "--batch", 3, *arguments)  # fmt: skip

    return run


def test_a_tuned_plan_runs_like_any_other_and_knows_its_origin(fastdiff, run, checkpoint, tmp_path):
    code, out, err = run(tmp_path, "--nfe", "3", "--steps", "2", "--lr", "0.01")
    assert code == 0, err
    plan, den = fd.Plan.load(tmp_path / "plan.json"), fd.load(checkpoint)
    assert plan.nfe == 3 and plan.mean == plan.spread == "exact"
    assert plan.provenance["tuned_for"]["checkpoint"] == den.hash and den.why_not(plan) is None
    assert plan.provenance["validation"].keys() == {"before", "after"}
    x = fd.sample(den.bind(class_labels=torch.tensor([0, 1])), plan, seeds=[0, 1])
    assert x.shape == (2, 1, 8, 8)
    with Image.open(tmp_path / "plan.png") as image:
        assert image.size == (4 * 10 - 2, 3 * 10 - 2)  # four validation seeds; start, tuned, converged
    code, out, err = run(tmp_path, "--nfe", "3", "--steps", "2", "--lr", "0.01")
    assert code == 0 and "resuming at step 2 of 2" in out


def test_the_registry_is_searched_without_learning(fastdiff, run, checkpoint, tmp_path):
    code, out, err = run(tmp_path, "--nfe", "2", "--search")
    assert code == 0, err
    plan = fd.Plan.load(tmp_path / "plan.json")
    assert plan.nfe == 2 and "best of" in plan.provenance["search"] and plan.name in out
    code, out, err = run(tmp_path, "--nfe", "2", "--start", tmp_path / "plan.json", "--steps", "1", "--freedom", "coefficients")
    assert code == 0, err


def test_nodes_without_derivatives_at_two_scales(fastdiff, run, checkpoint, tmp_path):
    code, _, err = run(tmp_path, "--nfe", "4", "--derivative-free", "--start", "heun", "--guidance", "1,2", "--steps", "5")
    assert code == 0, err
    plan = fd.Plan.load(tmp_path / "plan.json")
    assert plan.provenance["tuned_for"]["guidance"] == [1.0, 2.0] and plan.provenance["started_from"] == "heun · karras"
    assert plan.provenance["method"] == "NodeSearch"


def test_a_plan_of_another_checkpoint_is_refused_without_force(fastdiff, run, checkpoint, tmp_path):
    run(tmp_path, "--nfe", "2", "--steps", "1")
    other = tiny.checkpoint(tmp_path / "other.safetensors", seed=1)
    plan, pictures = tmp_path / "plan.json", tmp_path / "pictures"
    for command in (["sample", other, "--plan", plan, "--seeds", "0", "--out", pictures],
                    ["bench", other, "--plan", plan, "--out", pictures],
                    ["tune", other, "--start", plan, "--nfe", "2", "--out", pictures / "p.json"]):  # fmt: skip
        code, _, err = fastdiff(*command)
        assert code == 2 and "tuned for checkpoint" in err and "--force" in err
        assert err.strip().count("\n") == 0 and not pictures.exists()
    code, _, err = fastdiff("sample", checkpoint, "--plan", plan, "--seeds", "0", "--guidance", "2", "--out", pictures)
    assert code == 2 and "tuned at guidance 1" in err
    code, _, err = fastdiff("sample", other, "--plan", plan, "--seeds", "0", "--force", "--out", pictures)
    assert code == 0 and pictures.exists()


def test_auto_takes_the_tuned_plan_beside_the_checkpoint_and_says_so(fastdiff, run, checkpoint, tmp_path):
    mine = tmp_path / "model.safetensors"
    mine.write_bytes(checkpoint.read_bytes())
    run(tmp_path, "--nfe", "3", "--steps", "1")
    (tmp_path / "plans").mkdir()
    (tmp_path / "plan.json").rename(tmp_path / "plans" / "nfe-03.json")
    den = fd.load(tmp_path)
    tuned, hand_made = fd.plan("auto", den, nfe=3), fd.plan("auto", den, nfe=4)
    assert tuned.name == "tuned-3" and "tuned for this checkpoint" in tuned.provenance["auto"]
    assert hand_made.nfe == 4 and "hand-made" in hand_made.provenance["auto"]
    labels = torch.tensor([0, 1])
    assert fd.plan("auto", den.bind(class_labels=labels), nfe=3).name == "tuned-3"
    assert fd.plan("auto", fd.guide.cfg(den.bind(class_labels=labels), 2.0), nfe=3).name != "tuned-3"
    assert fd.plan("auto", fd.schedule.edm(), nfe=5).nfe == 5
    with pytest.raises(FastdiffError, match="nfe"):
        fd.plan("auto", den, steps=3)
    code, out, _ = fastdiff("sample", tmp_path, "--nfe", "3", "--seeds", "0", "--out", tmp_path / "pictures")
    assert code == 0 and "tuned-3, tuned for this checkpoint" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--nfe", "0"], "--nfe"),
        (["--nfe", "4", "--pairs", "2"], "more pairs"),
        (["--nfe", "4", "--grid", "karras"], "--start"),
        (["--nfe", "4", "--start", "ddpm"], "cannot be tuned"),
        (["--nfe", "1", "--start", "dpmpp-2s", "--grid", "nowhere"], "nowhere"),
        (["--nfe", "4", "--freedom", "weights"], "--freedom must be one of"),
        (["--nfe", "4", "--lr", "-1"], "lr > 0"),
        (["--nfe", "4", "--start", "missing.json"], "missing.json"),
        (["--nfe", "4", "--guidance", "1,x"], "--guidance takes"),
        (["--nfe", "4", "--time-budget", "10"], "--time-budget takes"),
        (["--nfe", "4", "--relax", "-1"], "relax"),
        (["--nfe", "4", "--search", "--guidance", "1,2"], "one"),
    ],
)
def test_bad_input_is_one_line(fastdiff, run, checkpoint, tmp_path, arguments, said):
    code, _, err = run(tmp_path, *arguments)
    assert code == 2 and said in err and err.strip().count("\n") == 0
    assert not (tmp_path / "plan.json").exists()


def test_durations_and_scales():
    assert parse_duration("10m") == 600 and parse_duration("1.5h") == 5400 and parse_duration("0") == float("inf")
    assert parse_scales("1, 2.5") == [1.0, 2.5]
