"""A look at a student while it learns: every so many updates its samples, their distance from the teacher's own endpoints and
from real data; at the end one page with the curves, teacher and student side by side."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
from typing import Any

import numpy as np
import torch

from ..bench import Setup
from ..bench.converged import GRID, SOLVER, rmse, shipped
from ..bench.report import STYLE
from ..bench.runner import ANCHOR_STEPS
from ..bench.scoring import scorer_for
from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..files import write_bytes, write_text
from ..plans import Plan
from ..sampling import sample
from ..solvers import plan
from .distiller import Distiller, Progress

SHOWN = 10  # samples in the picture
FEWEST = 20  # samples that KID takes


def need_pictures(every: int, sharded: bool) -> None:
    """
    Raises:
        FastdiffError: looks are asked for (`every` > 0), and matplotlib is not installed or no process has the whole student.
    """
    if not every:
        return
    if sharded:
        raise FastdiffError("--view-every samples the student on the first process, which has only a share of it under --fsdp: "
                            "leave one of them out")  # fmt: skip
    if importlib.util.find_spec("matplotlib") is None:
        raise FastdiffError("--view-every draws pictures: pip install 'fastdiff[plots]', or leave it out")


class View:
    """Looks at a run every `every` updates with `n` seeds that no update draws; what it saw is in history.jsonl and report.html.

    A student that takes the scale of guidance is looked at without any (scale 1), or at the scale nearest to that; beside one
    that learned a single scale the teacher is guided.
    """

    def __init__(self, run: Distiller, every: int, n: int) -> None:
        self.run, self.every = run, every
        low, high = getattr(run.network, "guidance_range", None) or (1.0, 1.0)
        self.setup = Setup(n, guidance=min(max(1.0, low), high))
        fixed = run.settings.guidance
        self.teaching = self.setup if fixed == 1.0 else Setup(n, guidance=fixed)
        self.scorer = scorer_for(run.source) if n >= FEWEST else None
        self.path = run.out / "history.jsonl"
        self.rows = self._kept()
        self.endpoints: torch.Tensor | None = None
        self.student: torch.Tensor | None = None

    def look(self, p: Progress, done: int) -> str | None:
        """A line with the figures, where it is time for them."""
        if done % self.every:
            return None
        stage = self.run.stages[p.stage]
        table = self.run.method.plan(stage, self.run.source.schedule)
        self.student = self._samples(self.run.student.with_network(self.run.saved_network), table, self.setup)
        row: dict[str, Any] = {"update": done, "steps": stage.steps, "loss": p.loss, "images_per_second": p.images_per_second}
        if not table.stochastic:
            row["rmse"] = rmse(self.student, self._teacher())
        if self.scorer is not None:
            score = self.scorer.score(self.run.source.images(self.student), self.setup.labels(self.run.source))
            row |= {"kid_clf": score["kid_clf"], "kid_error": score["kid_error"]}
        self.rows.append(row)
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.rows))
        self._picture()
        parts = [f"update {done}, {stage.steps} steps: loss {p.loss:.4f}"]
        parts += [f"paired RMSE {row['rmse']:.4f}"] if "rmse" in row else []
        parts += [f"KID-clf·1e3 {1e3 * row['kid_clf']:.1f} ± {1e3 * row['kid_error']:.1f}"] if "kid_clf" in row else []
        return ", ".join(parts)

    def finish(self) -> str:
        """Writes report.html; its path."""
        out = self.run.out / "report.html"
        name = html.escape(self.run.method.name)
        body = f"<h1>{name} distillation</h1>{_image(self._curves())}"
        grid = self.run.out / "samples.png"
        if grid.exists():
            body += f"<h2>Teacher above, student below</h2>{_image(grid.read_bytes())}"
        last = self.rows[-1] if self.rows else {}
        body += f"<h2>Last look</h2><pre>{html.escape(json.dumps(last, indent=1))}</pre>"
        body += f"<h2>What ran</h2><pre>{html.escape(json.dumps(self.run._identity(), indent=1))}</pre>"
        title = f"<title>fastdiff distill: {name}</title>"
        write_text(out, f"<!doctype html><html lang=en><meta charset=utf-8>{title}<style>{STYLE}</style>{body}</html>\n")
        return str(out)

    def _kept(self) -> list[dict[str, Any]]:
        """The looks of a run that is resumed, up to where it goes on."""
        if not self.path.exists():
            return []
        done = sum(s.updates for s in self.run.stages[: self.run.stage]) + self.run.update
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [row for row in rows if row["update"] <= done]

    def _samples(self, denoiser: Denoiser, table: Plan, setup: Setup) -> torch.Tensor:
        return torch.cat([sample(den, table, seeds=seeds).cpu() for seeds, den in setup.batches(denoiser)])

    def _teacher(self) -> torch.Tensor:
        """The teacher's endpoints: those that ship with it, or made once."""
        if self.endpoints is None:
            stored = shipped(self.run.source, self.setup.n) if self.teaching.guidance == 1.0 else None
            table = plan(SOLVER, self.run.source, ANCHOR_STEPS, grid=GRID)
            self.endpoints = stored.x.float() if stored else self._samples(self.run.source, table, self.teaching)
        return self.endpoints

    def _picture(self) -> None:
        """samples.png: the teacher's endpoints in the first row, the student's samples in the second."""
        from matplotlib import image

        assert self.student is not None
        images = [self.run.source.images(x[:SHOWN]) for x in (self._teacher(), self.student)]
        rows = [np.concatenate([np.pad(x.permute(1, 2, 0).numpy(), ((0, 2), (0, 2), (0, 0))) for x in row], 1) for row in images]
        grid = np.concatenate(rows, 0).repeat(3, 0).repeat(3, 1)
        buffer = io.BytesIO()
        image.imsave(buffer, grid[..., 0] if grid.shape[2] == 1 else grid, cmap="gray", vmin=0, vmax=1, format="png")
        write_bytes(self.run.out / "samples.png", buffer.getvalue())

    def _curves(self) -> bytes:
        """Loss, paired error and KID over the updates, with the borders of the stages."""
        from matplotlib.figure import Figure

        losses = self.run.losses
        width = max(len(losses) // 100, 1)
        lines = [("loss", [(i + width / 2, float(np.mean(losses[i : i + width]))) for i in range(0, len(losses), width)])]
        for key, title in (("rmse", "paired RMSE"), ("kid_clf", "KID-clf")):
            lines.append((title, [(row["update"], row[key]) for row in self.rows if key in row]))
        lines = [(title, points) for title, points in lines if points]
        figure = Figure(figsize=(4.5 * len(lines), 3.2), layout="constrained")
        borders = np.cumsum([stage.updates for stage in self.run.stages])[:-1]
        for k, (title, points) in enumerate(lines):
            axes = figure.add_subplot(1, len(lines), k + 1, xlabel="update", title=title)
            axes.plot(*zip(*points, strict=True))
            for border in borders:
                axes.axvline(border, color="#bbb", linewidth=0.8)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png")
        return buffer.getvalue()


def _image(png: bytes) -> str:
    return f'<div class=wide><img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}"></div>'
