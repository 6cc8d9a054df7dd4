"""The pictures of a benchmark: the frontier (quality against NFE) and the samples, where the eye sees what breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..errors import FastdiffError

MOST_LINES = 8  # more lines than that, and the best SDE line, cannot be told apart
MOST_BLOCKS = 5
PIXELS = 56  # the side of one sample in the picture


def need_matplotlib() -> None:
    """Fails early, before anything is computed, where the pictures could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise FastdiffError("the pictures need matplotlib and pillow: pip install 'fastdiff[plots]'") from e


def best_lines(cells: list[dict[str, Any]]) -> list[str]:
    """The lines to show: the best at few calls by paired error (by KID where there is none), students, and DDIM to compare
    with."""
    key = "rmse" if any("rmse" in row for row in cells) else "kid_clf"
    out: dict[str, list[float]] = {}
    for row in sorted(cells, key=lambda r: r["nfe"]):
        if row.get(key) is not None:
            out.setdefault(row["line"], []).append(row[key])
    ranked = sorted(out, key=lambda name: float(np.mean(out[name][:2]))) or sorted({row["line"] for row in cells})
    # a student's fewest calls are fewer than a solver's, so its place says little
    always = [name for name in ranked if name.startswith("student") or name == "ddim · uniform_t"][:MOST_LINES]
    kept = {*[name for name in ranked if name not in always][: MOST_LINES - len(always)], *always}
    return [name for name in ranked if name in kept]


def best_sde_line(cells: list[dict[str, Any]], key: str) -> list[str]:
    """The stochastic line whose set is the best at any NFE, where there is one: no paired error ranks it."""
    rows = [row for row in cells if row.get("stochastic") and row.get(key) is not None]
    return [min(rows, key=lambda row: float(row[key]))["line"]] if rows else []


def frontier(record: dict[str, Any], path: Path) -> None:
    """Paired error, and the distance to real data where a judge was there, against network calls."""
    from matplotlib.figure import Figure

    cells = record["cells"]
    panels = [("rmse", "paired RMSE to the converged ODE")]
    titles = {"fid": "FID", "fd_clf": "FD-clf", "kid_clf": "KID-clf", "kid_inception": "KID-inception"}
    panels += [(k, n) for k, n in titles.items() if any(r.get(k) is not None for r in cells)][:1]
    figure = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
    names = [*best_lines(cells), *best_sde_line(cells, panels[-1][0])]
    for i, (key, title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1, xlabel="network calls per image", title=title)
        rows = [c for c in cells if c.get(key) is not None]
        drawn = {name: sorted((c["network_calls"], c[key]) for c in rows if c["line"] == name) for name in names}
        drawn = {name: points for name, points in drawn.items() if points}
        positive = all(v > 0 for points in drawn.values() for _, v in points)  # an unbiased estimate can fall below 0
        axes.set(xscale="log", yscale="log" if positive else "linear")
        for name, points in drawn.items():
            axes.plot(*zip(*points, strict=True), "o-", label=name, color=f"C{names.index(name)}", markersize=4)
        for row, label, style in ((record["converged"], "converged ODE", "--"), (record["anchor"] or {}, "real test data", ":")):
            if row.get(key) is not None and (row[key] > 0 or not positive):
                axes.axhline(row[key], color="0.4", linestyle=style, linewidth=1, label=label)
        ticks = sorted({c["network_calls"] for c in cells})
        axes.set_xticks(ticks, [str(t) for t in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    with files.atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def samples(record: dict[str, Any], shots: dict[tuple[str, int], np.ndarray], path: Path) -> None:
    """A row a seed, NFE across, a block a solver; the converged ODE on the right of all."""
    from matplotlib.figure import Figure

    order = best_lines(record["cells"])
    first = [*[name for name in order if name.startswith("ddim · ")][:1], *[n for n in order if n.startswith("student")][:1]]
    chosen = first + [name for name in order if name not in first][: MOST_BLOCKS - len(first)]
    columns = [(name, nfe) for name in chosen for nfe in sorted(n for line, n in shots if line == name)]
    columns += [key for key in shots if key[0] == "converged ODE"]
    rows = min(len(shots[key]) for key in columns)
    gaps = [0.25 * (i > 0 and columns[i - 1][0] != name) for i, (name, _) in enumerate(columns)]
    side = PIXELS / 100
    width, height = side * (len(columns) + sum(gaps)), side * rows + 0.6
    figure = Figure(figsize=(width, height))
    x = 0.0
    for (name, nfe), gap in zip(columns, gaps, strict=True):
        x += gap * side
        for r in range(rows):
            axes = figure.add_axes((x / width, (rows - 1 - r) * side / height, side / width, side / height))
            axes.imshow(_image(shots[(name, nfe)][r]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_axis_off()
        figure.text((x + side / 2) / width, (rows * side + 0.06) / height, str(nfe), ha="center", fontsize=7)
        if gap or x == 0.0:
            title = "converged" if name == "converged ODE" else name.replace(" · ", "\n")
            figure.text(x / width, (rows * side + 0.24) / height, title, fontsize=7, linespacing=1.2)
        x += side
    with files.atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _image(x: np.ndarray) -> np.ndarray:
    """(C, H, W) -> what imshow takes: (H, W, 3) for three channels or more, else (H, W) of the first."""
    return x[0] if len(x) < 3 else np.moveaxis(x[:3], 0, -1)
