"""Teachers whose networks are not fastdiff's own: folders of diffusers, EDM's files, Python classes; their students load."""

import json

import hub
import numpy as np
import peer_networks
import pytest
import tiny
import torch
from diffusers import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fastdiff as fd
from fastdiff.bench import Bench, Setup
from fastdiff.bench.cells import student_cells
from fastdiff.bench.converged import rmse
from fastdiff.distill import ECT, Consistency, Distiller, Guided, Match, Progressive, Settings, Trajectory
from fastdiff.distill.segments import nodes
from fastdiff.errors import CheckpointError, FastdiffError
from fastdiff.models.labelled import Labelled
from fastdiff.training.data import Images, load_images

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside diffusers itself
SHORT = Trajectory(2, updates=2, batch=2, calls=2, lr=1e-3)
PIXELS = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
COLOUR = Images(PIXELS, None, (), "d")


def folder(path, **changes):
    """A UNet2DModel's folder, three channels of 8 x 8, every weight drawn."""
    return hub.save(path, hub.unet(**changes), DDPMScheduler(**hub.VPS))


def edm_file(path, name="ddpm++ of classes", **metadata):
    weights = {f"model.{k}": v for k, v in peer_networks.weights(peer_networks.cases()[f"edm {name}"]["weights"]).items()}
    save_file(weights, path / "edm.safetensors", metadata=metadata or None)
    return path / "edm.safetensors"


class OfClasses(nn.Module):
    """A network of somebody's own with classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.enter, self.leave = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.classes = nn.Embedding(4, 16)
        self.null_label, self.config = 3, Labelled(4)

    def forward(self, x, t, class_labels):
        h = self.enter(x) + self.classes(class_labels)[:, :, None, None]
        return self.leave(torch.tanh(h * (1 + t.float().view(-1, 1, 1, 1))))


class Tied(nn.Module):
    """A network of somebody's own, with one weight under two names."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(1)
        self.enter, self.leave = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.again = self.leave

    def forward(self, x, t):
        return self.again(torch.tanh(self.enter(x) * (1 + t.view(-1, 1, 1, 1))))


def python_teacher(**changes):
    return fd.Denoiser(Tied(), **{"schedule": fd.schedule.vp_cosine(), "prediction": "v", "shape": (1, 8, 8), **changes})


def bound(den, n=3):
    return den.bind(class_labels=torch.arange(n) % den.num_classes) if den.num_classes else den


def same(a, b):
    """Whether two denoisers predict the same, to the bit, at three times."""
    x = torch.randn(3, *a.shape, generator=torch.Generator().manual_seed(7))
    span = a.schedule.t_max - a.schedule.t_min
    t = a.schedule.t_min + span * torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    return torch.equal(bound(a)(x, t), bound(b)(x, t))


TEACHERS = {
    "diffusers": lambda path: fd.load(folder(path / "m")),
    "diffusers of classes": lambda path: fd.load(folder(path / "m", num_class_embeds=4)),
    "edm of classes": lambda path: fd.load(edm_file(path)),
    "edm in VE's form": lambda path: fd.load(edm_file(path, "ncsn++", class_name="VEPrecond")),
    "python": lambda path: python_teacher(),
}


