"""One student for several step counts: what it starts from, that it learns each count, and that it is told which one runs."""

import dataclasses
import json

import pytest
import tiny
import torch

import fastdiff as fd
from fastdiff.bench import Bench, Setup
from fastdiff.bench.cells import student_cells, tuned_cells
from fastdiff.bench.converged import rmse
from fastdiff.distill import Distiller, Match, Progressive, Settings, Trajectory, progressive
from fastdiff.distill.progressive import shares
from fastdiff.distill.trajectory import points
from fastdiff.errors import FastdiffError
from fastdiff.graph import Captured
from fastdiff.models import UNetConfig
from fastdiff.training.data import load_images

LABELS = torch.arange(24) % 3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return fd.load(tiny.checkpoint(tmp_path_factory.mktemp("teacher") / "t.safetensors"))


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    """The run's folder and its student, of one and of two calls."""
    out = tmp_path_factory.mktemp("student")
    return out, Distiller(teacher, Trajectory(counts=(2, 1), updates=24, lr=2e-3, batch=8, calls=2), out).run()


def test_the_student_is_the_teacher_at_every_count_before_the_first_update(teacher, tmp_path):
    run = Distiller(teacher, Trajectory(counts=(1, 2, 4)), tmp_path)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 2])
    want = teacher.bind(class_labels=labels)(x, t)
    for bound in ({}, {"steps": 1}, {"steps": 2}, {"steps": 4}):
        assert torch.equal(run.student.bind(class_labels=labels, **bound)(x, t), want)


def test_an_update_trains_the_input_of_every_count(teacher, tmp_path):
    run = Distiller(teacher, Trajectory(counts=(1, 2), updates=4, batch=2, calls=2), tmp_path)
    run.step(run.stages[0])
    assert bool((run.network.steps_embed.weight != 0).any(dim=1).all())


