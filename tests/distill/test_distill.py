"""Distillation: the maths of a segment, students that learn, runs that resume bit for bit, and what is refused."""

import copy

import numpy as np
import pytest
import tiny
import torch

import fastdiff as fd
from fastdiff.bench.converged import rmse
from fastdiff.distill import Consistency, Distiller, Progressive, Settings, Trajectory
from fastdiff.distill.method import halvings, times, weight
from fastdiff.distill.segments import Segments
from fastdiff.errors import FastdiffError
from fastdiff.training.data import Images

SCHEDULE = fd.schedule.vp_cosine()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return fd.load(tiny.checkpoint(tmp_path_factory.mktemp("teacher") / "t.safetensors"))


@pytest.fixture(scope="module")
def images():
    x = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Images(x, torch.arange(40) % 3, ("a", "b", "c"), "digest")


def bent(schedule=SCHEDULE):
    return fd.Denoiser(lambda x, t: torch.tanh(1.3 * x) * (1 + t.view(-1, 1)).to(x.dtype), schedule, "x0")


@pytest.mark.parametrize("solver, calls", [("ddim", 2), ("dpmpp-2m", 3), ("unipc-2", 4)])
def test_a_batch_of_segments_is_each_segment_alone(solver, calls):
    """Every sample runs its own interval; the same numbers as a plan on that interval by the executor."""
    den, nodes = bent(), times(SCHEDULE, 4).tolist()
    segments = Segments(SCHEDULE, nodes, calls, solver)
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).view(4, 4)
    got = segments.run(den, x, torch.arange(4))
    for i in range(4):
        inside = np.linspace(nodes[i], nodes[i + 1] if i < 3 else SCHEDULE.t_min, calls + 1)
        grid, end = (inside, "sigma_min") if i < 3 else (inside[:-1], "zero")
        plan = fd.plan(solver, SCHEDULE, calls, grid=grid.tolist(), end=end)
        want = fd.sample(den, plan, start=x[i : i + 1], dtype=torch.float64)
        torch.testing.assert_close(got[i : i + 1], want, rtol=0, atol=1e-12)


def test_one_ddim_step_with_the_target_arrives_where_the_teacher_did():
    den, segments = bent(), Segments(SCHEDULE, times(SCHEDULE, 64).tolist(), 2)
    which, x = torch.arange(64), torch.linspace(-2, 2, 256).view(64, 4)
    end = segments.run(den, x, which)
    target = segments.target(x, end, which)
    coarse = Segments(SCHEDULE, times(SCHEDULE, 64).tolist(), 1)
    known = fd.Denoiser(lambda z, t: target, SCHEDULE, "x0")
    torch.testing.assert_close(coarse.run(known, x, which), end, rtol=0, atol=2e-6)
    assert torch.equal(target[-1], end[-1])  # the last step ends at clean data: the target is the end itself


@pytest.mark.parametrize("method", [Progressive(4, 2, updates=3), Trajectory(2, updates=3)], ids=lambda m: m.name)
def test_the_student_is_the_teacher_before_the_first_update(method, teacher, images, tmp_path):
    run = Distiller(teacher, method, tmp_path, images if method.needs_data else None)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.9, 0.5, 0.1])
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(run.student.bind(class_labels=labels)(x, t), teacher.bind(class_labels=labels)(x, t))
    assert not (tmp_path / "state.pt").exists()


def test_a_teacher_of_classes_without_a_null_class_is_asked_for_all_of_them(images, tmp_path):
    teacher = fd.load(tiny.checkpoint(tmp_path / "t.safetensors", tiny.network(num_classes=3, null_class=False)))
    run = Distiller(teacher, Trajectory(2, updates=1, batch=64, calls=1), tmp_path / "s")
    assert run._batch(run.stages[0], 0).labels.unique().tolist() == [0, 1, 2]
    run.run()
    assert torch.equal(Distiller(teacher, Progressive(4, 2), tmp_path / "p", images)._batch(run.stages[0], 0).labels.unique(),
                       torch.arange(3))  # fmt: skip


