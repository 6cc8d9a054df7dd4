"""LoRA students: the teacher before the first update, an ordinary file after the last, an adapter that peft itself loads."""

import pytest
import tiny
import torch
from torch import nn

import fastdiff as fd
from fastdiff.distill import Consistency, Distiller, Guided, Match, Settings, Trajectory, lora
from fastdiff.errors import FastdiffError
from fastdiff.training.data import load_images

RANK = Settings(lora=4)
SMALL = {"updates": 3, "batch": 4, "lr": 1e-2}
LCM_LORA = {"steps": 2, "segments": 1, "inner": 4, "self_ema": 0.95, "huber": 1e-3, "weighting": "x0"}  # Luo et al. 2023b


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return fd.load(tiny.checkpoint(tmp_path_factory.mktemp("teacher") / "t.safetensors", tiny.network(attention=[1])))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return load_images(tiny.npz(tmp_path_factory.mktemp("images") / "x.npz"))


def test_a_rank_below_one_and_another_network_are_refused(teacher, images, tmp_path):
    with pytest.raises(FastdiffError, match="at least 1; given -2"):
        Settings(lora=-2)
    pytest.importorskip("peft")
    with pytest.raises(FastdiffError, match="leave out --network and"):
        Distiller(teacher, Match(Trajectory(2), predicts="x0"), tmp_path / "no", images, RANK)
    assert not (tmp_path / "no").exists()


def test_without_peft_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FastdiffError, match=r"pip install 'fastdiff\[lora\]'"):
        Settings(lora=4)


@pytest.mark.parametrize("method", [
    Consistency(**LCM_LORA, **SMALL), pytest.param(Guided(start=4, steps=2, **SMALL), marks=pytest.mark.slow),
    pytest.param(Trajectory(2, calls=2, **SMALL), marks=pytest.mark.slow),
], ids=lambda m: m.name)  # fmt: skip
def test_a_lora_student_begins_as_its_teacher_and_ends_as_a_file_and_an_adapter(method, teacher, images, tmp_path):
    peft = pytest.importorskip("peft")
    run = Distiller(teacher, method, tmp_path / "s", images, RANK)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 2])
    assert torch.equal(run.student.bind(class_labels=labels)(x, t), teacher.bind(class_labels=labels)(x, t))
    layers = [name for name, m in teacher.network.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    learning = {name for name, p in run.network.named_parameters() if p.requires_grad}
    assert {f"base_model.model.{name}.lora_{k}.default.weight" for name in layers for k in "AB"} == {
        name for name in learning if "guidance_embed" not in name
    }
    student = run.run()
    bound = student.bind(class_labels=labels, **({"guidance": 2.0} if method.name == "guided" else {}))
    assert type(student.network) is type(teacher.network) and student.plan.nfe == 2
    assert float((bound(x, t) - teacher.bind(class_labels=labels)(x, t)).abs().max()) > 1e-3

    base = Distiller(teacher, method, tmp_path / "fresh", images).network  # the teacher, with the method's inputs
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "s" / "adapter").eval()
    with torch.no_grad():
        again = run.student.__class__(adapted, student.schedule, student.prediction, time=student.time).bind(**bound.cond)(x, t)
    torch.testing.assert_close(again, bound(x, t), rtol=0, atol=2e-5)


def test_what_peft_cannot_merge_is_left_as_it_is():
    """A grouped convolution, and two layers with one weight: the merged network is the adapted one, to rounding."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    first, again = nn.Linear(8, 8), nn.Linear(8, 8)
    again.weight = first.weight
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4), first, again)
    adapted = lora.adapt(network, 2)
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert learning == {f"base_model.model.0.lora_{k}.default.weight" for k in "AB"}
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.normal_()
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(lora.merged(adapted)(x), adapted(x), rtol=0, atol=1e-4)
    with pytest.raises(FastdiffError, match="a Sequential has none"):
        lora.adapt(nn.Sequential(nn.SiLU()), 2)


def test_a_lora_run_goes_on_bit_for_bit(teacher, images, tmp_path):
    pytest.importorskip("peft")
    method = Guided(start=4, steps=2, updates=2, batch=4, lr=1e-2)  # both stages, and an input that the teacher has not
    whole = Distiller(teacher, method, tmp_path / "whole", images, RANK).run()

    def interrupt(progress):
        if (progress.stage, progress.update) == (1, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Distiller(teacher, method, tmp_path / "parts", images, RANK).run(interrupt)
    resumed = Distiller(teacher, method, tmp_path / "parts", images, RANK)
    assert (resumed.stage, resumed.update) == (1, 1)
    assert resumed.run().hash == whole.hash
    with pytest.raises(FastdiffError, match=r"lora \(4 -> 8\)"):
        Distiller(teacher, method, tmp_path / "parts", images, Settings(lora=8))
