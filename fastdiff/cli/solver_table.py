"""The solvers as a table, from the registry: what `fastdiff solvers` prints and what the README shows."""

from __future__ import annotations

from typing import Any

from ..solvers import SolverInfo, list_solvers

COLUMNS = ("name", "order", "NFE/step", "kind", "grid", "source")
LEGEND = "order: with the default start (with start=rk), weak order for an SDE"


def entry(info: SolverInfo) -> dict[str, Any]:
    """All that is known of a solver, JSON-able."""
    return {
        "order": info.order, "full_order": info.full_order or info.order, "nfe_per_step": info.nfe_per_step,
        "stochastic": info.stochastic, "grid": info.grid, "options": info.options, "source": info.source,
        "aliases": list(info.aliases), "why_no_order": info.why_no_order,
    }  # fmt: skip


def cells(info: SolverInfo) -> tuple[str, ...]:
    """One row, in the order of COLUMNS."""
    e = entry(info)
    full = f" ({e['full_order']})" if e["full_order"] > e["order"] else ""
    order = f"{e['order']}{full}" if e["order"] else "-"
    return info.name, order, str(info.nfe_per_step), "SDE" if info.stochastic else "ODE", info.grid, info.source


def markdown() -> str:
    """The README's table: the same rows, and the names that other libraries give to a solver."""
    found = list_solvers().values()
    rows = [
        "| " + " | ".join([f"`{name}`", *rest, ", ".join(f"`{a}`" for a in info.aliases) or "-"]) + " |"
        for info in found
        for name, *rest in [cells(info)]
    ]
    head = "| " + " | ".join([*COLUMNS, "also known as"]) + " |"
    opened = f"<details><summary>All {len(rows)} solvers ({LEGEND})</summary>"
    return "\n".join([opened, "", head, "|---" * (len(COLUMNS) + 1) + "|", *rows, "", "</details>"]) + "\n"
