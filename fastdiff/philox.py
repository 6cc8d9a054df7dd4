"""Philox4x32-10 (Salmon et al. 2011) and Box-Muller on arrays: one text for numpy and torch. fastdiff.noise is its public face.

Element i of a draw has the counter (i // 4, draw) under the key of its seed; a counter gives four normals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, Salmon et al. 2011, section 4
MASK = 0xFFFFFFFF


def rounds(c: list[Any], k: list[Any]) -> list[Any]:
    """Ten Philox rounds on counters and keys held as 32-bit values in 64-bit integers (numpy uint64 or torch int64).

    A 32x32 product may wrap the signed 64 bits; its low word and, after masking the arithmetic shift, its high word stay right.
    """
    for _ in range(ROUNDS):
        p0, p1 = c[0] * MULTIPLIERS[0], c[2] * MULTIPLIERS[1]
        c = [(p1 >> 32) & MASK ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) & MASK ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + KEY_STEPS[0]) & MASK, (k[1] + KEY_STEPS[1]) & MASK]
    return c


def seed_bits(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Seeds of 64 bits as an int64 tensor of the same bits, (len(seeds),)."""
    return torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds], dtype=torch.int64, device=device)


def normals_numpy(seeds: Sequence[int], draw: int, count: int) -> np.ndarray:
    """(len(seeds), count) float32 unit normals."""
    keys = np.array(seeds, np.uint64)[:, None]
    block = np.arange((count + 3) // 4, dtype=np.uint64)[None]
    zero = np.zeros_like(keys + block)
    mask, shift = np.uint64(MASK), np.uint64(32)
    counters = [zero + (block & mask), zero + (block >> shift), zero + np.uint64(draw & MASK), zero + np.uint64(draw >> 32)]
    with np.errstate(over="ignore"):
        words = rounds(counters, [keys & mask, keys >> shift])
    out = []
    for a, b in ((words[0], words[1]), (words[2], words[3])):
        radius, angle = polar(a.astype(np.int64), b.astype(np.int64), np)
        out += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(out, axis=-1).reshape(len(keys), -1)[:, :count]


def normals(seeds: Tensor, draw: int, count: int) -> Tensor:
    """(len(seeds), count) float32 unit normals on the seeds' device; seeds as `seed_bits` gives them."""
    low, high = (seeds & MASK)[:, None], (seeds >> 32 & MASK)[:, None]
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=seeds.device)[None]
    zero = torch.zeros_like(low + block)
    counters = [zero + (block & MASK), zero + (block >> 32), zero + (draw & MASK), zero + (draw >> 32)]
    words = rounds(counters, [low, high])
    out = []
    for a, b in ((words[0], words[1]), (words[2], words[3])):
        radius, angle = polar(a, b, torch)
        out += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(out, dim=-1).reshape(low.shape[0], -1)[:, :count]


def polar(a: Any, b: Any, xp: Any) -> tuple[Any, Any]:
    """Radius and angle of Box-Muller from two 32-bit words: 24 bits of each, u in (0, 1] and [0, 1), exact in float32."""
    def f32(v: Any) -> Any:
        return v.to(torch.float32) if xp is torch else v.astype(np.float32)

    u, v = f32((a >> 8) + 1) * 2.0**-24, f32(b >> 8) * 2.0**-24
    if xp is np:
        u, v = u.astype(np.float32), v.astype(np.float32)
        return np.sqrt(np.float32(-2) * np.log(u)), np.float32(2 * math.pi) * v
    return xp.sqrt(-2 * xp.log(u)), v * float(np.float32(2 * math.pi))