def distance(student, plan, teacher):
    """RMSE to the teacher's 64-step endpoints from the same noise, on seeds that no update drew."""
    labels, seeds = torch.arange(24) % 3, range(500, 524)
    mine, theirs = (d.bind(class_labels=labels) for d in (student, teacher))
    return rmse(fd.sample(mine, plan, seeds=seeds), fd.sample(theirs, fd.plan("ddim", theirs, 64, grid="uniform_t"), seeds=seeds))


@pytest.mark.parametrize("method", [
    Progressive(8, 2, updates=60, lr=1e-3, batch=16),
    pytest.param(Progressive(4, 2, updates=60, lr=1e-3, batch=16, solver="unipc-2", calls=4), marks=pytest.mark.slow),
    Trajectory(2, updates=60, lr=1e-3, batch=16),
], ids=["progressive", "progressive-unipc", "trajectory"])  # fmt: skip
def test_a_student_is_nearer_to_the_teacher_than_the_teacher_at_as_few_steps(method, teacher, images, tmp_path):
    student = Distiller(teacher, method, tmp_path, images if method.needs_data else None).run()
    assert student.plan is not None and student.plan.nfe == 2 and teacher.plan is None
    assert distance(student, student.plan, teacher) < 0.8 * distance(teacher, student.plan, teacher)
    assert fd.sample(student.bind(class_labels=torch.tensor([1])), seeds=[0]).shape == (1, 1, 8, 8)  # its own plan, no flags
    assert student.info["training"]["distilled"]["teacher"] == teacher.hash != student.hash
    for i, stage in enumerate(method.stages()):
        finished = fd.load(tmp_path / f"stage-{i + 1}-steps-{stage.steps}.safetensors")
        assert finished.plan.nfe == stage.steps


