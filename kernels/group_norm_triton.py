"""The Triton kernels of the GroupNorm family and their launchers; imported only where triton is.

Every tensor is seen as (batch, channel, position) with three strides, so one kernel serves NCHW, channels-last, video and sliced
inputs. A group that fits on chip is read once (`one_read`). A larger one is split over positions: `moments` leaves a mean and a
sum of squared deviations per channel and split, `combine` joins them in a fixed order, `apply` normalises. No atomics, and no
choice depends on the batch size: a sample's result is bit-equal alone and among others. Statistics are two-pass in float32;
pairs are joined by Chan, Golub and LeVeque (1979), eq. 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm import Norm, flat, like

TILE = 4096  # elements a program of a split kernel holds at once: 32 a thread with 4 warps
ONE_READ = 16384  # the largest padded group kept on chip, 32 values a thread: 32768 spills on sm_80, 90 and 100
ONE_READ_BACKWARD = 8192  # two tensors are held: 16384 spills
MAX_SPLITS = 64


@triton.jit
def gain_offset(b, c, inside, weight, bias, scale, shift, scale_row, shift_row):
    """What a normalised channel is multiplied by and what is added then: w (1 + scale) and b (1 + scale) + shift."""
    gain = tl.full(c.shape, 1.0, tl.float32)
    offset = tl.zeros(c.shape, tl.float32)
    if weight is not None:
        gain = tl.load(weight + c, inside, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, inside, other=0.0).to(tl.float32)
    if scale is not None:
        factor = 1.0 + tl.load(scale + b * scale_row + c, inside, other=0.0).to(tl.float32)
        gain *= factor
        offset = offset * factor + tl.load(shift + b * shift_row + c, inside, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def at(c, s, stride_c, stride_s):
    """Offsets of a tile; 32 bits where the strides are, which halves the registers they take."""
    return c[:, None] * stride_c + s[None, :] * stride_s


@triton.jit
def load_sum(x, residual, total, c, s, xc, xs, rc, rs, yc, ys, mask):
    """x, or x + residual rounded to x's dtype and stored: the statistics are those of the sum that is returned."""
    v = tl.load(x + at(c, s, xc, xs), mask, other=0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + at(c, s, rc, rs), mask, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + at(c, s, yc, ys), rounded, mask)
        v = rounded.to(tl.float32)
    return v


@triton.jit
def activated(v, SILU: tl.constexpr):
    return v * tl.sigmoid(v) if SILU else v


@triton.jit
def before_activation(dy, v, SILU: tl.constexpr):
    """The gradient with respect to SiLU's argument v."""
    if SILU:
        p = tl.sigmoid(v)
        dy = dy * p * (1.0 + v * (1.0 - p))
    return dy


