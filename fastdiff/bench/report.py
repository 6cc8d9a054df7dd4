"""One self-contained HTML page: the pictures, the table, how to read them, and what ran."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from .. import files
from .tables import error_text, figures, ordered, shown

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:.25em .7em;text-align:right;white-space:nowrap}
td.l,th.l{text-align:left}tr.first td{border-top:1px solid #aaa}tr.best td{font-weight:600}tr.anchor td{background:#f3f3f3}
img{max-width:100%;image-rendering:auto}pre{background:#f6f6f6;padding:1em;overflow-x:auto;font-size:12px}.wide{overflow-x:auto}"""

READ = (
    "<b>NFE</b> counts evaluations of the denoiser, <b>calls</b> those of the network (guidance calls it twice). "
    "<b>Paired RMSE</b> is the distance, in pixels from -1 to 1, to where the converged ODE takes the same noise; its "
    "interval is a 95 % bootstrap over seeds. It measures the solver alone: 0 means nothing is left to gain from more "
    "calls. Stochastic solvers have no such endpoint. <b>FD-clf</b> and <b>KID-clf</b> are the Frechet distance and the "
    "unbiased kernel distance in the features of our own classifier, which took no part in any loss; they are not FID. "
    "FD-clf depends on n and is left out below 2,048 images. The two anchors say what is reachable: real data against "
    "other real data, and this network with its equation solved to the end."
)


def write(record: dict[str, Any], out: Path) -> None:
    """out/report.html from the record and the pictures beside it."""
    setup, converged = record["setup"], record["converged"]
    note = "" if converged["ok"] else (
        "<p><b>The reference is too coarse for the smallest errors here</b>: doubling its steps moves it by "
        f"{converged['movement']:.5f}, more than a tenth of the smallest error.</p>"
    )  # fmt: skip
    about = json.dumps({k: record[k] for k in ("versions", "checkpoint", "setup")}, indent=1)
    body = (
        f"<h1>NFE against quality</h1><p>{setup['n']} images a cell, guidance scale {setup['guidance']:g}, seeds "
        f"{setup['first_seed']} to {setup['first_seed'] + setup['n'] - 1}.</p>{note}"
        f"{_picture(out / 'frontier.png')}<h2>Samples</h2><p>A row a seed, NFE across: look where each solver breaks.</p>"
        f"{_picture(out / 'samples.png')}<h2>Figures</h2><div class=wide>{_table(record)}</div><p>{READ}</p>"
        f"<h2>What ran</h2><pre>{html.escape(about)}</pre>"
    )
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>fastdiff bench</title><style>{STYLE}</style>{body}</html>\n"
    files.write_text(out / "report.html", page)


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class=wide><img alt="{path.stem}" src="data:image/png;base64,{data}"></div>'


def _table(record: dict[str, Any]) -> str:
    columns = figures(record)
    head = ["NFE", "calls", "solver", "paired RMSE [95 %]", *(title for title, _, _ in columns), "ms/image"]
    rows = ["<tr>" + "".join(f"<th{' class=l' * (h == 'solver')}>{h}</th>" for h in head) + "</tr>"]

    def add(cells: list[str], kind: str) -> None:
        inner = "".join(f"<td{' class=l' * (i == 2)}>{html.escape(c)}</td>" for i, c in enumerate(cells))
        rows.append(f'<tr class="{kind}">{inner}</tr>')

    if record["anchor"]:
        add(["", "", "real train / real test", "", *(shown(record["anchor"], k, f) for _, k, f in columns), ""], "anchor")
    converged = record["converged"]
    add([str(converged["steps"]), "", "converged ODE", f"moves by {converged['movement']:.5f}",
         *(shown(converged, k, f) for _, k, f in columns), ""], "anchor")  # fmt: skip
    before = None
    for row in ordered(record["cells"]):
        kind = "first best" if row["nfe"] != before else ""
        before = row["nfe"]
        add([str(row["nfe"]), str(row["network_calls"]), row["line"], error_text(row),
             *(shown(row, k, f) for _, k, f in columns), f"{row['ms_per_image']:.1f}"], kind)  # fmt: skip
    return f"<table>{''.join(rows)}</table>"
