"""Students of another network or prediction: what they start from, that they learn it, and who cannot have one."""

import math

import pytest
import tiny
import torch

import fastdiff as fd
from fastdiff.distill import Distiller, Match, Progressive, Trajectory
from fastdiff.distill.students import OUTPUT
from fastdiff.errors import FastdiffError
from fastdiff.training.data import load_images

SHORT = {"updates": 2, "batch": 8}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return load_images(tiny.npz(tmp_path_factory.mktemp("images") / "x.npz"))


def teacher_of(folder, **changes):
    return fd.load(tiny.checkpoint(folder / "t.safetensors", **changes))


@torch.no_grad()
def error(student, teacher, images):
    """RMSE of v between the two predictions on noised images, noise that no update drew."""
    t = torch.linspace(0.1, 0.9, 24).double()
    noise = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    level = [f(t).float().view(-1, 1, 1, 1) for f in (teacher.schedule.alpha, teacher.schedule.sigma)]
    z = level[0] * (images.x.float() / 127.5 - 1) + level[1] * noise
    a, b = (d.bind(class_labels=images.y)(z, t) for d in (student, teacher))
    return float(((a - b.clamp(-1, 1)) / level[1]).square().mean().sqrt())


def test_a_narrower_student_learns_what_its_teacher_predicts_and_then_its_method(images, tmp_path):
    teacher = fd.load(tiny.checkpoint(tmp_path / "t.safetensors", tiny.network(model_channels=64)))
    method = Match(Progressive(4, 2, **SHORT), {"model_channels": 32}, updates=60, lr=4e-3)
    run, teachers = Distiller(teacher, method, tmp_path / "s", images), []
    assert [stage.steps for stage in run.stages] == [32, 2]
    before = error(run.student, teacher, images)
    student = run.run(lambda p: teachers.append(run.teacher.network))
    assert all(network is teacher.network for network in teachers)
    matched = fd.load(tmp_path / "s" / "stage-1-steps-32.safetensors")
    assert matched.network.config.model_channels == student.network.config.model_channels == 32
    assert matched.plan.nfe == 32 and student.plan.nfe == 2
    assert error(matched, teacher, images) < 0.7 * before
    assert student.info["training"]["distilled"]["network"] == {"model_channels": 32}


@pytest.mark.parametrize(("predicts", "share"), [
    ("v", 0.9), pytest.param("x0", 0.5, marks=pytest.mark.slow), pytest.param("both", 0.9, marks=pytest.mark.slow),
])  # fmt: skip
def test_an_eps_teacher_gets_a_student_of_another_prediction(predicts, share, images, tmp_path):
    """From the teacher's weights, which mean something else in it at first: the stage brings the prediction back."""
    teacher = teacher_of(tmp_path, prediction="eps")
    run = Distiller(teacher, Match(Progressive(8, 2, **SHORT), predicts=predicts, updates=40, lr=2e-3), tmp_path / "s", images)
    before = error(run.student, teacher, images)
    for (name, a), b in zip(run.network.named_parameters(), teacher.network.parameters(), strict=True):
        assert torch.equal(a, b) or (predicts == "both" and name in OUTPUT)
    teachers = []
    student = run.run(lambda p: teachers.append(run.teacher.prediction))
    assert teachers == ["eps"] * 40 + [predicts] * 4  # two halvings after it
    matched = fd.load(tmp_path / "s" / "stage-1-steps-32.safetensors")
    assert student.prediction == matched.prediction == predicts and teacher.prediction == "eps"
    assert error(matched, teacher, images) < share * before
    assert bool(fd.sample(student.bind(class_labels=torch.tensor([0])), seeds=[0]).isfinite().all())


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow"])
def test_a_student_of_both_starts_as_near_its_teacher_as_two_heads_allow(predicts, images, tmp_path):
    """With z the noisy sample and D its teacher's prediction, to rounding what `Match` says."""
    teacher = teacher_of(tmp_path, prediction=predicts)
    run = Distiller(teacher, Match(Progressive(4, 2, **SHORT), predicts="both"), tmp_path / "s", images)
    t, labels = torch.linspace(0.02, 0.98, 24).double(), torch.arange(24) % 3
    alpha, sigma = (f(t).float().view(-1, 1, 1, 1) for f in (teacher.schedule.alpha, teacher.schedule.sigma))
    z = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    d, got = (den.bind(class_labels=labels)(z, t) for den in (teacher, run.student))
    v = (alpha * z - d) / sigma
    gain = 4 / (math.pi + 2) * (alpha + sigma)
    want = {"eps": alpha**2 * d, "x0": sigma**2 * d + alpha * z, "v": alpha * z - sigma * gain * v, "flow": alpha * z}[predicts]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert run.network.config.out_channels == 2 and run.student.prediction == "both"
    assert 0.09 < float((gain - 1).square().mean().sqrt()) < 0.11


