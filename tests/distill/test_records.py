"""The stage that trains and records students, at tiny size: figures of teacher and student, the table, what is not trained."""

import json

import pytest
import tiny
import torch

import fastdiff as fd
from fastdiff.cli import distilled, student_tables
from fastdiff.distill import Guided, Progressive
from fastdiff.training.data import load_images


@pytest.fixture
def teacher(tmp_path):
    return fd.load(tiny.checkpoint(tmp_path / "t.safetensors"))


def test_a_record_holds_every_finished_stage_and_the_table_says_what_is_not_trained(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(distilled, "LINES", (("ddim", "uniform_t"), ("dpmpp-2m", "uniform_lambda")))
    monkeypatch.setattr(distilled, "ANCHOR_STEPS", 8)
    images, out = load_images(tiny.npz(tmp_path / "x.npz")), tmp_path / "records"
    assert student_tables.table(out, list(distilled.RECIPES)).count("not trained") == 6 * len(distilled.RECIPES)
    distilled.teacher_record(teacher, out, n=8, calls=(1, 2))
    distilled.student_record(teacher, "progressive", Progressive(4, 1, updates=2, batch=4), images, tmp_path / "work", out, n=8)
    record = json.loads((out / "distill-progressive.json").read_text())
    assert [r["network_calls"] for r in record["rows"]] == [2, 1] and record["updates"] == 4 and record["seconds"] > 0
    assert all(len(r["runs"]) == 3 and r["rmse"] == r["runs"][0]["rmse"] and "rmse" not in r["runs"][1] for r in record["rows"])
    text = student_tables.table(out, list(distilled.RECIPES))
    line = next(row for row in text.splitlines() if row.startswith("| progressive"))
    assert f"{record['rows'][1]['rmse']:.3f}" in line.split("|")[2] and "not trained" not in line
    assert "| teacher, DDIM |" in text and "| ect | not trained" in text
    page = (tmp_path / "work" / "report.html").read_text()
    assert page.count("data:image/png") == 2 and (tmp_path / "work" / "samples.png").exists()
    rows = [json.loads(row) for row in (tmp_path / "work" / "history.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3, 4] and all(row["rmse"] > 0 for row in rows)


def test_the_teachers_record_goes_on_where_it_was_stopped(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(distilled, "LINES", (("ddim", "uniform_t"), ("dpmpp-2m", "uniform_lambda")))
    monkeypatch.setattr(distilled, "ANCHOR_STEPS", 8)
    path, measured, row = tmp_path / "distill-teacher.json", [], distilled.Figures.row
    monkeypatch.setattr(distilled, "SCALES", (2.0,))

    def measure(self, denoiser, plan, **how):
        measured.append(plan.nfe)
        return row(self, denoiser, plan, **how)

    monkeypatch.setattr(distilled.Figures, "row", measure)
    distilled.teacher_record(teacher, tmp_path, n=4, calls=(2, 3))
    whole, needed = path.read_text(), len(measured)
    record = json.loads(whole)
    path.write_text(json.dumps({**record, "rows": record["rows"][:1]}))
    distilled.teacher_record(teacher, tmp_path, n=4, calls=(2, 3))
    assert path.read_text() == whole and len(measured) == 2 * needed - 1
    distilled.teacher_record(teacher, tmp_path, n=4, calls=(2, 3))
    assert len(measured) == 2 * needed - 1


def test_figures_are_those_of_the_samples(teacher, monkeypatch):
    """Errors against the teacher's converged ODE, which guidance has another of: there is none under it."""
    monkeypatch.setattr(distilled, "ANCHOR_STEPS", 8)
    plan, figures = fd.plan("ddim", teacher, 2), distilled.Figures(teacher, 6, None)
    den = teacher.bind(class_labels=torch.arange(6) % 3)
    want = fd.sample(den, fd.plan("dpmpp-2m", den, 8, grid="beta"), seeds=range(6))
    error = float((fd.sample(den, plan, seeds=range(6)) - want).square().mean().sqrt())
    row, guided = figures.row(teacher, plan), figures.row(teacher, plan, scale=2.0)
    assert (row["network_calls"], guided["network_calls"]) == (2, 4)
    assert row["rmse"] == pytest.approx(error, rel=1e-5) and "rmse" not in guided


def test_a_guided_record_compares_half_the_calls(teacher, tmp_path, monkeypatch):
    """The student's row beside the guided teacher's with as many evaluations, which are twice the calls; in the table too."""
    monkeypatch.setattr(distilled, "ANCHOR_STEPS", 4)
    monkeypatch.setattr(distilled, "SEEDS", (0,))
    monkeypatch.setattr(distilled, "SCALES", (2.0,))
    monkeypatch.setattr(distilled, "GUIDED", (2, (("ddim", "uniform_t"),)))
    monkeypatch.setitem(distilled.RECIPES, "guided", Guided(start=2, steps=2, updates=1, batch=4))
    distilled.teacher_record(teacher, tmp_path, n=4, calls=(1,))
    images = load_images(tiny.npz(tmp_path / "x.npz"))
    distilled.student_record(teacher, "guided", distilled.RECIPES["guided"], images, tmp_path / "g", tmp_path, n=4)
    table = student_tables.table(tmp_path, list(distilled.RECIPES))
    rows = [row for row in table.splitlines() if row.startswith("| 2 |")]
    assert [row.split("|")[2:4] for row in rows] == [[" 2 ", " guided "], [" 4 ", " teacher, ddim · uniform_t "]]
    record = json.loads((tmp_path / "distill-guided.json").read_text())
    assert [(r["guidance"], r["network_calls"]) for r in record["rows"]] == [(1.0, 2), (2.0, 2)]
    path = tmp_path / "distill-teacher.json"
    whole = path.read_text()
    distilled.teacher_record(teacher, tmp_path, n=4, calls=(1,))  # nothing is measured again
    assert path.read_text() == whole