def test_one_run_of_the_teacher_serves_every_count_that_divides_the_largest(teacher):
    """And the points at which the student's steps end are the teacher's at those times, whichever run they are of."""
    method = Trajectory(counts=(1, 2, 3, 4), calls=2)
    assert method.steps == 4 and method.settings()["counts"] == (1, 2, 3, 4)
    method.begin(0, teacher.schedule)
    assert {n: tuple(segments.times.shape) for n, segments in method._teacher.items()} == {3: (3, 3), 4: (4, 2)}
    for n, mine in method._student.items():
        m = method._taught_by(n)
        torch.testing.assert_close(mine.sigma[:, -1], method._teacher[m].sigma[m // n - 1 :: m // n, -1], rtol=1e-12, atol=0)

    called = []

    def network(x, t):
        called.append(len(x))
        return torch.zeros_like(x)

    counted = fd.Denoiser(network, teacher.schedule, prediction="x0", shape=(1, 8, 8))
    assert len(points(method._teacher[4], counted, torch.randn(2, 1, 8, 8))) == 4 and len(called) == 8


def test_each_count_comes_nearer_to_the_teacher_and_runs_by_its_own_plan(teacher, trained):
    _, student = trained
    assert [p.nfe for p in student.tuned] == [1, 2] and student.plan == student.tuned[1] and student.step_counts == (1, 2)
    mine, theirs = (d.bind(class_labels=LABELS) for d in (student, teacher))
    want = fd.sample(theirs, fd.plan("ddim", theirs, 64, grid="uniform_t"), seeds=range(500, 524))
    for plan in student.tuned:
        assert fd.plan("auto", mine, plan.nfe).rows == plan.rows
        errors = [rmse(fd.sample(d, plan, seeds=range(500, 524)), want) for d in (mine, theirs)]
        assert errors[0] < 0.9 * errors[1], (plan.nfe, errors)
    assert "the student's own" in fd.plan("auto", student, 1).provenance["auto"]


def test_the_network_is_told_the_plans_number_of_calls(trained):
    student = trained[1].bind(class_labels=LABELS[:4])
    one, two = student.tuned
    got = fd.sample(student, one, seeds=range(4))
    assert torch.equal(got, fd.sample(student.bind(steps=1), one, seeds=range(4)))
    assert not torch.equal(got, fd.sample(student.bind(steps=2), one, seeds=range(4)))
    assert torch.equal(fd.sample(student, seeds=range(4)), fd.sample(student.bind(steps=2), two, seeds=range(4)))
    guided = fd.guide.cfg(student, 2.0)
    assert torch.equal(fd.sample(guided, one, seeds=range(4)), fd.sample(guided.bind(steps=1), one, seeds=range(4)))


def test_a_count_it_was_not_trained_for_is_one_line(trained, teacher, tmp_path):
    labelled = trained[1].bind(class_labels=LABELS[:1])
    for ask in (lambda: fd.plan("auto", labelled, 3), lambda: fd.sample(labelled, fd.plan("ddim", labelled, 3), seeds=[0]),
                lambda: Captured(labelled, fd.plan("ddim", labelled, 3), torch.device("cpu"))):
        with pytest.raises(FastdiffError, match="trained for 1, 2 calls; asked for 3"):
            ask()
    with pytest.raises(FastdiffError, match="distil its teacher"):
        Distiller(trained[1], Trajectory(2), tmp_path / "no")
    with pytest.raises(FastdiffError, match="takes no number of calls"):
        teacher.bind(class_labels=LABELS[:1], steps=2)(torch.zeros(1, 1, 8, 8), 0.5)
    for counts in ((2, 2), (0, 1), ()):
        with pytest.raises(FastdiffError, match="such as 1,2,4"):
            UNetConfig(step_counts=counts)


def test_the_command_line_knows_the_counts(fastdiff, trained, tmp_path):
    out, _ = trained
    code, said, err = fastdiff("sample", out, "--nfe", 1, "--seeds", "0", "--out", tmp_path / "p")
    assert code == 0 and "the student's own" in said and "1 network calls a sample" in said, (said, err)
    code, _, err = fastdiff("sample", out, "--nfe", 3, "--seeds", "0", "--out", tmp_path / "q")
    assert code == 2 and "1, 2 calls" in err and err.strip().count("\n") == 0 and not (tmp_path / "q").exists()
    code, said, err = fastdiff("info", out, "--json")
    assert code == 0 and json.loads(said)["checkpoint"]["step counts"] == [1, 2]


def test_it_is_distilled_from_the_command_line(fastdiff, tmp_path):
    teacher = tiny.checkpoint(tmp_path / "t.safetensors")
    command = ("distill", teacher, "--updates", 2, "--batch", 2, "--calls", 1, "--out", tmp_path / "s", "--method")
    code, out, err = fastdiff(*command, "trajectory", "--steps", "1,2")
    assert code == 0 and "1 or 2 network calls" in out and "--nfe N" in out, (out, err)
    for method, steps, said in (
        ("ect", "1,2", "no setting --steps of several"), ("progressive", "1,3", "each twice the one before"),
        ("trajectory", "1,x", "or several"), ("progressive", "1,2 --start 8", "--start follows from --steps"),
    ):
        code, _, err = fastdiff(*command[:-2], tmp_path / "no", "--method", method, "--steps", *steps.split())
        assert code == 2 and said in err and err.strip().count("\n") == 0 and not (tmp_path / "no").exists()


def test_a_benchmark_measures_every_count(trained, tmp_path):
    _, student = trained
    setup = Setup(4)
    cells = tuned_cells(student, setup)
    assert [(c.line, c.nfe) for c in cells] == [("student", 1), ("student", 2)]
    bench = Bench(student, setup, tmp_path, None)
    (_, one), (record, _) = (bench._cell(cell, None) for cell in cells)
    bound = student.bind(class_labels=setup.labels(student))
    torch.testing.assert_close(one.float(), fd.sample(bound, cells[0].saved, seeds=range(4)), rtol=1e-3, atol=1e-3)
    assert record["network_calls"] == 2 and bench._endpoints(5, 2, None).shape == (2, 1, 8, 8)


def test_a_benchmark_measures_a_student_beside_its_teacher(teacher, trained, tmp_path):
    """Its samples are its own; both are held against the teacher's converged ODE. A student of another teacher is refused."""
    student, setup = trained[1], Setup(4)
    cells = student_cells(student, teacher, setup)
    assert [(c.line, c.nfe) for c in cells] == [("student", 1), ("student", 2)]
    bench = Bench(teacher, setup, tmp_path / "b", None)
    record, x = bench._cell(cells[1], None)
    bound = student.bind(class_labels=setup.labels(student))
    torch.testing.assert_close(x.float(), fd.sample(bound, cells[1].saved, seeds=range(4)), rtol=1e-3, atol=1e-3)
    assert record["network_calls"] == 2
    theirs = bench._cell(dataclasses.replace(cells[1], student=None), None)[1]
    assert not torch.equal(theirs, x), "one plan, two networks: two cells"
    other = fd.load(tiny.checkpoint(tmp_path / "other.safetensors", prediction="x0"))
    for student_of, beside, said in ((student, other, "its own teacher"), (teacher, teacher, "`fastdiff distill` made")):
        with pytest.raises(FastdiffError, match=said):
            student_cells(student_of, beside, setup)


def test_a_student_of_another_network_is_matched_at_every_count(teacher, tmp_path):
    method = Match(Trajectory(counts=(1, 2), updates=2, batch=4, calls=1), {"model_channels": 64}, updates=2)
    student = Distiller(teacher, method, tmp_path / "s", load_images(tiny.npz(tmp_path / "x.npz"))).run()
    assert student.step_counts == (1, 2) and [p.nfe for p in student.tuned] == [1, 2]
    matched = fd.load(tmp_path / "s" / "stage-1-steps-2.safetensors").bind(class_labels=LABELS[:1])
    assert matched.tuned == student.tuned and fd.sample(matched, seeds=[0]).shape == (1, 1, 8, 8)
    with pytest.raises(FastdiffError, match="another step_counts"):
        Distiller(teacher, Match(Progressive(4, 2), {"step_counts": [1, 2]}), tmp_path / "no", load_images(tmp_path / "x.npz"))


@pytest.mark.slow
def test_the_benchmark_command_takes_such_a_student(fastdiff, trained, tmp_path):
    """Of the preset's budgets it runs those that the student knows (here none), and its own plans."""
    code, _, err = fastdiff("bench", trained[0], "--n", 4, "--out", tmp_path / "b")
    assert code == 0, err
    record = json.loads((tmp_path / "b" / "results.json").read_text())
    assert [(r["line"], r["nfe"]) for r in record["cells"]] == [("student", 1), ("student", 2)]
    code, _, err = fastdiff("bench", trained[0], "--solvers", "ddim", "--nfe", "3", "--n", 4, "--out", tmp_path / "c")
    assert code == 2 and "1, 2 calls" in err and err.strip().count("\n") == 0


@pytest.mark.slow
def test_the_benchmark_command_measures_students_beside_their_teacher(fastdiff, teacher, trained, tmp_path):
    path, one = tiny.checkpoint(tmp_path / "t.safetensors"), trained[0]
    Distiller(teacher, Trajectory(1, updates=1, batch=2, calls=1), tmp_path / "two").run()
    command = ("bench", path, "--solvers", "ddim", "--nfe", "2", "--n", 4, "--student")
    code, _, err = fastdiff(*command, one, "--out", tmp_path / "b")
    assert code == 0, err
    rows = json.loads((tmp_path / "b" / "results.json").read_text())["cells"]
    assert [(r["line"], r["nfe"]) for r in rows] == [("ddim · uniform_t", 2), ("student", 1), ("student", 2)]
    code, _, err = fastdiff(*command, one, "--student", tmp_path / "two", "--out", tmp_path / "c")
    assert code == 0, err
    rows = json.loads((tmp_path / "c" / "results.json").read_text())["cells"]
    assert {(r["line"], r["nfe"]) for r in rows} == {
        ("ddim · uniform_t", 2), (f"student {one.name}", 1), (f"student {one.name}", 2), ("student two", 1)
    }  # fmt: skip
    code, _, err = fastdiff(*command, path, "--out", tmp_path / "d")
    assert code == 2 and "`fastdiff distill` made" in err and err.strip().count("\n") == 0 and not (tmp_path / "d").exists()


@pytest.mark.slow
def test_an_engine_is_told_its_plans_count(trained, tmp_path):
    """The export's own gate compares the engine with the eager sampler, which tells the network the plan's count."""
    pytest.importorskip("onnxruntime")
    from fastdiff.export.folder import Wish, export

    _, student = trained
    made = export(student, student.tuned[0], tmp_path / "e")
    assert made["plan"]["nfe"] == 1 and made["verified"]
    with pytest.raises(FastdiffError, match="leave out --plan-input"):
        export(student, student.tuned[0], tmp_path / "f", Wish(plan_input=True))


@pytest.mark.slow
def test_a_lora_student_of_several_counts(teacher, tmp_path):
    pytest.importorskip("peft")
    method = Trajectory(counts=(1, 2), updates=4, batch=2, calls=1, lr=1e-2)
    run = Distiller(teacher, dataclasses.replace(method), tmp_path / "l", None, Settings(lora=2))
    student = run.run()
    assert student.step_counts == (1, 2) and bool(student.network.steps_embed.weight.any(dim=1).all())


def test_a_progressive_student_keeps_the_counts_of_the_stages_before(teacher, tmp_path, monkeypatch):
    """At 2 and 4 calls the last stage's network is nearer to the converged ODE than one that never practised them again."""
    data = load_images(tiny.npz(tmp_path / "x.npz"))
    method = Progressive(counts=(1, 2, 4), updates=60, lr=2e-3, batch=16)
    assert (method.start, method.steps, [s.steps for s in method.stages()]) == (8, 1, [4, 2, 1])
    student = Distiller(teacher, method, tmp_path / "s", data).run()
    monkeypatch.setattr(progressive, "PRACTICE", 0.0)
    forgetful = Distiller(teacher, dataclasses.replace(method), tmp_path / "f", data).run()
    assert student.step_counts == (1, 2, 4) and [p.nfe for p in student.tuned] == [1, 2, 4] and student.plan.nfe == 1
    halfway = fd.load(tmp_path / "s" / "stage-2-steps-2.safetensors")
    assert [p.nfe for p in halfway.tuned] == [2, 4]
    mine, theirs = (d.bind(class_labels=LABELS) for d in (student, teacher))
    want = fd.sample(theirs, fd.plan("ddim", theirs, 64, grid="uniform_t"), seeds=range(500, 524))
    other = forgetful.bind(class_labels=LABELS)
    errors = {p.nfe: [rmse(fd.sample(d, p, seeds=range(500, 524)), want) for d in (mine, theirs, other)] for p in student.tuned}
    assert all(errors[n][0] < 0.9 * errors[n][1] for n in (1, 2)), errors
    assert all(errors[n][0] < 0.9 * errors[n][2] for n in (2, 4)), errors


def test_the_rows_of_a_batch_that_practise():
    assert [len(s) for s in shares(32, 3)] == [16, 5, 5, 6] and [len(s) for s in shares(4, 3)] == [2, 0, 1, 1]
    assert torch.equal(torch.cat(shares(32, 3)), torch.arange(32)) and [len(s) for s in shares(2, 3)] == [1, 0, 0, 1]
