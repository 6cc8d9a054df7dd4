"""The Triton kernels of the GroupNorm family and their launchers; imported only where triton is.

Every tensor is seen as (batch, channel, position) with three strides, so one kernel serves NCHW, channels-last, video and sliced
inputs. A group that fits on chip is read once (`one_read`). A larger one is split into tiles of channels and positions:
`moments` leaves a mean and a sum of squared deviations per channel and split (a tile, or several), `join` joins them in a
fixed order, `apply` normalises. No atomics, and no choice depends on the batch size: a sample's result is bit-equal alone and
among others. Statistics are two-pass in float32; pairs are joined by Chan, Golub and LeVeque (1979), eq. 2.1.

In half precision an H200 moves an element of one_read in the time in which it issues 28 instructions, so these kernels count
them: benches/README.md says how many, tests/kernels holds them to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm import Norm, flat, like
from .tile_triton import FUSED, at, existing, parts, registers

TILE = 4096  # elements a program of a split kernel holds: 32 a thread with 4 warps
SPLITS = 256  # of a channel's positions, at most: one program joins those of a whole group
ONE_READ = 20480  # the largest padded group kept on chip, 40 values a thread: 32768 spills on sm_80, 90 and 100
ONE_READ_LAST = 16384  # the same in channels-last: 20480 spills
ONE_READ_NARROW = 10240  # the same, 20 values a thread, where addresses and masks take registers
ONE_READ_BACKWARD = 8192  # two tensors are held: 16384 spills, and so does 8192 in channels-last


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
def activated(v, y, SILU: tl.constexpr):
    """What is stored in y: SiLU of v, or v. In half precision the sigmoid is a square, to 4e-7 of itself (4e-6 at -86) in 6
    instructions: the division and the exponential of denormals would cost 7 more."""
    if SILU:
        if y.dtype.element_ty == tl.float32:
            v *= tl.sigmoid(v)
        else:
            root = tl.rsqrt(1.0 + tl.exp2(v * -1.4426950408889634))
            v *= root * root
    return v


@triton.jit
def before_activation(dy, v, SILU: tl.constexpr):
    """The gradient with respect to SiLU's argument v."""
    if SILU:
        p = tl.sigmoid(v)
        dy = dy * p * (1.0 + v * (1.0 - p))
    return dy


@triton.jit
def with_added(v, added, c, inside, mask):
    """v with its channel's number added."""
    if added is not None:
        v = tl.where(mask, v + tl.load(added + c, inside, other=0.0).to(tl.float32)[:, None], 0.0)
    return v


