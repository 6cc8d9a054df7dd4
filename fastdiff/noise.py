"""Noise that belongs to a sample: draw k of seed s is the same numbers whatever the batch, the device or the run.

Element i of draw k is Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = (i // 4, k), by Box-Muller in float32.
Draw 0 is the start noise. numpy and torch give the same normals to 1e-6 and each is bit-equal to itself, so kernels and
exported engines can make the same images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import FastdiffError

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, Salmon et al. 2011, section 4
MASK = 0xFFFFFFFF


class NoiseSource(Protocol):
    """Draw k for a whole batch: k = 0 is the start noise, 1, 2, ... the plan's draws in order."""

    def __call__(self, draw: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """(B, *) float32 unit normals; `shape` includes the batch."""


def _rounds(c: list[Any], k: list[Any]) -> list[Any]:
    """Ten Philox rounds on counters and keys held as 32-bit values in 64-bit integers (numpy uint64 or torch int64).

    A 32x32 product may wrap the signed 64 bits; its low word and, after masking the arithmetic shift, its high word stay right.
    """
    for _ in range(ROUNDS):
        p0, p1 = c[0] * MULTIPLIERS[0], c[2] * MULTIPLIERS[1]
        c = [(p1 >> 32) & MASK ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) & MASK ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + KEY_STEPS[0]) & MASK, (k[1] + KEY_STEPS[1]) & MASK]
    return c


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
    keys = np.array(check_seeds(seeds), np.uint64)[:, None]
    block = np.arange((count + 3) // 4, dtype=np.uint64)[None]
    zero = np.zeros_like(keys + block)
    mask, shift = np.uint64(MASK), np.uint64(32)
    counters = [zero + (block & mask), zero + (block >> shift), zero + np.uint64(draw & MASK), zero + np.uint64(draw >> 32)]
    with np.errstate(over="ignore"):
        words = _rounds(counters, [keys & mask, keys >> shift])
    out = []
    for a, b in ((words[0], words[1]), (words[2], words[3])):
        radius, angle = _polar(a.astype(np.int64), b.astype(np.int64), np)
        out += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(out, axis=-1).reshape(len(keys), -1)[:, :count]


def normal(seeds: Sequence[int], draw: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """(len(seeds), count) float32 unit normals, made on the device."""
    # 64-bit seeds as two signed-safe halves: int64 cannot hold the upper half of uint64
    seeds = check_seeds(seeds)
    low = torch.tensor([s & MASK for s in seeds], dtype=torch.int64, device=device)[:, None]
    high = torch.tensor([s >> 32 for s in seeds], dtype=torch.int64, device=device)[:, None]
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)[None]
    zero = torch.zeros_like(low + block)
    counters = [zero + (block & MASK), zero + (block >> 32), zero + (draw & MASK), zero + (draw >> 32)]
    words = _rounds(counters, [low, high])
    out = []
    for a, b in ((words[0], words[1]), (words[2], words[3])):
        radius, angle = _polar(a, b, torch)
        out += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(out, dim=-1).reshape(low.shape[0], -1)[:, :count]


def _polar(a: Any, b: Any, xp: Any) -> tuple[Any, Any]:
    """Radius and angle of Box-Muller from two 32-bit words: 24 bits of each, u in (0, 1] and [0, 1), exact in float32."""
    def f32(v: Any) -> Any:
        return v.to(torch.float32) if xp is torch else v.astype(np.float32)

    u, v = f32((a >> 8) + 1) * 2.0**-24, f32(b >> 8) * 2.0**-24
    if xp is np:
        u, v = u.astype(np.float32), v.astype(np.float32)
        return np.sqrt(np.float32(-2) * np.log(u)), np.float32(2 * math.pi) * v
    return xp.sqrt(-2 * xp.log(u)), v * float(np.float32(2 * math.pi))


def from_seeds(seeds: Sequence[int]) -> NoiseSource:
    """Philox noise, one seed a sample: a sample's noise depends on its own seed alone."""
    seeds = check_seeds(seeds)

    def source(draw: int, shape: Sequence[int], device: torch.device) -> Tensor:
        if shape[0] != len(seeds):
            raise FastdiffError(f"{len(seeds)} seeds for a batch of {shape[0]}: give one seed a sample")
        return normal(seeds, draw, math.prod(shape[1:]), device).view(*shape)

    return source


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