@triton.jit
def one_read(
    x, residual, weight, bias, scale, shift, y, total, mean_out, rstd_out,
    groups, per_group, positions, eps, xb, xc, xs, rb, rc, rs, yb, yc, ys, scale_row, shift_row,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program a (sample, group): 1 read, 1 write."""
    pid = tl.program_id(0)
    b, first = (pid // groups).to(tl.int64), (pid % groups) * per_group
    row, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    inside = row < per_group
    mask = inside[:, None] & (s < positions)[None, :]
    start = first.to(tl.int64)
    x += b * xb + start * xc
    y += b * yb + start * yc
    if residual is not None:
        residual += b * rb + start * rc
        total += b * yb + start * yc
    v = load_sum(x, residual, total, row, s, xc, xs, rc, rs, yc, ys, mask)
    count = (per_group * positions).to(tl.float32)
    mean = tl.sum(tl.sum(v, 1), 0) / count
    v = tl.where(mask, v - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(v * v, 1), 0) / count + eps)
    tl.store(mean_out + pid, mean)
    tl.store(rstd_out + pid, rstd)
    gain, offset = gain_offset(b, first + row, inside, weight, bias, scale, shift, scale_row, shift_row)
    v = activated(v * (rstd * gain)[:, None] + offset[:, None], SILU)
    tl.store(y + at(row, s, yc, ys), v.to(y.dtype.element_ty), mask)


@triton.jit
def tile(pid, channels, splits, BLOCK_C: tl.constexpr):
    """Of a split kernel's program: its sample, its channels and its split."""
    blocks = tl.cdiv(channels, BLOCK_C)
    split, rest = pid % splits, pid // splits
    return (rest // blocks).to(tl.int64), (rest % blocks) * BLOCK_C + tl.arange(0, BLOCK_C), split


@triton.jit
def moments(
    x, residual, total, means, squares, channels, positions, splits, tiles, xb, xc, xs, rb, rc, rs, yb, yc, ys,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over a split of `tiles` tiles, into (B, C, splits)."""
    b, c, split = tile(tl.program_id(0), channels, splits, BLOCK_C)
    inside = c < channels
    x += b * xb
    if residual is not None:
        residual += b * rb
        total += b * yb
    mean, square = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    seen = 0.0
    for i in range(tiles):
        first = (split * tiles + i) * BLOCK_S
        s = first + tl.arange(0, BLOCK_S)
        mask = inside[:, None] & (s < positions)[None, :]
        v = load_sum(x, residual, total, c, s, xc, xs, rc, rs, yc, ys, mask)
        count = tl.maximum(tl.minimum(positions - first, BLOCK_S), 0).to(tl.float32)
        here_mean = tl.sum(v, 1) / tl.maximum(count, 1.0)
        v = tl.where(mask, v - here_mean[:, None], 0.0)
        both = tl.maximum(seen + count, 1.0)
        apart = here_mean - mean
        square += tl.sum(v * v, 1) + apart * apart * (seen * count / both)
        mean += apart * (count / both)
        seen += count
    out = (b * channels + c) * splits + split
    tl.store(means + out, mean, inside)
    tl.store(squares + out, square, inside)


@triton.jit
def combine(means, squares, mean_out, rstd_out, per_group, positions, splits, chunk, eps, BLOCK: tl.constexpr):
    """One program a (sample, group): its channels' and splits' moments to mean and 1 / standard deviation, in order."""
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * per_group * splits
    size, count = per_group * splits, (per_group * positions).to(tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        held = tl.maximum(tl.minimum(positions - (i % splits) * chunk, chunk), 0).to(tl.float32)
        weighted += held * tl.load(means + start + i, i < size, other=0.0)
    mean = tl.sum(weighted, 0) / count
    square = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        held = tl.maximum(tl.minimum(positions - (i % splits) * chunk, chunk), 0).to(tl.float32)
        apart = tl.load(means + start + i, i < size, other=0.0) - mean
        square += tl.where(i < size, tl.load(squares + start + i, i < size, other=0.0) + held * apart * apart, 0.0)
    tl.store(mean_out + pid, mean)
    tl.store(rstd_out + pid, 1.0 / tl.sqrt(tl.sum(square, 0) / count + eps))


@triton.jit
def apply(
    x, weight, bias, scale, shift, y, mean_in, rstd_in, channels, groups, positions, tiles, xb, xc, xs, yb, yc, ys,
    scale_row, shift_row, SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program a tile of channels and positions: the second read, and the write."""
    b, c, part = tile(tl.program_id(0), channels, tiles, BLOCK_C)
    inside, s = c < channels, part * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = inside[:, None] & (s < positions)[None, :]
    group = b * groups + c // (channels // groups)
    mean, rstd = tl.load(mean_in + group, inside, other=0.0), tl.load(rstd_in + group, inside, other=0.0)
    gain, offset = gain_offset(b, c, inside, weight, bias, scale, shift, scale_row, shift_row)
    v = tl.load(x + b * xb + at(c, s, xc, xs), mask, other=0.0).to(tl.float32)
    v = activated((v - mean[:, None]) * (rstd * gain)[:, None] + offset[:, None], SILU)
    tl.store(y + b * yb + at(c, s, yc, ys), v.to(y.dtype.element_ty), mask)


@dataclass(frozen=True)
class Split:
    """How a large group is cut; from one sample's shape and layout alone."""

    block_c: int
    block_s: int
    splits: int  # partial results a channel
    tiles: int  # tiles a split

    @classmethod
    def of(cls, channels: int, positions: int, channels_last: bool) -> Split:
        along, across = (channels, positions) if channels_last else (positions, channels)
        # the contiguous axis takes 64 channels or 1024 positions of a tile, and the other what is left of it
        wide = min(triton.next_power_of_2(along), 64 if channels_last else 1024)
        high = min(triton.next_power_of_2(across), TILE // wide)
        block_c, block_s = (wide, high) if channels_last else (high, wide)
        parts = triton.cdiv(positions, block_s)
        tiles = triton.cdiv(parts, MAX_SPLITS)
        return cls(block_c, block_s, triton.cdiv(parts, tiles), tiles)

    @property
    def blocks(self) -> dict[str, Any]:
        return {"BLOCK_C": self.block_c, "BLOCK_S": self.block_s, "num_warps": max(1, self.block_c * self.block_s // 1024)}


def aligned(*tensors: Tensor | None) -> bool:
    """Whether Triton can load 16 bytes at a time; if not, addresses take the registers of half the group."""
    given = [v for v in tensors if v is not None]
    return all(v.data_ptr() % 16 == 0 and all(n == 1 or n % 16 == 0 for n in v.stride()) for v in given)


def on_chip(per_group: int, positions: int, limit: int) -> dict[str, Any] | None:
    """Block sizes and warps of the kernel that reads a group once; None where it does not fit."""
    block_c, block_s = triton.next_power_of_2(per_group), triton.next_power_of_2(positions)
    size = block_c * block_s
    if size > limit:
        return None
    return {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": min(max(size // 512, 1), 16)}


def forward(x: Tensor, norm: Norm, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, x + residual or None, mean, rstd). The contract is `group_norm.why_not`; x that has no single stride over its
    positions is copied first."""
    y = like(x)
    total = like(x) if residual is not None else None
    v, out = flat(x), flat(y)
    batch, channels, positions = v.shape
    r = flat(residual.expand_as(x)) if residual is not None else None
    mean = torch.empty(batch, norm.groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    affine = (norm.weight, norm.bias, norm.scale, norm.shift)
    rows = norm.rows
    strides_r = r.stride() if r is not None else (0, 0, 0)
    per_group = channels // norm.groups
    if blocks := on_chip(per_group, positions, ONE_READ if aligned(v, r, out) else ONE_READ // 2):
        one_read[(batch * norm.groups,)](
            v, r, *affine, y, total, mean, rstd, norm.groups, per_group, positions, norm.eps, *v.stride(), *strides_r,
            *out.stride(), *rows, SILU=norm.silu, **blocks,
        )  # fmt: skip
        return y, total, mean, rstd
    cut = Split.of(channels, positions, v.stride(1) == 1)
    space = torch.empty(2, batch, channels, cut.splits, dtype=torch.float32, device=x.device)
    blocks_c = triton.cdiv(channels, cut.block_c)
    moments[(batch * blocks_c * cut.splits,)](
        v, r, total, space[0], space[1], channels, positions, cut.splits, cut.tiles, *v.stride(), *strides_r, *out.stride(),
        **cut.blocks,
    )  # fmt: skip
    combine[(batch * norm.groups,)](
        space[0], space[1], mean, rstd, per_group, positions, cut.splits, cut.tiles * cut.block_s, norm.eps, BLOCK=1024
    )
    source = v if total is None else flat(total)
    parts = triton.cdiv(positions, cut.block_s)
    apply[(batch * blocks_c * parts,)](
        source, *affine, y, mean, rstd, channels, norm.groups, positions, parts, *source.stride(), *out.stride(), *rows,
        SILU=norm.silu, **cut.blocks,
    )  # fmt: skip
    return y, total, mean, rstd