@triton.jit
def one_read(
    x, residual, added, weight, bias, scale, shift, y, total, mean_out, rstd_out,
    groups, positions, eps, xb, xc, xs, rb, rc, rs, yb, yc, ys, added_row, scale_row, shift_row,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BLOCK_S: tl.constexpr, ALL_S: tl.constexpr,
):  # fmt: skip
    """One program a (sample, group), its CHANNELS in one or two parts: 1 read, 1 write."""
    pid = tl.program_id(0)
    b, first = (pid // groups).to(tl.int64), (pid % groups) * CHANNELS
    s, start = tl.arange(0, BLOCK_S), first.to(tl.int64)
    x += b * xb + start * xc
    y += b * yb + start * yc
    if residual is not None:
        residual += b * rb + start * rc
        total += b * yb + start * yc
    if added is not None:
        added += b * added_row + first
    c0, c1 = tl.arange(0, C0), C0 + tl.arange(0, C1 or 1)
    inside0, inside1 = c0 < CHANNELS, c1 < CHANNELS
    mask0 = existing(c0, s, CHANNELS, positions, C0 <= CHANNELS, ALL_S)
    mask1 = existing(c1, s, CHANNELS, positions, C0 + C1 <= CHANNELS, ALL_S)
    count = CHANNELS * 1.0 * positions  # a size of 1 is Python's int here, which has no .to(tl.float32)
    v0 = load_sum(x, residual, total, c0, s, xc, xs, rc, rs, yc, ys, mask0)
    v0 = with_added(v0, added, c0, inside0, mask0)
    mean, v1 = tl.sum(v0), v0
    if C1:
        v1 = load_sum(x, residual, total, c1, s, xc, xs, rc, rs, yc, ys, mask1)
        v1 = with_added(v1, added, c1, inside1, mask1)
        mean += tl.sum(v1)
    mean /= count
    v0 = tl.where(mask0, v0 - mean, 0.0)
    square = tl.sum(v0 * v0)
    if C1:
        v1 = tl.where(mask1, v1 - mean, 0.0)
        square += tl.sum(v1 * v1)
    rstd = 1.0 / tl.sqrt(square / count + eps)
    tl.store(mean_out + pid, mean)
    tl.store(rstd_out + pid, rstd)
    gain, offset = gain_offset(b, first + c0, inside0, weight, bias, scale, shift, scale_row, shift_row)
    v0 = activated(tl.fma(v0, (rstd * gain)[:, None], offset[:, None]), y, SILU)
    tl.store(y + at(c0, s, yc, ys), v0.to(y.dtype.element_ty), mask0)
    if C1:
        gain, offset = gain_offset(b, first + c1, inside1, weight, bias, scale, shift, scale_row, shift_row)
        v1 = activated(tl.fma(v1, (rstd * gain)[:, None], offset[:, None]), y, SILU)
        tl.store(y + at(c1, s, yc, ys), v1.to(y.dtype.element_ty), mask1)


@triton.jit
def tile(part, channels, positions, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ALL_C: tl.constexpr, ALL_S: tl.constexpr):
    """Of a split kernel's program (.., block of channels, sample): its sample, channels and positions, and which exist."""
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = part * BLOCK_S + tl.arange(0, BLOCK_S)
    return b, c, s, c < channels, existing(c, s, channels, positions, ALL_C, ALL_S)


@triton.jit
def moments_of(
    part, x, residual, total, sizes, steps,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ALL_C: tl.constexpr, ALL_S: tl.constexpr,
):  # fmt: skip
    """Positions of a tile; mean and sum of squared deviations of each of its channels over them."""
    channels, positions = sizes
    xb, xc, xs, rb, rc, rs, yb, yc, ys = steps
    b, c, s, _, mask = tile(part, channels, positions, BLOCK_C, BLOCK_S, ALL_C, ALL_S)
    x += b * xb
    if residual is not None:
        residual += b * rb
        total += b * yb
    v = load_sum(x, residual, total, c, s, xc, xs, rc, rs, yc, ys, mask)
    count = tl.maximum(tl.minimum(positions - part * BLOCK_S, BLOCK_S), 0).to(tl.float32)
    mean = tl.sum(v, 1) / tl.maximum(count, 1.0)
    v = tl.where(mask, v - mean[:, None], 0.0)
    return count, mean, tl.sum(v * v, 1)


@triton.jit
def moments(
    x, residual, total, means, squares, channels, positions, tiles, xb, xc, xs, rb, rc, rs, yb, yc, ys,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ALL_C: tl.constexpr, ALL_S: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over a split of `tiles` tiles, into (B, C, splits)."""
    split = tl.program_id(0)
    sizes, steps = (channels, positions), (xb, xc, xs, rb, rc, rs, yb, yc, ys)
    seen, mean, square = moments_of(split * tiles, x, residual, total, sizes, steps, BLOCK_C, BLOCK_S, ALL_C, ALL_S)
    for i in range(1, tiles):  # a start from nothing would cost the usual single tile an instruction an element
        part = split * tiles + i
        count, here_mean, here_square = moments_of(part, x, residual, total, sizes, steps, BLOCK_C, BLOCK_S, ALL_C, ALL_S)
        apart, share = here_mean - mean, count / (seen + count)
        square += here_square + apart * apart * (seen * share)
        mean += apart * share
        seen += count
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out = (tl.program_id(2).to(tl.int64) * channels + c) * tl.num_programs(0) + split
    tl.store(means + out, mean, c < channels)
    tl.store(squares + out, square, c < channels)


@triton.jit
def mean_of(means, i, splits, added, inside):
    """A channel's mean over a split; what is added to the channel moves it, and leaves the deviations as they are."""
    mean = tl.load(means + i, inside, other=0.0)
    if added is not None:
        mean += tl.load(added + i // splits, inside, other=0.0).to(tl.float32)
    return mean


@triton.jit
def join(
    means, squares, added, weight, bias, scale, shift, mean_out, rstd_out, center, factor, offset_out, groups, per_group,
    positions, splits, chunk, eps, added_row, scale_row, shift_row, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program a (sample, group): its channels' and splits' moments to mean and 1 / standard deviation, in order; and what
    `apply` needs of each channel, into (B, C)."""
    pid = tl.program_id(0)
    b, first = (pid // groups).to(tl.int64), (pid % groups) * per_group
    row = pid.to(tl.int64) * per_group
    means += row * splits
    squares += row * splits
    if added is not None:
        added += b * added_row + first
    size, count = per_group * splits, per_group * 1.0 * positions
    weighted = tl.zeros((BLOCK,), tl.float32)
    for done in range(0, size, BLOCK):
        i = done + tl.arange(0, BLOCK)
        held = tl.minimum(positions - (i % splits) * chunk, chunk).to(tl.float32)
        weighted += held * mean_of(means, i, splits, added, i < size)
    mean = tl.sum(weighted, 0) / count
    square = tl.zeros((BLOCK,), tl.float32)
    for done in range(0, size, BLOCK):
        i = done + tl.arange(0, BLOCK)
        held = tl.minimum(positions - (i % splits) * chunk, chunk).to(tl.float32)
        apart = mean_of(means, i, splits, added, i < size) - mean
        square += tl.where(i < size, tl.load(squares + i, i < size, other=0.0) + held * apart * apart, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(square, 0) / count + eps)
    tl.store(mean_out + pid, mean)
    tl.store(rstd_out + pid, rstd)
    for done in range(0, per_group, BLOCK_C):
        c = done + tl.arange(0, BLOCK_C)
        inside = c < per_group
        gain, offset = gain_offset(b, first + c, inside, weight, bias, scale, shift, scale_row, shift_row)
        moved = tl.full(c.shape, 0.0, tl.float32) + mean
        if added is not None:
            moved -= tl.load(added + c, inside, other=0.0).to(tl.float32)
        tl.store(center + row + c, moved, inside)
        tl.store(factor + row + c, rstd * gain, inside)
        tl.store(offset_out + row + c, offset, inside)


@triton.jit
def apply(
    x, y, center, factor, offset, channels, positions, xb, xc, xs, yb, yc, ys,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ALL_C: tl.constexpr, ALL_S: tl.constexpr,
):  # fmt: skip
    """One program a tile of channels and positions: the second read, and the write."""
    b, c, s, inside, mask = tile(tl.program_id(0), channels, positions, BLOCK_C, BLOCK_S, ALL_C, ALL_S)
    row = b * channels + c
    v = tl.load(x + b * xb + at(c, s, xc, xs), mask, other=0.0).to(tl.float32)
    mean, gain, add = tl.load(center + row, inside), tl.load(factor + row, inside), tl.load(offset + row, inside)
    v = activated(tl.fma(v - mean[:, None], gain[:, None], add[:, None]), y, SILU)
    tl.store(y + b * yb + at(c, s, yc, ys), v.to(y.dtype.element_ty), mask)


@dataclass(frozen=True)
class Split:
    """How a large group of (B, channels, positions) is cut into tiles; from one sample's shape and layout alone."""

    channels: int
    positions: int
    block_c: int
    block_s: int
    tiles: int  # of a split: one, until a channel would have more than SPLITS

    @classmethod
    def of(cls, channels: int, positions: int, channels_last: bool) -> Split:
        """The contiguous axis takes 64 channels or as many positions as fill a tile, and the other what is left of the tile: a
        sum over the positions of one channel needs fewer exchanges between threads than sums of several."""
        if channels_last:
            block_c = min(triton.next_power_of_2(channels), 64)
            block_s = min(triton.next_power_of_2(positions), TILE // block_c)
        else:
            filled = [n for n in (TILE, TILE // 2) if -positions % n <= positions // 8]
            block_s = filled[0] if filled else min(triton.next_power_of_2(positions), TILE // 4)
            block_c = min(triton.next_power_of_2(channels), TILE // block_s)
        return cls(channels, positions, block_c, block_s, triton.cdiv(triton.cdiv(positions, block_s), SPLITS))

    def blocks(self, wide: bool, all_registers: bool = False) -> dict[str, Any]:
        """wide: what is loaded is `aligned`; if not, addresses take the registers of half the elements, and all there are."""
        warps = max(1, self.block_c * self.block_s // (1024 if wide else 512))
        return {
            "BLOCK_C": self.block_c, "BLOCK_S": self.block_s, "ALL_C": self.channels % self.block_c == 0,
            "ALL_S": self.positions % self.block_s == 0, "num_warps": warps,
            "maxnreg": registers(warps) if all_registers or not wide else None, **FUSED,
        }  # fmt: skip

    def grid(self, batch: int, tiles: int = 1) -> tuple[int, int, int]:
        """Programs of so many tiles of positions: those, blocks of channels, samples."""
        return triton.cdiv(self.positions, self.block_s * tiles), triton.cdiv(self.channels, self.block_c), batch


def aligned(*tensors: Tensor | None) -> bool:
    """Whether Triton can load 16 bytes of (B, C, positions) at a time, and need not look at each element's place."""
    given = [v for v in tensors if v is not None]
    along = given[0].shape[1] if given[0].stride(1) == 1 else given[0].shape[2]
    return along % 16 == 0 and all(v.data_ptr() % 16 == 0 and all(n == 1 or n % 16 == 0 for n in v.stride()) for v in given)


def on_chip(per_group: int, positions: int, channels_last: bool, wide: bool, added: bool = False) -> dict[str, Any] | None:
    """Block sizes and warps of the kernel that reads a group once; None where it does not fit.

    wide: what is loaded is `aligned`. added: an embedding is added, which spills 8 bytes in channels-last if not all registers
    may be taken (Triton 3.6).
    """
    c0, c1 = parts(per_group)
    block_s = triton.next_power_of_2(positions)
    wide = wide and block_s == positions and (per_group % 8 == 0 or not channels_last)
    size, limit = (c0 + c1) * block_s, (ONE_READ_LAST if channels_last else ONE_READ) if wide else ONE_READ_NARROW
    if size > limit:
        return None
    warps = min(triton.next_power_of_2(triton.cdiv(size, 1280 if wide else 640)), 16)
    return {
        "CHANNELS": per_group, "C0": c0, "C1": c1, "BLOCK_S": block_s, "ALL_S": block_s == positions, "num_warps": warps,
        "maxnreg": None if wide and not (added and channels_last) else registers(warps), **FUSED,
    }  # fmt: skip


def forward(x: Tensor, norm: Norm, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, x + residual or None, mean, rstd). The contract is `group_norm.why_not`, and a residual or `added`, not both. x that
    has no single stride over its positions is copied first."""
    y = like(x)
    total = like(x) if residual is not None else None
    v, out = flat(x), flat(y)
    batch, channels, positions = v.shape
    r = flat(residual.expand_as(x)) if residual is not None else None
    mean = torch.empty(batch, norm.groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    affine = (norm.added, norm.weight, norm.bias, norm.scale, norm.shift)
    rows = (0 if norm.added is None else norm.added.stride(0), *norm.rows)
    strides_r = r.stride() if r is not None else (0, 0, 0)
    per_group = channels // norm.groups
    channels_last, wide = v.stride(1) == 1, aligned(v, r, out)
    if blocks := on_chip(per_group, positions, channels_last, wide, norm.added is not None):
        one_read[(batch * norm.groups,)](
            v, r, *affine, y, total, mean, rstd, norm.groups, positions, norm.eps, *v.stride(), *strides_r,
            *out.stride(), *rows, SILU=norm.silu, **blocks,
        )  # fmt: skip
        return y, total, mean, rstd
    cut = Split.of(channels, positions, channels_last)
    grid = cut.grid(batch, cut.tiles)
    splits = grid[0]
    space = torch.empty(2 * splits + 3, batch, channels, dtype=torch.float32, device=x.device)
    means, squares, *per_channel = space[0], space[splits], *space[2 * splits :]
    moments[grid](
        v, r, total, means, squares, channels, positions, cut.tiles, *v.stride(), *strides_r, *out.stride(),
        **cut.blocks(wide, all_registers=True),
    )  # fmt: skip
    join[(batch * norm.groups,)](
        means, squares, *affine, mean, rstd, *per_channel, norm.groups, per_group, positions, splits, cut.tiles * cut.block_s,
        norm.eps, *rows, BLOCK=1024, BLOCK_C=128, **FUSED,
    )  # fmt: skip
    source = v if total is None else flat(total)
    apply[cut.grid(batch)](
        source, y, *per_channel, channels, positions, *source.stride(), *out.stride(), SILU=norm.silu,
        **cut.blocks(wide),
    )  # fmt: skip
    return y, total, mean, rstd
