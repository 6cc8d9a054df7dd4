"""Which solver at which budget: the README's guide, read off the two cross products by rule, without a choice by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from ..solvers import list_solvers

GUIDE_BUDGETS = (4, 5, 6, 8, 10, 20)
Line = dict[str, Any]


def _name(line: Line) -> str:
    return f"`{line['solver']} · {line['grid']}`"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    return "\n".join(["| " + " | ".join(r) + " |" for r in (columns, ["---"] * len(columns), *rows)])


def analytic(record: dict[str, Any]) -> str:
    """From the record of `bench.analytic`: the best line of each budget, the best on its solver's recommended grid, DDIM, the
    best SDE line; and the lines that are good at all of them."""
    budgets = record["budgets"]
    odes = [line for line in record["lines"] if line["rmse"] is not None]
    sdes = [line for line in record["lines"] if line["rmse"] is None]
    known = list_solvers()
    own = [line for line in odes if line["grid"] == known[line["solver"]].grid]
    ddim = next(line for line in own if line["solver"] == "ddim")
    rows = []
    for n in GUIDE_BUDGETS:
        i = budgets.index(n)

        def rmse(line: Line, i: int = i) -> float:
            return float(line["rmse"][i])

        def distance(line: Line, i: int = i) -> float:
            return float(line["distance"][i])

        best, plain, noisy = min(odes, key=rmse), min(own, key=rmse), min(sdes, key=distance)
        rows.append([str(n), _name(best), f"{rmse(best):.3f}", _name(plain), f"{rmse(plain):.3f}", f"{rmse(ddim):.3f}",
                     _name(noisy), f"{distance(noisy):.3f}", f"{distance(best):.3f}"])  # fmt: skip
    setup, reference = record["setup"], record["reference"]
    head = (
        f"On data with a known denoiser (a mixture of {setup['components']} Gaussians in {setup['dimensions']} dimensions, "
        f"{setup['n']:,} starts, {len(record['lines'])} solver and grid pairs,\nexact to {reference['movement']:.0e}; "
        "[record](benches/results/analytic.json)). RMSE from the exact trajectory; SDE solvers by the distance of the\nset "
        f"from the data (the exact ODE's: {reference['distance']:.3f}, real against real: {record['floor']:.3f}), beside it the "
        "best ODE line's own."
    )
    columns = ["calls", "best ODE line", "RMSE", "best on its own grid", "RMSE", "DDIM", "best SDE line", "distance", "ODE's"]
    steady = ", ".join(f"{_name(line)} ({ratio:.2f})" for ratio, line in steadiest(odes, budgets)[:5])
    span = f"{GUIDE_BUDGETS[0]} to {GUIDE_BUDGETS[-1]} calls"
    tail = f"Steady over {span} (mean ratio of a line's error to the best of its budget): {steady}."
    return "\n\n".join([head, _table(columns, rows), tail])


def steadiest(odes: list[Line], budgets: list[int]) -> list[tuple[float, Line]]:
    """Lines by the geometric mean, over the guide's budgets, of their error's ratio to the budget's best; one grid a solver."""
    places = [budgets.index(n) for n in GUIDE_BUDGETS]
    least = {i: min(line["rmse"][i] for line in odes) for i in places}

    def ratio(line: Line) -> float:
        return math.exp(sum(math.log(line["rmse"][i] / least[i]) for i in places) / len(places))

    seen: dict[str, tuple[float, Line]] = {}
    for found in sorted(((ratio(line), line) for line in odes), key=lambda pair: pair[0]):
        seen.setdefault(found[1]["solver"], found)
    return list(seen.values())


def shipped(record: dict[str, Any]) -> str:
    """From the record of `bench --preset full`: at each budget the ODE line of least paired error, with its interval and the
    KID of its images, and the SDE line of least KID."""
    rows = []
    for n in sorted({cell["nfe"] for cell in record["cells"]}):
        odes = sorted(_cells(record, n, lambda c: "rmse" in c), key=lambda c: c["rmse"])
        sdes = sorted(_cells(record, n, lambda c: "rmse" not in c), key=lambda c: c["kid_clf"])
        if len(odes) < 2:  # a single line is no choice
            continue
        first, second = odes[:2]
        level = [c for c in odes if c["rmse"] <= first["rmse_hi"]]
        noisy = [_name(sdes[0]), f"{1000 * sdes[0]['kid_clf']:.1f}"] if sdes else ["-", "-"]
        rows.append([str(n), _name(first), f"{first['rmse']:.3f} ({first['rmse_lo']:.3f} to {first['rmse_hi']:.3f})",
                     f"{1000 * first['kid_clf']:.1f}", _name(second), f"{second['rmse']:.3f}", str(len(level)),
                     *noisy])  # fmt: skip
    setup = record["setup"]
    head = (
        f"On the shipped model ([record](benches/results/full/results.csv), n = {setup['n']}; learned plans apart). RMSE from "
        "the converged ODE with its\n95 % interval, how many lines lie within it, and 1000 KID-clf of the set (the converged "
        f"ODE's: {1000 * record['converged']['kid_clf']:.1f})."
    )
    columns = ["calls", "best line", "RMSE", "KID", "next", "RMSE", "lines within", "best SDE line", "KID"]
    return "\n\n".join([head, _table(columns, rows)])


def _cells(record: dict[str, Any], nfe: int, chosen: Callable[[Line], bool]) -> list[Line]:
    """The hand-made lines at a budget: a checkpoint's own plans are shown elsewhere."""
    return [c for c in record["cells"] if c["nfe"] == nfe and c["line"] != "tuned" and chosen(c)]
