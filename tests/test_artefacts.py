"""Everything that was made from the shipped checkpoint says so by its hash: replacing one without the others fails here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.bench import converged
from fastdiff.bench.converged import rmse
from fastdiff.cli import artefacts, figures, student_tables
from fastdiff.cli.distilled import RECIPES
from fastdiff.metrics import load_judge
from fastdiff.shipped import FASHION_MNIST, STUDENT, read_verified

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RECORDS = ROOT / "benches" / "results"


@pytest.fixture(scope="module")
def den():
    return fd.load("fashion-mnist")


def records():
    return sorted(p for p in RECORDS.glob("*/results.json"))


def test_all_shipped_files_have_the_hash_that_is_recorded():
    table = json.loads((FASHION_MNIST / "hashes.json").read_text())
    for name in table:
        read_verified(FASHION_MNIST / name)
    listed = {p.name for p in FASHION_MNIST.iterdir() if p.is_file()} - {"hashes.json", "README.md", "LICENSE-fashion-mnist.txt"}
    assert set(table) == listed


def test_no_shipped_weights_exceed_eight_megabytes():
    assert all(p.stat().st_size <= 8e6 for p in FASHION_MNIST.rglob("*"))


def test_there_are_records():
    assert {"quick", "full"} <= {p.parent.name for p in records()}


@pytest.mark.parametrize("path", records(), ids=lambda p: p.parent.name)
def test_benchmark_records_belong_to_the_shipped_checkpoint(path, den):
    record = json.loads(path.read_text())
    assert record["checkpoint"]["sha256"] == den.hash
    assert record["setup"]["scorer"] == "judge:fashion-mnist"
    smallest = min(row["rmse"] for row in record["cells"] if "rmse" in row)
    movement, ok = record["converged"]["movement"], record["converged"]["ok"]
    assert ok == (movement <= 0.1 * smallest)
    # 2,048 endpoints converged to the end cost an hour: those of the tuned record are 80 steps, and the README says so
    assert ok or (path.parent.name == "tuned" and f"errors below {10 * movement:.3f} as upper bounds" in README)
    assert {row["n"] for row in (record["anchor"], record["converged"], *record["cells"])} == {record["setup"]["n"]}


def test_quality_record_and_model_card_belong_to_it(den):
    record = json.loads((RECORDS / "quality.json").read_text())
    assert record["checkpoint"] == den.hash
    text = (FASHION_MNIST / "README.md").read_text()
    assert den.hash in text
    for row in record["rows"]:
        assert f"{row['class_accuracy']:.1%}" in text and f"{row['recall']:.3f}" in text


def test_the_guidance_record_belongs_to_it_and_the_readme_says_what_it_holds(den):
    record = json.loads((RECORDS / "guidance" / "guidance.json").read_text())
    assert record["checkpoint"] == den.hash and record["n"] == 2048
    rows = {row["scale"]: row for row in record["rows"] if row["kind"] == "cfg"}
    nearest = min(rows, key=lambda scale: rows[scale]["fd_clf"])
    assert f"nearest to the data at scale {nearest:g}" in README
    assert rows[1.0]["class_accuracy"] < rows[nearest]["class_accuracy"] < rows[max(rows)]["class_accuracy"]


def test_the_shipped_model_meets_its_bars():
    rows = {row["guidance"]: row for row in json.loads((RECORDS / "quality.json").read_text())["rows"]}
    assert rows[1.0]["n"] == 10_000 and rows[1.0]["class_accuracy"] >= 0.8
    assert rows[2.0]["class_accuracy"] >= 0.9


def test_the_model_card_is_what_the_records_say(den, tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "FASHION_MNIST", tmp_path)
    artefacts.card(den, RECORDS)
    assert (tmp_path / "README.md").read_text() == (FASHION_MNIST / "README.md").read_text()


def test_stored_endpoints_are_those_of_the_shipped_model(den):
    stored = converged.shipped(den, 4)
    assert stored is not None
    bound = den.bind(class_labels=torch.arange(4))
    x = fd.sample(bound, fd.plan("dpmpp-3m", bound, 80, grid="uniform_lambda"), seeds=range(4))
    # 80 steps are nearly converged: far from other seeds' endpoints, near their own
    assert rmse(x, stored.x) < 0.02 < 0.2 < rmse(x.roll(1, 0), stored.x)
    assert converged.shipped(den, 100_000) is None


def test_the_shipped_model_makes_what_it_is_asked_for(den):
    """The bar of the model card on 100 seeds: with guidance 2 the judge finds the class in at least 85 of 100."""
    labels = torch.arange(100) % 10
    guided = fd.guide.cfg(den.bind(class_labels=labels), 2.0)
    x = fd.sample(guided, fd.plan("ipndm-3", guided, 10), seeds=range(100))
    found = load_judge()(x.clamp(-1, 1)).logits.argmax(dim=1)
    assert float((found == labels).float().mean()) >= 0.85


def test_figures_in_the_readme_are_in_the_records():
    """The README's block is what `make artefacts` writes from the records, to the letter."""
    assert README.split(figures.START)[1].split(figures.END)[0] == figures.text(RECORDS)