def test_a_student_of_both_is_a_teacher_and_a_checkpoint_like_any_other(images, tmp_path):
    teacher = fd.load(tiny.checkpoint(tmp_path / "t.safetensors", tiny.network(learned_variance=True)))
    student = Distiller(teacher, Match(Progressive(4, 2, **SHORT), predicts="both", updates=2), tmp_path / "s", images).run()
    assert student.prediction == "both" and fd.load(tmp_path / "s").plan.nfe == 2
    again = Distiller(student, Progressive(4, 2, **SHORT), tmp_path / "a", images)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 2])
    assert torch.equal(again.student.bind(class_labels=labels)(x, t), student.bind(class_labels=labels)(x, t))
    back = Distiller(student, Match(Progressive(4, 2, **SHORT), predicts="v"), tmp_path / "v", images)
    alpha = teacher.schedule.alpha(t.double()).float().view(-1, 1, 1, 1)
    torch.testing.assert_close(back.student.bind(class_labels=labels)(x, t), alpha * x)  # its output layer starts at zero
    with pytest.raises(FastdiffError, match="needs learned variance"):
        fd.sample(student.bind(class_labels=labels), fd.plan("ddpm", student, 3, variance="learned"), seeds=range(3))


def test_the_target_is_kept_in_the_datas_range(images, tmp_path):
    """At the noisiest times an eps teacher's x0 is off by sigma/alpha, 148 here, times its error; the loss does not see that."""
    teacher = teacher_of(tmp_path, prediction="eps")
    method = Match(Progressive(4, 2, **SHORT), predicts="x0", updates=2)
    run = Distiller(teacher, method, tmp_path / "s", images)
    batch = run._batch(run.stages[0], 0)
    known = fd.Denoiser(lambda x, t: torch.full_like(x, 1000.0), teacher.schedule, "x0")
    at_most = fd.Denoiser(lambda x, t: torch.ones_like(x), teacher.schedule, "x0")
    assert float(method.loss(at_most, known, at_most, batch)) == 0.0 and math.isclose(known.data_range[1], 1.0)


def test_what_such_a_student_cannot_have_is_refused(images, tmp_path):
    teacher = teacher_of(tmp_path)
    cases = [
        (Match(Trajectory(2), {"model_channels": 32}), None, "does not start as its teacher needs images"),
        (Match(Trajectory(2), {"channels": 32}), images, "cannot have another channels"),
        (Match(Trajectory(2), {"in_channels": 3}), images, "cannot have another in_channels"),
        (Match(Trajectory(2), {"channel_mult": 3}), images, "wrong type"),
        (Match(Trajectory(2), {"model_channels": 33}), images, "multiple of 32"),
        (Match(Trajectory(2), {"channel_mult": [1] * 5}), images, "5 levels halve"),
        (Match(Trajectory(2), predicts="all"), images, "unknown prediction"),
    ]
    for method, data, said in cases:
        with pytest.raises(FastdiffError, match=said):
            Distiller(teacher, method, tmp_path / "no", data)
    assert not (tmp_path / "no").exists()