@pytest.mark.parametrize("stop", [3, 5, 7], ids=["inside a stage", "at its border", "in the next"])
def test_a_run_goes_on_bit_for_bit(stop, teacher, images, tmp_path):
    method = Progressive(8, 2, updates=5, batch=4)
    whole = Distiller(teacher, method, tmp_path / "whole", images).run()

    def interrupt(progress):
        if progress.stage * 5 + progress.update == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Distiller(teacher, copy.copy(method), tmp_path / "parts", images).run(interrupt)
    resumed = Distiller(teacher, copy.copy(method), tmp_path / "parts", images)
    assert resumed.stage * 5 + resumed.update == stop
    student = resumed.run()
    for a, b in zip(whole.network.parameters(), student.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_disk_that_fills_up_ends_the_run_and_loses_no_saved_update(teacher, images, tmp_path, monkeypatch):
    method = Progressive(8, 2, updates=3, batch=4)
    whole = Distiller(teacher, method, tmp_path / "whole", images).run()

    def full(*_):
        raise OSError(28, "No space left on device")

    def fill_up(progress):
        if (progress.stage, progress.update) == (1, 2):
            monkeypatch.setattr("os.replace", full)

    with pytest.raises(FastdiffError, match="No space left on device"):
        Distiller(teacher, method, tmp_path / "parts", images).run(fill_up, save_every=0.0)
    monkeypatch.undo()
    assert not list((tmp_path / "parts").glob(".*"))
    resumed = Distiller(teacher, method, tmp_path / "parts", images)
    assert (resumed.stage, resumed.update) == (1, 1) and resumed.run().hash == whole.hash


def test_a_finished_run_returns_its_student(teacher, tmp_path):
    method = Trajectory(2, updates=2, batch=2)
    first = Distiller(teacher, method, tmp_path).run()
    again = Distiller(teacher, method, tmp_path)
    assert again.finished and again.run().hash == first.hash


def test_weights_and_halvings():
    alpha, sigma = torch.tensor([0.1, 1.0, 0.0]), torch.tensor([1.0, 0.1, 1.0])
    torch.testing.assert_close(weight("truncated", alpha, sigma), torch.tensor([1.0, 100.0, 1.0]))
    torch.testing.assert_close(weight("snr+1", alpha, sigma), torch.tensor([1.01, 101.0, 1.0]))
    assert halvings(32, 4) == [16, 8, 4] and halvings(12, 3) == [6, 3]
    for start, end in ((32, 32), (30, 4), (4, 8), (8, 0)):
        with pytest.raises(FastdiffError):
            halvings(start, end)


def test_nonsense_is_refused(teacher, images, tmp_path):
    wrong = Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), None, (), "d")
    many = Images(images.x, torch.arange(40) % 9, tuple("abcdefghi"), "d")
    cases = [
        (Progressive(8, 2), None, "needs images"), (Progressive(8, 2), wrong, "shape"), (Progressive(8, 2), many, "9 classes"),
        (Progressive(9, 2), images, "power of two"), (Progressive(8, 2, weighting="eps"), images, "weighting"),
        (Progressive(8, 2, updates=0), images, "updates"), (Trajectory(2, solver="ddpm"), None, "cannot teach"),
        (Trajectory(2, calls=0), None, "teacher call"),
    ]  # fmt: skip
    for method, data, said in cases:
        with pytest.raises(FastdiffError, match=said):
            Distiller(teacher, method, tmp_path / "no", data)
    with pytest.raises(FastdiffError, match="own format"):
        Distiller(bent(), Trajectory(2), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    Distiller(teacher, Trajectory(2, updates=2, batch=2), tmp_path / "a").run()
    with pytest.raises(FastdiffError, match=r"updates \(2 -> 3\)"):
        Distiller(teacher, Trajectory(2, updates=3, batch=2), tmp_path / "a")
    (tmp_path / "a" / "state.pt").write_bytes(b"nothing")
    with pytest.raises(FastdiffError, match="damaged"):
        Distiller(teacher, Trajectory(2, updates=2, batch=2), tmp_path / "a")


def test_an_update_with_a_non_finite_gradient_changes_nothing_and_ten_in_a_row_stop(teacher, images, tmp_path):
    run = Distiller(teacher, Consistency(inner=2, updates=50, batch=2), tmp_path, images)
    good, stage = run.method.loss, run.stages[0]

    def bad(student, *_):
        return sum(p.sum() for p in student.network.parameters()) * float("inf")

    def weights():
        return [p.detach().clone() for network in (run.network, *run.averages.values()) for p in network.parameters()]

    before = weights()
    run.method.loss = bad
    for _ in range(9):
        run.step(stage)
    assert run.skipped == 9 and run.update == 9 and all(map(torch.equal, before, weights()))
    run.method.loss = good
    run.step(stage)
    assert run.skipped == 9 and not all(map(torch.equal, before, weights()))
    run.method.loss = bad
    for _ in range(9):
        run.step(stage)
    with pytest.raises(FastdiffError, match="10 steps had a non-finite gradient"):
        run.step(stage)
    assert run.skipped == 19


def test_accumulated_parts_have_the_gradient_of_the_whole_batch(teacher, tmp_path):
    """Three parts of a batch of six: the update's gradient is that of the mean over all six."""
    run = Distiller(teacher, Trajectory(2, updates=4, batch=6, calls=1), tmp_path, None, Settings(accumulate=3, clip=1e9))
    stage = run.stages[0]
    parts = [run._batch(stage, i) for i in range(3)]
    assert [len(part.noise) for part in parts] == [2, 2, 2] and not torch.equal(parts[0].noise, parts[1].noise)
    noise, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("noise", "labels"))
    student, true = (d.bind(class_labels=labels) for d in (run.student, run.teacher))
    loss = run.method.loss(student, true, true, parts[0]._replace(noise=noise, labels=labels))
    want = torch.autograd.grad(loss, list(run.network.parameters()))
    assert run.step(stage) == pytest.approx(float(loss.detach()), rel=1e-5)
    for p, g in zip(run.network.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_gradients_that_are_not_finite_stop_the_run(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(Trajectory, "loss", lambda self, student, *_: next(student.network.parameters()).sum() * float("nan"))
    run = Distiller(teacher, Trajectory(2, updates=50, batch=2), tmp_path)
    with pytest.raises(FastdiffError, match="non-finite"):
        run.run()
    assert run.skipped == 10