def test_tuned_plans_belong_to_the_shipped_checkpoint_and_keep_their_bars(den):
    """Paired error against the best of the registry on 2,048 held-out seeds: 0.6 at 5 and 6 calls, 0.7 at 8, below at 4, 10."""
    assert {p.nfe for p in den.tuned} == {4, 5, 6, 8, 10} and all(den.why_not(p) is None for p in den.tuned)
    for path in (FASHION_MNIST / "plans").glob("nfe-*.json"):
        read_verified(path)
    record = json.loads((RECORDS / "tuned" / "results.json").read_text())
    bars = {4: 1.0, 5: 0.6, 6: 0.6, 8: 0.7, 10: 1.0}
    for budget in record["tuning"]["budgets"]:
        assert budget["rmse_ratio"] < bars[budget["nfe"]]
        assert len(budget["search"]["finalists"]) == 4 and budget["search"]["seeds"] == 256
    by_nfe = {p.nfe: p for p in den.tuned}
    rows = [r for r in record["cells"] if r["line"] == "tuned"]
    assert {r["nfe"] for r in rows} == set(by_nfe) and {r["n"] for r in rows} == {2048}


def test_a_tuned_plan_is_the_one_of_the_record(den):
    """The first 64 seeds again: near the recorded error, which is far below the hand-made plan's."""
    stored = converged.shipped(den, 64)
    bound = den.bind(class_labels=torch.arange(64) % 10)
    errors = [rmse(fd.sample(bound, plan, seeds=range(64)), stored.x)
              for plan in (fd.plan("auto", bound, nfe=5), fd.plan("ipndm-2", bound, nfe=5, grid="beta"))]  # fmt: skip
    assert errors[0] < 0.7 * errors[1]


@pytest.fixture(scope="module")
def student():
    return fd.load("fashion-mnist-student")


def test_the_shipped_student_is_the_shipped_models_and_its_record_is_its_own(den, student, tmp_path, monkeypatch):
    record = json.loads((RECORDS / "student.json").read_text())
    assert student.info["training"]["distilled"]["teacher"] == den.hash == record["teacher"] and record["student"] == student.hash
    assert {p.nfe for p in student.tuned} == set(student.step_counts) >= {1, 2, 4}
    assert {row["n"] for row in record["rows"]} == {10_000}
    monkeypatch.setattr(artefacts, "STUDENT", tmp_path)
    artefacts.student_card(RECORDS)
    assert (tmp_path / "README.md").read_text() == (STUDENT / "README.md").read_text()


def test_the_shipped_student_keeps_its_bars(student):
    """At scale 1.5 and 4 calls its set is as near to the data as the converged teacher's without guidance, within a tenth of the
    distance above real images; at 1 call nearer than any hand-made plan of the teacher's at 4."""
    record = json.loads((RECORDS / "student.json").read_text())
    teacher = json.loads((RECORDS / "quality.json").read_text())["rows"][0]["fd_clf"]  # n = 10,000, no guidance
    hand_made = min(r["fd_clf"] for r in json.loads((RECORDS / "tuned" / "results.json").read_text())["cells"]
                    if r["nfe"] == 4 and r["line"] != "tuned")  # fmt: skip
    floor, found = record["floor"]["fd_clf"], {r["nfe"]: r["fd_clf"] for r in record["rows"] if r["guidance"] == 1.5}
    assert found[4] - floor <= 1.1 * (teacher - floor)
    assert found[1] < hand_made


def test_the_shipped_student_makes_what_it_is_asked_for_in_one_call(student):
    """The judge finds the class in at least 85 of 100, with guidance 2 as an input."""
    guided = fd.guide.cfg(student.bind(class_labels=torch.arange(100) % 10), 2.0)
    assert guided.calls == 1
    x = fd.sample(guided, student.tuned_plan(1), seeds=range(100))
    found = load_judge()(x.clamp(-1, 1)).logits.argmax(dim=1)
    assert float((found == torch.arange(100) % 10).float().mean()) >= 0.85


def test_students_in_the_readme_and_in_distill_md_are_in_the_records():
    start, end = figures.STUDENTS
    assert README.split(start)[1].split(end)[0] == figures.students(RECORDS)
    assert (RECORDS / "DISTILL.md").read_text() == student_tables.table(RECORDS, list(RECIPES))


def test_higher_order_beats_ddim_at_ten_calls_outside_the_interval():
    record = json.loads((RECORDS / "full" / "results.json").read_text())
    rows = {r["line"]: r for r in record["cells"] if r["nfe"] == 10}
    better = [line for line, r in rows.items() if r.get("mse_minus_ddim_hi", np.inf) < 0]
    assert {"dpmpp-2m · uniform_lambda", "unipc-2 · uniform_t", "ipndm-3 · beta"} <= set(better)


def test_the_cost_per_step_in_the_readme_is_in_the_record():
    rows = json.loads((RECORDS / "overhead.json").read_text())["results"]
    us = {(r["method"], r["who"]): r["us_per_row"] for r in rows if r["prediction"] == "eps"}
    for method in ("ddim", "heun", "dpmpp-2m", "dpmpp-3m", "unipc-2", "unipc-3", "lms-4"):
        cells = " | ".join(f"{us[method, who]:.0f}" for who in ("hand", "loop", "sample", "seat", "diffusers"))
        assert f"| `{method}` | {cells} |" in README
        assert us[method, "seat"] - us[method, "loop"] <= 25 and us[method, "loop"] <= 1.4 * us[method, "hand"]
    for method in ("unipc-2", "unipc-3"):  # 30 us where the hand-written DPM-Solver++(2M) takes 14
        assert us[method, "loop"] <= 30 / 14 * us[method, "hand dpmpp-2m"]
