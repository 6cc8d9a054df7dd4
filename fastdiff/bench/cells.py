"""What is measured: cells (solver, grid, NFE) and the setup they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import guide
from ..checkpoints.conditions import Conditions
from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..grid import GRIDS
from ..plans import Plan
from ..solvers import list_solvers, plan
from ..solvers.registry import find

QUICK_SOLVERS = ("ddim", "dpmpp-2m", "dpmpp-3m", "unipc-2", "ipndm-3")
NFES = (5, 8, 10, 20)
GRID_SOLVERS = ("ddim", "unipc-2", "ipndm-3")
LEFT_OUT = {"flow_shift", "exponential", "polyexponential"}  # wants a number of tokens; both uniform_lambda by default


@dataclass(frozen=True, order=True)
class Cell:
    """A solver on a grid at a budget of evaluations; or a saved plan under its own name, run by a student of the benchmark's
    denoiser where there is one."""

    solver: str
    grid: str
    nfe: int
    saved: Plan | None = None
    student: Denoiser | None = field(default=None, compare=False)

    @property
    def line(self) -> str:
        """The name of the line of the frontier that the cell lies on."""
        return self.solver if self.saved else f"{self.solver} · {self.grid}"

    def plan(self, denoiser: Denoiser) -> Plan:
        return self.saved or plan(self.solver, denoiser, self.nfe, grid=self.grid)


@dataclass(frozen=True)
class Setup:
    """What all cells share: seeds first_seed .. first_seed + n - 1, classes in turn, one guidance scale, the conditions of a
    file, a row for every seed in turn where it has more than one."""

    n: int
    first_seed: int = 0
    guidance: float = 1.0
    batch: int = 128
    conditions: Conditions | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.n < 2 or self.batch < 1 or self.first_seed < 0:
            raise FastdiffError(f"a benchmark needs at least 2 images and a batch of 1; given {self.n} and {self.batch}")

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.n)

    def labels(self, denoiser: Denoiser) -> Tensor | None:
        """(n,) class labels in turn for a class-conditional network, else None."""
        return torch.arange(self.n) % denoiser.num_classes if denoiser.num_classes else None

    def batches(self, denoiser: Denoiser) -> list[tuple[range, Denoiser]]:
        """The seeds of each batch and the denoiser with that batch's conditioning and guidance."""
        labels = self.labels(denoiser)
        out = []
        for start in range(0, self.n, self.batch):
            stop = min(start + self.batch, self.n)
            den = denoiser if self.conditions is None else self.conditions.bound(denoiser, range(start, stop))
            den = den if labels is None else den.bind(class_labels=labels[start:stop].to(denoiser.device))
            out.append((range(self.first_seed + start, self.first_seed + stop), self.guided(den)))
        return out

    def guided(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser under the setup's guidance, a conditioned one against its negative conditions or the empty prompt."""
        return denoiser if self.guidance == 1.0 else guide.cfg(denoiser, self.guidance, negative=denoiser.unprompted)


def cells(solvers: Sequence[str], grids: Sequence[str] | None, nfes: Sequence[int]) -> list[Cell]:
    """Every solver at every NFE, on each grid given or on its recommended one."""
    out = []
    for name in solvers:
        info = find(name)
        for grid in grids or (info.grid,):
            if grid not in GRIDS:
                raise FastdiffError(f"unknown grid {grid!r}; allowed: {', '.join(GRIDS)}")
            out += [Cell(info.name, grid, nfe) for nfe in nfes]
    return list(dict.fromkeys(out))


def tuned_cells(denoiser: Denoiser, setup: Setup) -> list[Cell]:
    """The plans tuned for this checkpoint and guidance, as one line; and those that a student ships with, as another."""
    den = setup.batches(denoiser)[0][1]
    plans = [plan for plan in den.tuned if den.why_not(plan) is None]
    if den.plan is not None and den.plan not in plans:
        plans.insert(0, den.plan)
    return [Cell("tuned" if "tuned_for" in plan.provenance else "student", "plan", plan.nfe, plan) for plan in plans]


def student_cells(student: Denoiser, teacher: Denoiser, setup: Setup, name: str = "student") -> list[Cell]:
    """The plans of a student, to be measured beside its teacher's as a line of that name.

    Raises:
        FastdiffError: a student of another teacher, or no student at all.
    """
    taught = student.info.get("training", {}).get("distilled", {}).get("teacher")
    if taught is None or student.plan is None:
        raise FastdiffError("a student is what `fastdiff distill` made; this checkpoint was not")
    if taught != teacher.hash:
        raise FastdiffError(f"this student's teacher has the hash {taught[:12]}..., the checkpoint {teacher.hash[:12]}...: "
                            "a student is measured beside its own teacher")  # fmt: skip
    return [replace(cell, solver=name, student=student) for cell in tuned_cells(student, student_setup(student, setup))]


def student_setup(student: Denoiser, setup: Setup) -> Setup:
    """The setup as a student runs it: one that learned a scale of guidance is not guided by it again.

    Raises:
        FastdiffError: it learned another scale than the setup's, or a range that the setup's lies outside of.
    """
    low, high = getattr(student.network, "guidance_range", None) or (setup.guidance, setup.guidance)
    if not low <= setup.guidance <= high:
        raise FastdiffError(f"this student knows guidance scales {low:g} to {high:g}; the benchmark's is {setup.guidance:g}")
    scale = float(student.info.get("training", {}).get("distilled", {}).get("guidance", 1.0))
    if scale == 1.0:
        return setup
    if scale != setup.guidance:
        raise FastdiffError(f"this student learned guidance at scale {scale:g}: measure it beside its teacher at that scale")
    return replace(setup, guidance=1.0)


def quick_cells() -> list[Cell]:
    """Five solvers at NFE 5, 8, 10, 20, and DDIM at 50."""
    return [*cells(QUICK_SOLVERS, None, NFES), *cells(("ddim",), None, (50,))]


def full_cells() -> list[Cell]:
    """Every solver on its recommended grid and every grid with three solvers, at NFE 5, 8, 10, 20; DDIM at 50.

    Stochastic solvers at 10 and 20 only: below, they are far from anything, and without a paired error 256 images say little.
    """
    grids = [g for g in GRIDS if g not in LEFT_OUT]
    solvers = list_solvers()
    every = cells([s for s in solvers if not solvers[s].stochastic], None, NFES)
    every += cells([s for s in solvers if solvers[s].stochastic], None, NFES[2:])
    return list(dict.fromkeys([*every, *cells(GRID_SOLVERS, grids, NFES), *cells(("ddim",), None, (50,))]))
