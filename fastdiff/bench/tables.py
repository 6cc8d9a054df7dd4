"""The terminal's table: anchors first, then the cells, best paired error per NFE marked."""

from __future__ import annotations

from typing import Any

from rich.table import Table

FIGURES = (
    ("FD-clf", "fd_clf", "{:.3f}"), ("KID-clf·1e3", "kid_clf", "{:.2f}"), ("precision", "precision", "{:.2f}"),
    ("recall", "recall", "{:.2f}"), ("SW", "sliced_wasserstein", "{:.3f}"), ("accuracy", "class_accuracy", "{:.1%}"),
    ("entropy", "class_entropy", "{:.2f}"), ("FID", "fid", "{:.2f}"), ("FD-inception", "fd_inception", "{:.2f}"),
    ("KID-inception·1e3", "kid_inception", "{:.2f}"),
)  # fmt: skip
TERMINAL = {"fd_clf", "kid_clf", "recall", "class_accuracy", "fid", "fd_inception", "kid_inception"}
WIDE = 105  # columns a terminal needs for all of those; below, recall and the time are left to the report


def figures(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The columns (title, key, format) for which any row has a value."""
    rows = [record["anchor"] or {}, record["converged"], *record["cells"]]
    return [f for f in FIGURES if any(row.get(f[1]) is not None for row in rows)]


def shown(row: dict[str, Any], key: str, form: str) -> str:
    """One value as text; KIDs in thousandths, with their standard error."""
    value = row.get(key)
    if value is None:
        return ""
    if key.startswith("kid"):
        error = f" ± {1e3 * row['kid_error']:.2f}" if row.get("kid_error") is not None else ""
        return form.format(1e3 * value) + error
    return form.format(value)


def error_text(row: dict[str, Any]) -> str:
    """The paired error with its interval; a dash for a stochastic solver, which has no endpoint to be paired with."""
    return f"{row['rmse']:.4f} [{row['rmse_lo']:.4f}, {row['rmse_hi']:.4f}]" if "rmse" in row else "-"


def short_error(row: dict[str, Any]) -> str:
    """The same with half the interval's width."""
    return f"{row['rmse']:.4f} ± {(row['rmse_hi'] - row['rmse_lo']) / 2:.4f}" if "rmse" in row else "-"


def ordered(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By NFE, then paired error, then KID; stochastic solvers after the rest."""
    return sorted(cells, key=lambda r: (r["nfe"], r.get("rmse", float("inf")), r.get("kid_clf", 0.0)))


def table(record: dict[str, Any], width: int) -> Table:
    """All rows of a record as a rich table for a terminal of that width."""
    wide = width >= WIDE
    columns = [f for f in figures(record) if f[1] in TERMINAL and (wide or f[1] != "recall")]
    out = Table(title=f"NFE against quality, n = {record['setup']['n']}, guidance {record['setup']['guidance']:g}")
    guided = any(row["network_calls"] != row["nfe"] for row in record["cells"])
    out.add_column("NFE", justify="right")
    if guided:
        out.add_column("calls", justify="right")
    out.add_column("solver", no_wrap=True)
    for title in ("paired RMSE", *(title for title, _, _ in columns), *["ms/image"] * wide):
        out.add_column(title, justify="right", no_wrap=True)
    calls = [""] * guided
    if record["anchor"]:
        out.add_row("", *calls, "real test data", "", *(shown(record["anchor"], k, f) for _, k, f in columns))
    converged = record["converged"]
    out.add_row(str(converged["steps"]), *calls, "converged ODE", f"(moves {converged['movement']:.4f})",
                *(shown(converged, k, f) for _, k, f in columns), end_section=True)  # fmt: skip
    rows = ordered(record["cells"])
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1]["nfe"] != row["nfe"]
        best = i == 0 or rows[i - 1]["nfe"] != row["nfe"]
        out.add_row(
            str(row["nfe"]), *[str(row["network_calls"])] * guided, row["line"], short_error(row),
            *(shown(row, k, f) for _, k, f in columns), *[f"{row['ms_per_image']:.1f}"] * wide,
            style="bold" if best else None, end_section=last,
        )  # fmt: skip
    return out
