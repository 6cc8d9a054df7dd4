"""The figures in the README, written from the committed records: `make artefacts` puts them there, a test compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import files
from ..bench.converged import FRACTION
from . import budgets, solver_table, student_tables
from .distilled import RECIPES

START, END = "<!-- figures -->\n", "<!-- end of figures -->"
GUIDE = ("<!-- guide -->\n", "<!-- end of guide -->")
STUDENTS = ("<!-- students -->\n", "<!-- end of students -->")
SOLVERS = ("<!-- solvers -->\n", "<!-- end of solvers -->")
LINES = ("ddim · uniform_t", "dpmpp-2m · uniform_lambda", "unipc-2 · uniform_t", "ipndm-3 · beta", "tuned")
BUDGETS = (5, 8, 10, 20)


def text(records: Path) -> str:
    """The block between the README's marks."""
    full, tuned, quality = (
        json.loads((records / name).read_text()) for name in ("full/results.json", "tuned/results.json", "quality.json")
    )
    return "\n\n".join([_solvers(full), _tuned(tuned), _model(quality)]) + "\n"


def guide(records: Path) -> str:
    """The block on budgets: from the full preset's record and from the analytic one."""
    full, exact = (json.loads((records / name).read_text()) for name in ("full/results.json", "analytic.json"))
    return "\n\n".join([budgets.shipped(full), budgets.analytic(exact)]) + "\n"


def students(records: Path) -> str:
    """The block on students."""
    return student_tables.readme(records, list(RECIPES))


def write(readme: Path, records: Path) -> None:
    """Replaces the generated blocks of the README."""
    whole = readme.read_text()
    blocks = {(START, END): text(records), GUIDE: guide(records), SOLVERS: solver_table.markdown(), STUDENTS: students(records)}
    for (start, end), block in blocks.items():
        before, rest = whole.split(start)
        whole = before + start + block + end + rest.split(end)[1]
    files.write_text(readme, whole)


def _solvers(record: dict[str, Any]) -> str:
    values = {(r["line"], r["nfe"]): r["rmse"] for r in record["cells"] if "rmse" in r}
    rows = [
        f"| `{line}` | " + " | ".join(f"{values[line, n]:.3f}" if (line, n) in values else "-" for n in BUDGETS) + " |"
        for line in LINES
    ]
    head = (
        f"Paired RMSE on the shipped model, n = {record['setup']['n']} ([the whole record](benches/results/full/results.csv), "
        "every\nsolver and grid):"
    )
    columns = "| solver · grid | " + " | ".join(f"{n} calls" for n in BUDGETS) + " |"
    return "\n".join([head, "", columns, "|---" * (len(BUDGETS) + 1) + "|", *rows])


def _tuned(record: dict[str, Any]) -> str:
    rows = [
        f"| {b['nfe']} | `{b['hand_made']}` | {b['rmse_hand_made']:.4f} | {b['rmse_tuned']:.4f} | {b['rmse_ratio']:.2f} | "
        f"{b['fd_from_converged_hand_made']:.3f} | {b['fd_from_converged_tuned']:.3f} | "
        f"{b['fd_excess_hand_made']:.3f} | {b['fd_excess_tuned']:.3f} | {b['seconds'] / 60:.1f} min |"
        for b in record["tuning"]["budgets"]
    ]
    candidates = [b["search"]["candidates"] for b in record["tuning"]["budgets"]]
    head = (
        f"Learned plans against the best hand-made ones, found by searching {min(candidates)} to {max(candidates)} solver and "
        f"grid pairs on\n256 seeds; figures on {record['setup']['n']:,} seeds that neither saw "
        f"([record](benches/results/tuned/results.json)). {_reference(record['converged'])}\n"
        "Set: FD-clf between a plan's images and the converged ODE's. Excess: FD-clf from the data beyond the converged ODE's;\n"
        "negative where a plan's errors flatter the model."
    )
    columns = "| calls | best hand-made | its RMSE | tuned | ratio | its set | tuned | its excess | tuned | tuning took |"
    return "\n".join([head, "", columns, "|---" * 10 + "|", *rows])


def _reference(converged: dict[str, Any]) -> str:
    """How good the endpoints are that errors are measured from."""
    movement = float(converged["movement"])
    text = f"The reference lies\n{movement:.4f} from the converged ODE"
    return text + ("." if converged["ok"] else f": read errors below {movement / FRACTION:.3f} as upper bounds.")


def _model(record: dict[str, Any]) -> str:
    rows = {row["guidance"]: row for row in record["rows"]}
    plain, guided = rows[1.0], rows[2.0]
    real = record["anchors"][str(plain["n"])]["fd_clf"]
    sampler = record["sampler"]
    return (
        f"The model itself, with a sampler that lies {record['rmse']:.4f} from the converged ODE ({sampler['solver']}, "
        f"{sampler['nfe']} calls): the judge finds the\nasked-for class in {plain['class_accuracy']:.1%} of {plain['n']:,} "
        f"images (recall {plain['recall']:.2f}, FD-clf {plain['fd_clf']:.3f}; real test images: {real:.4f}),\n"
        f"and in {guided['class_accuracy']:.1%} of {guided['n']:,} at guidance scale 2 (recall {guided['recall']:.2f})."
    )
