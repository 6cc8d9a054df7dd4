"""What a plan is tuned on: start noise and where the converged ODE of the same network takes it, computed once and kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..bench.cells import Setup
from ..bench.converged import GRID, SOLVER
from ..denoiser import Denoiser
from ..noise import normal
from ..plans import Plan
from ..sampling import sample
from ..solvers import plan
from .features import Distribution

STEPS = 80  # of the reference: on the shipped model 0.0046 from the converged endpoints (benches/results/tuned)


@dataclass(frozen=True)
class Pairs:
    """Unit start noise and target samples (n, *shape), and the denoiser of any subset of them."""

    noise: Tensor
    target: Tensor
    setup: Setup
    denoiser: Denoiser

    def batch(self, index: Tensor) -> tuple[Denoiser, Tensor, Tensor]:
        """(denoiser with these samples' conditioning and guidance, noise, target)."""
        labels = self.setup.labels(self.denoiser)
        den = self.denoiser if labels is None else self.denoiser.bind(class_labels=labels[index])
        return self.setup.guided(den), self.noise[index], self.target[index]


def make_pairs(
    denoiser: Denoiser, setup: Setup, cache: Path, advance: Callable[[int], None] | None = None
) -> Pairs:
    """The pairs of the setup's seeds; batches that are on disk already are read, so an interrupt loses one batch."""
    assert denoiser.shape is not None
    out = []
    for seeds, den in setup.batches(denoiser):
        what = [denoiser.hash, setup.guidance, SOLVER, GRID, STEPS, seeds.start, seeds.stop, list(denoiser.shape)]
        path = cache / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]}.npy"
        if denoiser.hash and path.exists():
            x = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            x = sample(den, plan(SOLVER, den, STEPS, grid=GRID), seeds=seeds).cpu()
            if denoiser.hash:
                with files.atomic(path) as temporary, open(temporary, "wb") as f:
                    np.save(f, x.numpy())
        out.append(x)
        if advance:
            advance(len(seeds))
    seeds = range(setup.first_seed, setup.first_seed + setup.n)
    noise = normal(seeds, 0, int(np.prod(denoiser.shape))).view(setup.n, *denoiser.shape)
    return Pairs(noise, torch.cat(out), setup, denoiser)


@dataclass(frozen=True)
class Score:
    """A plan on pairs: root mean square and mean absolute error of its samples, and the MMD of the two sets (`Distribution`)."""

    rmse: float
    mae: float
    mmd: float

    def against(self, other: Score) -> float:
        """The mean of mean absolute error and MMD as shares of another's: a plan that buys error with blur does not win."""
        return (self.mae / max(other.mae, 1e-12) + self.mmd / max(other.mmd, 1e-12)) / 2


def endpoints(plan: Plan, pairs: Pairs, among: range | None = None, batch: int = 128) -> Tensor:
    """The plan's samples (n, *shape) from the noise of all pairs, or of those `among`, as the executors run it."""
    index = torch.tensor(among if among is not None else range(pairs.setup.n))
    parts = [pairs.batch(some) for some in index.split(batch)]
    return torch.cat([sample(den, plan, noise=noise) for den, noise, _ in parts])


def squared_errors(x: Tensor, target: Tensor) -> Tensor:
    """(n,): each sample's mean squared distance to its target."""
    return (x - target).square().flatten(1).mean(dim=1)


def measure(plan: Plan, parts: Sequence[Pairs], distribution: Distribution) -> Score:
    """The plan's score over all parts."""
    x, target = torch.cat([endpoints(plan, p) for p in parts]), torch.cat([p.target for p in parts])
    rmse, mae = math.sqrt(float(squared_errors(x, target).mean())), float((x - target).abs().mean())
    return Score(rmse, mae, math.sqrt(float(distribution.squared(x, target))))


def rmse_of(plan: Plan, parts: Sequence[Pairs], first: int | None = None) -> float:
    """RMSE of a plan's samples to the targets of all parts, or of the `first` pairs of each."""

    def errors(pairs: Pairs) -> Tensor:
        among = range(pairs.setup.n)[:first]
        return squared_errors(endpoints(plan, pairs, among), pairs.target[: len(among)])

    return math.sqrt(float(torch.cat([errors(p) for p in parts]).mean()))
