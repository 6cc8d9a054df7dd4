"""Saved plans on the command line: loaded, and refused where they were made for something else."""

from __future__ import annotations

from pathlib import Path

import torch

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..guide import cfg
from ..plans import Plan


def load_plan(path: str | Path, denoiser: Denoiser, guidance: float, force: bool) -> Plan:
    """The plan of a file, for this checkpoint under this guidance.

    Raises:
        FastdiffError: it was made for another noise schedule; or, without `force`, tuned for another checkpoint, prediction or
            guidance.
    """
    plan = Plan.load(path)
    _check_schedule(plan, denoiser, path)
    why = guided(denoiser, guidance).why_not(plan)
    if why and not force:
        raise FastdiffError(f"{path}: {why}; --force uses it all the same")
    return plan


def guided(denoiser: Denoiser, guidance: float) -> Denoiser:
    """The denoiser under guidance, with one label of any class where it has none bound: to ask about plans, not to sample."""
    if guidance == 1.0:
        return denoiser
    labels = {"class_labels": torch.zeros(1, dtype=torch.long)} if denoiser.num_classes else {}
    return cfg(denoiser.bind(**labels), guidance, negative=denoiser.unprompted)


def _check_schedule(plan: Plan, denoiser: Denoiser, path: str | Path) -> None:
    """A plan made for another noise schedule gives noise for images, and nothing else would say so."""
    schedule, row = denoiser.schedule, plan.rows[0]
    inside = all(schedule.t_min * (1 - 1e-6) <= r.t <= schedule.t_max * (1 + 1e-6) for r in plan.rows if r.calls)
    alpha, sigma = float(schedule.alpha(row.t)), float(schedule.sigma(row.t))
    if not inside or abs(alpha - row.alpha) > 1e-3 or abs(sigma - row.sigma) > 1e-3 * max(sigma, 1.0):
        raise FastdiffError(
            f"{path} was made for another noise schedule than this checkpoint's {schedule.name}: at t = {row.t:g} it "
            f"has alpha {row.alpha:.4g}, sigma {row.sigma:.4g}, the checkpoint {alpha:.4g}, {sigma:.4g}"
        )
