"""Where a student learns: every method's loss on a device that is not the CPU. "meta" stands for it: its tensors hold no numbers,
and most operations refuse, as a GPU's do, to mix them with the CPU's (not all: so every call's devices are looked at too)."""

import hub
import pytest
import tiny
import torch
from diffusers import DDPMScheduler

import fastdiff as fd
from fastdiff.distill import ECT, Consistency, Distiller, Guided, Match, Progressive, Settings, Trajectory
from fastdiff.training.data import load_images

SHORT = {"updates": 1, "batch": 4}
METHODS = {
    "progressive": Progressive(8, 2, **SHORT), "counts": Progressive(counts=(1, 2), **SHORT),
    "guided": Guided(start=4, steps=2, **SHORT),
    "guided counts": Guided(counts=(1, 2), **SHORT), "trajectory": Trajectory(2, calls=2, **SHORT),
    "trajectory guided": Trajectory(counts=(1, 2), scales=(1.0, 3.0), **SHORT),
    "consistency": Consistency(inner=4, huber=1e-3, **SHORT),
    "one segment": Consistency(segments=1, inner=4, **SHORT), "ect": ECT(phases=2, **SHORT),
    "match": Match(Progressive(8, 2, **SHORT), predicts="both", updates=1),
}  # fmt: skip


@pytest.mark.parametrize(("name", "prediction"), [*((name, "v") for name in METHODS), ("progressive", "eps")])
def test_a_loss_on_another_device(name, prediction, tmp_path, monkeypatch):
    """Every stage's loss and its gradient; the teacher of a later stage is the student's equal."""
    method, asked, call = METHODS[name], set(), fd.Denoiser.__call__

    def watched(self, x, t):
        d = call(self, x, t)
        asked.update((x.device.type, d.device.type))
        return d

    monkeypatch.setattr(fd.Denoiser, "__call__", watched)
    teacher = fd.load(tiny.checkpoint(tmp_path / "t.safetensors", prediction=prediction))
    run = Distiller(teacher, method, tmp_path / "run", load_images(tiny.npz(tmp_path / "x.npz")), device="meta")
    assert {p.device.type for net in (run.network, run.teacher.network) for p in net.parameters()} == {"meta"}
    for number in range(len(run.stages)):
        method.begin(number, teacher.schedule)
        batch = run._batch(run.stages[number], 0)
        assert {v.device.type for v in batch if isinstance(v, torch.Tensor)} == {"meta"}
        bound = {"class_labels": batch.labels, **({} if batch.scales is None else {"guidance": batch.scales})}
        student, target = (d.bind(**bound) for d in (run.student, run.target))
        taught = student if number and method.chained else run.teacher.bind(class_labels=batch.labels)
        loss = method.loss(student, taught, target, batch)
        assert loss.device.type == "meta" and loss.ndim == 0
        loss.backward()
    assert asked == {"meta"} and any(p.grad is not None for p in run.network.parameters())


def test_the_pretended_device_refuses_to_mix():
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device="meta") + torch.ones(3)


class Told(torch.nn.Module):
    """A network that is told a vector a sample."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, words):
        return self.layer(x) * words["mean"].view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1)


def test_what_is_bound_to_a_teacher_moves_with_it(tmp_path):
    """Conditions and what guidance leads away from, mappings of tensors among them."""
    teacher = fd.Denoiser(Told(), fd.schedule.vp_cosine(), "v", shape=(1, 8, 8)).bind(words={"mean": torch.ones(1)})
    teacher.contrast = {"words": {"mean": torch.zeros(1)}}
    run = Distiller(teacher, Trajectory(2, calls=1, **SHORT), tmp_path / "run", settings=Settings(guidance=2.0), device="meta")
    assert {d.unprompted["words"]["mean"].device.type for d in (run.source, run.teacher, run.student)} == {"meta"}
    taught = fd.guide.cfg(run.teacher, 2.0, negative=run.teacher.unprompted)
    loss = run.method.loss(run.student, taught, run.target, run._batch(run.stages[0], 0))
    assert loss.device.type == "meta" and teacher.cond["words"]["mean"].device.type == "cpu"


def test_a_teacher_of_another_library_moves_too(tmp_path):
    teacher = fd.load(hub.save(tmp_path / "m", hub.unet(), DDPMScheduler(**hub.VPS)))
    run = Distiller(teacher, Trajectory(2, calls=1, **SHORT), tmp_path / "run", device="meta")
    loss = run.method.loss(run.student, run.teacher, run.target, run._batch(run.stages[0], 0))
    assert loss.device.type == "meta"
