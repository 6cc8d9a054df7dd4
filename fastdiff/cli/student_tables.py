"""The tables of students and teacher, from the records of `distilled`: DISTILL.md, and the block of the README."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..denoiser import Denoiser
from ..errors import FastdiffError

Row = dict[str, Any]
COLUMNS = (1, 2, 4, 8, 16, 50)
TEACHER = (("teacher, DDIM", "ddim"), ("teacher, best hand-made", "best"))


def table(records: Path, names: Sequence[str]) -> str:
    """DISTILL.md: methods by calls; FD-clf, KID-clf, recall, accuracy and paired error in a cell, and what the training took."""
    lines = ["# Students of the shipped model", "", HEAD, ""]
    lines.append("| method | " + " | ".join(f"{n} calls" for n in COLUMNS) + " | minutes | images | forward passes |")
    lines.append("|---" * (len(COLUMNS) + 4) + "|")
    teacher = read(records / "distill-teacher.json")
    if teacher is not None:
        for name, which in TEACHER:
            rows = by_calls(teacher, which)
            lines.append(f"| {name} | " + " | ".join(_cell(rows.get(n)) for n in COLUMNS) + " | - | - | - |")
    for name in names:
        record = read(records / f"distill-{name}.json")
        if record is None:
            lines.append(f"| {name} | " + " | ".join("not trained" for _ in COLUMNS) + " | - | - | - |")
            continue
        rows = by_calls(record, name)
        cells = " | ".join(_cell(rows.get(n)) for n in COLUMNS)
        took = f"{record['seconds'] / 60:.0f} | {record['images']:,} | {record['units'] / 1e3:,.0f} k"
        lines.append(f"| {name} | {cells} | {took} |")
    return "\n".join([*lines, *_guided(teacher, _students(records, names))]) + "\n"


HEAD = (
    "A cell: FD-clf / 1000 KID-clf / recall / class accuracy / paired RMSE from the teacher's converged ODE (a dash where\n"
    "sampling draws noise, or where n is too small for FD-clf). Students: means over three sets of seeds. Forward passes of one\n"
    "image in training, teacher's and student's, a backward pass counting two. Made by\n"
    "`python -m fastdiff.cli.artefacts --only distill-teacher,distill-METHOD,distill-table`."
)


def by_calls(record: Row, which: str) -> dict[int, Row]:
    """Rows without guidance by network calls: of a student's name, of the teacher's DDIM ("ddim") or its best line ("best")."""
    wanted = {"ddim": lambda r: r["line"] == "ddim · uniform_t", "best": lambda r: r["best"]}
    take = wanted.get(which, lambda r: r["line"] == which)
    return {r["network_calls"]: r for r in record["rows"] if r["guidance"] == 1.0 and take(r)}


def _students(records: Path, names: Iterable[str]) -> list[Row]:
    return [r for name in names if (r := read(records / f"distill-{name}.json"))]


def _guided(teacher: Row | None, students: list[Row]) -> list[str]:
    """The rows under guidance, the teacher's beside those of the students that take the scale."""
    rows = [r for record in students for r in record["rows"] if r["guidance"] != 1.0]
    if not rows:
        return []
    rows += [{**r, "line": f"teacher, {r['line']}"} for r in (teacher or {"rows": []})["rows"] if r["guidance"] != 1.0]
    out = ["", "| guidance | network calls | who | figures |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (r["guidance"], r["network_calls"])):
        out.append(f"| {row['guidance']:g} | {row['network_calls']} | {row['line']} | {_cell(row)} |")
    return out


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    forms = (("fd_clf", "{:.3f}", 1.0), ("kid_clf", "{:.1f}", 1e3), ("recall", "{:.2f}", 1.0), ("class_accuracy", "{:.1%}", 1.0),
             ("rmse", "{:.3f}", 1.0))  # fmt: skip
    return " / ".join(form.format(row[k] * factor) if row.get(k) is not None else "-" for k, form, factor in forms)


def read(path: Path) -> Row | None:
    return json.loads(path.read_text()) if path.exists() else None


def readme(records: Path, names: Sequence[str]) -> str:
    """The README's block: FD-clf by calls of every method, what guidance costs, and the shipped student's own figures."""
    teacher, shipped = read(records / "distill-teacher.json"), read(records / "student.json")
    if teacher is None or shipped is None:
        raise FastdiffError(f"{records} lacks distill-teacher.json or student.json: run those stages first")
    return "\n\n".join([_by_method(teacher, records, names), _by_scale(teacher, records, names), _shipped(shipped)]) + "\n"


def _by_method(teacher: Row, records: Path, names: Sequence[str]) -> str:
    columns = {title: by_calls(teacher, which) for title, which in TEACHER}
    columns |= {record["method"]: by_calls(record, record["method"]) for record in _students(records, names)}
    head = f"FD-clf (and RMSE from the teacher's converged ODE), {teacher['n']:,} images, no guidance:"
    lines = [head, "", "| calls | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for calls in COLUMNS:
        cells = [_short(rows.get(calls)) for rows in columns.values()]
        lines.append(f"| {calls} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_scale(teacher: Row, records: Path, names: Sequence[str]) -> str:
    """FD-clf and accuracy of the students that take the scale of guidance, the teacher's with twice the calls beside them."""
    rows = [{**r, "line": f"teacher, {r['line'].split(' · ')[0]}"} for r in teacher["rows"]]
    rows += [r for record in _students(records, names) for r in record["rows"]]
    rows = [r for r in rows if r["guidance"] != 1.0]
    keys = sorted({(r["line"], r["network_calls"]) for r in rows}, key=lambda k: (k[0].startswith("teacher"), k))
    scales = sorted({r["guidance"] for r in rows})
    lines = ["Under guidance, FD-clf and the share of images that the judge finds to be of the asked-for class:", ""]
    lines += ["| | calls | " + " | ".join(f"scale {s:g}" for s in scales) + " |", "|---" * (len(scales) + 2) + "|"]
    for line, calls in keys:
        found = {r["guidance"]: r for r in rows if (r["line"], r["network_calls"]) == (line, calls)}
        cells = [f"{r['fd_clf']:.2f}, {r['class_accuracy']:.1%}" if (r := found.get(s)) else "-" for s in scales]
        lines.append(f"| {line} | {calls} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shipped(record: Row) -> str:
    head = f"The shipped student, {record['n']:,} images (real test images: FD-clf {record['floor']['fd_clf']:.4f}):"
    lines = [head, "", "| calls | scale | FD-clf | 1000 KID-clf | class accuracy | recall |", "|---" * 6 + "|"]
    for r in record["rows"]:
        figures = f"{r['fd_clf']:.3f} | {1e3 * r['kid_clf']:.1f} | {r['class_accuracy']:.1%} | {r['recall']:.2f}"
        lines.append(f"| {r['network_calls']} | {r['guidance']:g} | {figures} |")
    return "\n".join(lines)


def _short(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['fd_clf']:.2f}" + (f" ({row['rmse']:.3f})" if row.get("rmse") is not None else "")


def card(student: Denoiser, record: Row) -> str:
    """README.md beside the shipped student: what it is, how it was made, what it reaches."""
    made = student.info["training"]["distilled"]
    settings = {k: v for k, v in made.items() if k not in ("teacher", "data_sha256")}
    low, high = student.network.guidance_range  # type: ignore[attr-defined]
    return CARD.format(
        sha=student.hash, teacher=made["teacher"], counts=", ".join(map(str, student.step_counts)), low=low, high=high,
        parameters=sum(p.numel() for p in student.network.parameters()),  # type: ignore[attr-defined]
        method=made["method"], settings=json.dumps(settings), figures=_shipped(record),
    )  # fmt: skip


CARD = """# Model card: a few-step student of the Fashion-MNIST model

A U-Net of {parameters:,} parameters that makes an image in {counts} calls, which it is told, and takes the scale of guidance,
{low:g} to {high:g}, as an input: one call does what two calls of its guided teacher do. Its file holds a plan for each of them.
sha256 of model.safetensors: `{sha}`; of its teacher, the shipped model: `{teacher}`.

    fastdiff sample fashion-mnist-student --nfe 2 --guidance 1.5 --classes all --out out/two

Made by `python -m fastdiff.cli.artefacts --only distill-{method} --data fashion_mnist.npz` on one CPU core, with
`{settings}`.

{figures}

Everything that the teacher's card says of data, judge and use holds for it too.
"""
