"""What a plan is tuned on: start noise and where the converged ODE of the same network takes it, computed once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
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
from ..sampling import sample
from ..solvers import plan

STEPS = 80  # of the reference: on the shipped model 0.003 from the converged endpoints, a tenth of what tuning reaches


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