@pytest.mark.parametrize("kind", [
    *(k for k in TEACHERS if k != "diffusers"), pytest.param("diffusers", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_student_starts_as_its_teacher_learns_and_loads(kind, tmp_path):
    teacher = TEACHERS[kind](tmp_path)
    run = Distiller(teacher, SHORT, tmp_path / "s")
    assert same(run.student, teacher) and type(run.network) is type(teacher.network) and run.network is not teacher.network
    assert run.teacher.network is teacher.network  # it is not copied
    student = run.run()
    assert not same(student, teacher) and same(student, run.student)
    like = {"like": teacher} if kind == "python" else {}
    loaded = fd.load(tmp_path / "s", **like)
    assert same(loaded, student) and loaded.hash == student.hash and loaded.plan == student.plan and loaded.plan.nfe == 2
    assert (loaded.prediction, loaded.schedule, loaded.shape) == (teacher.prediction, teacher.schedule, teacher.shape)
    assert fd.sample(bound(loaded, 2), seeds=[0, 1]).shape == (2, *teacher.shape)
    finished = Distiller(teacher, SHORT, tmp_path / "s")
    assert finished.finished and finished.run().hash == student.hash


@pytest.mark.slow
def test_a_students_student_and_stages_that_hand_on(tmp_path):
    """Progressive distillation: each stage's student, of diffusers' class, teaches the next; stopped, it goes on bit for bit."""
    teacher = fd.load(folder(tmp_path / "m"))
    method = Progressive(4, 1, updates=2, batch=4)
    whole = Distiller(teacher, method, tmp_path / "whole", COLOUR).run()

    def interrupt(progress):
        if (progress.stage, progress.update) == (1, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Distiller(teacher, method, tmp_path / "parts", COLOUR).run(interrupt)
    assert Distiller(teacher, method, tmp_path / "parts", COLOUR).run().hash == whole.hash
    first = fd.load(tmp_path / "whole" / "stage-1-steps-2.safetensors")
    assert first.plan.nfe == 2 and not same(first, whole)
    again = Distiller(first, Trajectory(1, updates=1, batch=2, calls=1), tmp_path / "again")
    assert same(again.student, first)
    again.run()
    assert same(fd.load(tmp_path / "again"), again.student)


@pytest.mark.slow
def test_an_averaged_student_of_another_prediction(tmp_path):
    """Settings that need no other network: a v student of an eps teacher, saved as its average."""
    teacher = fd.load(folder(tmp_path / "m"))
    assert teacher.prediction == "eps"
    method = Match(Consistency(inner=2, updates=2, batch=4, ema=0.5), predicts="v", updates=2)
    student = Distiller(teacher, method, tmp_path / "s", COLOUR).run()
    assert student.prediction == "v" and same(student, fd.load(tmp_path / "s"))


def test_students_of_sigma_step_on_edms_own_grid(tmp_path):
    """Uniform times would leave all but one of a few steps above sigma = 10."""
    s = fd.schedule.edm()
    got = nodes(s, s.t_max, s.t_min, 5)
    np.testing.assert_allclose(got ** (1 / 7), np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 5), rtol=1e-12)
    assert (got[0], got[-1]) == (80.0, 0.002)
    student = Distiller(fd.load(edm_file(tmp_path)), SHORT, tmp_path / "s").run()
    np.testing.assert_allclose([row.t for row in student.plan.rows], nodes(s, s.t_max, s.t_min, 3)[:-1])
    cosine = fd.schedule.vp_cosine()
    np.testing.assert_array_equal(nodes(cosine, 1.0, 0.0, 4), np.linspace(1, 0, 4))


@pytest.mark.slow
def test_a_student_of_diffusers_comes_nearer_to_its_teacher(tmp_path):
    teacher = fd.load(folder(tmp_path / "m"))
    student = Distiller(teacher, Trajectory(2, updates=40, lr=1e-3, batch=8, calls=2), tmp_path / "s").run()
    want = fd.sample(teacher, fd.plan("ddim", teacher, 32, grid="uniform_t"), seeds=range(500, 508))
    errors = [rmse(fd.sample(d, student.plan, seeds=range(500, 508)), want) for d in (student, teacher)]
    assert errors[0] < 0.8 * errors[1], errors


def test_a_python_network_needs_one_like_it(tmp_path):
    teacher = python_teacher()
    Distiller(teacher, SHORT, tmp_path / "s").run()
    cases = [
        (None, "Tied, which no file describes: give like="), (python_teacher().with_network(Tied(9)), "misshapen"),
        (python_teacher(schedule=fd.schedule.vp_linear()), "made on schedule"),
    ]  # fmt: skip
    for like, said in cases:
        with pytest.raises(CheckpointError, match=said) as e:
            fd.load(tmp_path / "s", like=like)
        assert "\n" not in str(e.value)
    own = tiny.checkpoint(tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match="leave out like="):
        fd.load(own, like=teacher)
    other = python_teacher()
    with torch.no_grad():
        other.network.enter.weight.add_(1.0)
    with pytest.raises(FastdiffError, match="other settings: teacher"):
        Distiller(other, SHORT, tmp_path / "s")


def test_what_such_a_student_cannot_be_is_one_line(tmp_path):
    teacher = fd.load(folder(tmp_path / "m", num_class_embeds=4))
    own = fd.load(tiny.checkpoint(tmp_path / "t.safetensors"))
    guided = fd.guide.cfg(own.bind(class_labels=torch.tensor([0])), 2.0)
    cases = [
        (teacher, Guided(4, 2), {}, "guidance scale as an input"), (teacher, Progressive(4, 2), {}, "needs images"),
        (teacher, Trajectory(counts=(1, 2)), {}, "number of its calls"),
        (teacher, Match(SHORT, {"model_channels": 32}), {}, "other settings"),
        (teacher, Match(SHORT, predicts="both"), {}, "a second output"),
        (python_teacher(), SHORT, {"checkpointing": True}, "no such mode"),
        (python_teacher(), SHORT, {"guidance": 2.0}, "guidance needs"), (own, ECT(), {"guidance": 2.0}, "never asks the teacher"),
        (own, Match(ECT(), predicts="x0"), {"guidance": 2.0}, "never asks the teacher"),
        (own, Match(Trajectory(scales=(1.0, 2.0)), predicts="x0"), {"guidance": 2.0}, "one scale of guidance, or a range"),
        (own, Trajectory(scales=(1.0, 2.0)), {"guidance": 2.0}, "one scale of guidance, or a range"),
        (guided, SHORT, {}, "a plain Denoiser, not a Guided"), (python_teacher(shape=None), SHORT, {}, "shape of a sample"),
        (python_teacher().with_network(nn.Identity()), SHORT, {}, "with parameters"),
    ]  # fmt: skip
    for den, method, settings, said in cases:
        with pytest.raises(FastdiffError, match=said) as e:
            Distiller(den, method, tmp_path / "no", COLOUR if method.adds() else None, Settings(**settings))
        assert "\n" not in str(e.value)
    assert not (tmp_path / "no").exists()


def test_a_tampered_description_is_one_line(tmp_path):
    Distiller(fd.load(folder(tmp_path / "m")), SHORT, tmp_path / "s").run()
    path = tmp_path / "s" / "model.safetensors"
    with safe_open(str(path), framework="pt") as f:
        tensors, description = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["fastdiff"])  # noqa: SIM118
    changes = [
        {"layout": {"name": "pickle"}}, {"layout": 3}, {"layout": {"name": "diffusers"}}, {"prediction": "magic"}, {"shape": 5},
        {"layout": {"name": "EDM", "class_name": "os", "settings": {}, "levels": None}}, {"network": {"_class_name": "Popen"}},
        {"network": {**description["network"], "layers_per_block": 2}}, {"plan": "{}"},
    ]  # fmt: skip
    for change in changes:
        save_file(tensors, tmp_path / "x.safetensors", metadata={"fastdiff": json.dumps({**description, **change})})
        with pytest.raises(FastdiffError) as e:
            fd.load(tmp_path / "x.safetensors")
        assert "\n" not in str(e.value) and "x.safetensors" in str(e.value), change


def test_the_command_line_takes_a_folder_of_diffusers(fastdiff, tmp_path):
    command = ("--method", "trajectory", "--steps", 2, "--updates", 1, "--batch", 2, "--calls", 2, "--out", tmp_path / "s")
    code, _, err = fastdiff("distill", folder(tmp_path / "m"), *command)
    assert code == 0, err
    code, out, err = fastdiff("sample", tmp_path / "s", "--seeds", "0", "--out", tmp_path / "p")
    assert code == 0 and "2 network calls a sample" in out, (out, err)
    code, out, err = fastdiff("info", tmp_path / "s")
    assert code == 0 and "ddim, 2 calls" in out and "eps" in out


def test_a_student_of_one_scale_of_guidance_does_in_one_call_what_its_teacher_does_in_two(tmp_path):
    """A network of somebody's own with three classes and a row for none: the student needs no guidance, and no input for it."""
    teacher = python_teacher().with_network(OfClasses())
    method = Trajectory(1, updates=60, lr=2e-3, batch=8, calls=1)
    student = Distiller(teacher, method, tmp_path / "s", settings=Settings(guidance=4.0)).run()
    assert student.info["training"]["distilled"]["guidance"] == 4.0
    labels = torch.arange(6) % teacher.num_classes
    one, plain = (d.bind(class_labels=labels) for d in (student, teacher))
    two = fd.guide.cfg(plain, 4.0, negative=teacher.unprompted)
    assert (one.calls, two.calls) == (1, 2)
    want = fd.sample(two, student.plan, seeds=range(6))
    errors = [rmse(fd.sample(d, student.plan, seeds=range(6)), want) for d in (one, plain)]
    assert errors[0] < 0.8 * errors[1], errors
    with pytest.raises(FastdiffError, match="learned its teacher's guidance at scale 4, and needs none"):
        fd.guide.cfg(one, 4.0)
    with pytest.raises(FastdiffError, match="other settings: guidance"):
        Distiller(teacher, method, tmp_path / "s", settings=Settings(guidance=3.0))


def test_a_benchmark_runs_such_a_student_without_guidance_beside_its_guided_teacher(tmp_path):
    own = fd.load(tiny.checkpoint(tmp_path / "t.safetensors"))
    student = Distiller(own, SHORT, tmp_path / "s", settings=Settings(guidance=3.0)).run()
    setup = Setup(4, guidance=3.0)
    (cell,) = student_cells(student, own, setup)
    record, x = Bench(own, setup, tmp_path / "b", None)._cell(cell, None)
    labelled = student.bind(class_labels=setup.labels(student))
    torch.testing.assert_close(x.float(), fd.sample(labelled, seeds=range(4)), rtol=1e-3, atol=1e-3)
    assert record["network_calls"] == 2
    with pytest.raises(FastdiffError, match="learned guidance at scale 3"):
        student_cells(student, own, Setup(4))
    ranged = Distiller(own, Trajectory(1, updates=1, batch=2, calls=1, scales=(2.0, 5.0)), tmp_path / "r").run()
    with pytest.raises(FastdiffError, match="knows guidance scales 2 to 5; the benchmark's is 1"):
        student_cells(ranged, own, Setup(4))


def test_the_teacher_is_guided_until_a_student_of_its_own_takes_over(tmp_path):
    """Progressive distillation: the first stage's targets are the guided teacher's, the second's the student's as it is; a run
    that is stopped after the hand-over goes on bit for bit."""
    own, data = fd.load(tiny.checkpoint(tmp_path / "t.safetensors")), load_images(tiny.npz(tmp_path / "x.npz"))
    method, settings, asked = Progressive(4, 1, updates=2, batch=4), Settings(guidance=3.0), []

    class Watched(Progressive):
        def loss(self, student, teacher, target, batch):
            asked.append(teacher.calls)
            return super().loss(student, teacher, target, batch)

    whole = Distiller(own, Watched(4, 1, updates=2, batch=4), tmp_path / "whole", data, settings).run()
    assert asked == [2, 2, 1, 1]

    def interrupt(progress):
        if (progress.stage, progress.update) == (1, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Distiller(own, method, tmp_path / "parts", data, settings).run(interrupt)
    assert Distiller(own, method, tmp_path / "parts", data, settings).run().hash == whole.hash


@pytest.mark.slow
def test_a_lora_student_of_diffusers_with_less_memory(tmp_path):
    """It starts as its teacher; its file is an ordinary student's; peft loads its adapter into the teacher's own class."""
    peft = pytest.importorskip("peft")
    teacher = fd.load(folder(tmp_path / "m", num_class_embeds=4))
    run = Distiller(teacher, SHORT, tmp_path / "s", settings=Settings(lora=2, checkpointing=True))
    assert same(run.student, teacher)
    learning = [name for name, p in run.network.named_parameters() if p.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    block = next(m for m in run.network.modules() if type(m).__name__ == "ResnetBlock2D")
    passes = []
    block.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    run.step(run.stages[0])
    assert passes.count(True) == 2 * SHORT.steps, "with gradients once forward and once more in the backward pass"
    student = run.run()
    assert not same(student, teacher) and type(student.network) is type(teacher.network)
    fresh = fd.load(tmp_path / "m")
    adapted = peft.PeftModel.from_pretrained(fresh.network, tmp_path / "s" / "adapter").eval()
    x, t = torch.randn(3, *teacher.shape), torch.tensor([900.0, 500.0, 100.0], dtype=torch.float64)
    with torch.no_grad():
        got, want = bound(fresh.with_network(adapted))(x, t), bound(student)(x, t)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
