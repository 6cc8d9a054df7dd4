"""Noise that belongs to a sample: draw k of seed s is the same numbers whatever the batch, the device or the run.

Element i of draw k is Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = (i // 4, k), by Box-Muller in float32.
Draw 0 is the start noise. numpy and torch give the same normals to 1e-6 and each is bit-equal to itself, so kernels and
exported engines can make the same images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import FastdiffError
from .philox import normals, normals_numpy, seed_bits


class NoiseSource(Protocol):
    """Draw k for a whole batch: k = 0 is the start noise, 1, 2, ... the plan's draws in order."""

    def __call__(self, draw: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """(B, *) float32 unit normals; `shape` includes the batch."""


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as a list, each a whole number of 64 bits."""
    problem = "seeds must be one or more whole numbers from 0 to 2^64 - 1, one a sample"
    try:
        given = list(seeds)
        out = [int(s) for s in given]
    except (TypeError, ValueError, OverflowError):
        raise FastdiffError(f"{problem}; given {seeds!r}") from None
    if not out or any(not 0 <= s < 2**64 or s != g for s, g in zip(out, given, strict=True)):
        raise FastdiffError(problem)
    return out


def normal_numpy(seeds: Sequence[int], draw: int, count: int) -> np.ndarray:
    """(len(seeds), count) float32 unit normals."""
    return normals_numpy(check_seeds(seeds), draw, count)


def normal(seeds: Sequence[int], draw: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """(len(seeds), count) float32 unit normals, made on the device."""
    return normals(seed_bits(check_seeds(seeds), device), draw, count)


@dataclass(frozen=True)
class Seeded:
    """Philox noise, one seed a sample; a kernel that has the seeds makes the same numbers."""

    seeds: list[int]

    def __call__(self, draw: int, shape: Sequence[int], device: torch.device) -> Tensor:
        self.check(shape[0])
        return normal(self.seeds, draw, math.prod(shape[1:]), device).view(*shape)

    def check(self, batch: int) -> None:
        if batch != len(self.seeds):
            raise FastdiffError(f"{len(self.seeds)} seeds for a batch of {batch}: give one seed a sample")


def from_seeds(seeds: Sequence[int]) -> Seeded:
    """Philox noise, one seed a sample: a sample's noise depends on its own seed alone."""
    return Seeded(check_seeds(seeds))


def from_torch(generator: torch.Generator | Sequence[torch.Generator] | None = None) -> NoiseSource:
    """torch.randn in the order of the draws, as diffusers draws it: one generator for the batch, or a list, one a sample.

    Draws must be asked for in order, once each: the generator is the state.
    """

    def source(draw: int, shape: Sequence[int], device: torch.device) -> Tensor:
        if generator is None or isinstance(generator, torch.Generator):
            where = generator.device if generator is not None else device
            return torch.randn(tuple(shape), generator=generator, device=where).to(device)
        if len(generator) != shape[0]:
            raise FastdiffError(f"{len(generator)} generators for a batch of {shape[0]}: give one a sample, or one for all")
        rows = [torch.randn((1, *shape[1:]), generator=g, device=g.device) for g in generator]
        return torch.cat(rows).to(device)

    return source


def recorded(noises: Sequence[Tensor]) -> NoiseSource:
    """Given tensors, draw by draw; the first is the start noise."""

    def source(draw: int, shape: Sequence[int], device: torch.device) -> Tensor:
        if draw >= len(noises):
            raise FastdiffError(f"{len(noises)} noises were recorded; the plan asks for draw {draw}")
        return noises[draw].to(device)

    return source


def stacked(noises: Tensor) -> NoiseSource:
    """A plan's draws in order, (draws, B, *shape), without the start noise."""

    def source(draw: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return noises[draw - 1]

    return source


def of_learned_strength(z: Tensor, v: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """A noise z times a factor that the network chose: its log goes from `low` at v = -1 to `high` at 1 (Nichol and Dhariwal
    2021, eq. 15)."""
    return (v * ((high - low) / 2)).add_((high + low) / 2).exp_().mul_(z)
