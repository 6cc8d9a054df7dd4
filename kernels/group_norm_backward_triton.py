"""The Triton kernels of the GroupNorm family's backward, and their launcher; imported only where triton is.

With z = x_hat gain + offset the argument of SiLU and dz its gradient, every gradient follows from two sums per channel,
p = sum dz and q = sum dz x_hat:  dx = rstd (dz gain - mean_group(gain p) - x_hat mean_group(gain q)).
A group that fits on chip reads x and dy once; a larger one is split as in the forward: sums, their totals, then dx.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm import Norm, flat, like
from .group_norm_triton import ONE_READ_BACKWARD, Split, aligned, before_activation, gain_offset, tile
from .tile_triton import FUSED, at, existing, registers


@triton.jit
def one_read_backward(
    x, dy, dtotal, weight, bias, scale, shift, mean_in, rstd_in, dx, p_out, q_out, groups, per_group, positions,
    xb, xc, xs, yb, yc, ys, scale_row, shift_row, SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program a (sample, group): x and dy are read once, dx is written."""
    pid = tl.program_id(0)
    b, first = (pid // groups).to(tl.int64), (pid % groups) * per_group
    row, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    inside = row < per_group
    mask = inside[:, None] & (s < positions)[None, :]
    start = first.to(tl.int64)
    x += b * xb + start * xc
    dy += b * yb + start * yc
    dx += b * yb + start * yc
    mean, rstd = tl.load(mean_in + pid), tl.load(rstd_in + pid)
    gain, offset = gain_offset(b, first + row, inside, weight, bias, scale, shift, scale_row, shift_row)
    v = tl.load(x + at(row, s, xc, xs), mask, other=0.0).to(tl.float32)
    v = (v - mean) * rstd
    dz = tl.load(dy + at(row, s, yc, ys), mask, other=0.0).to(tl.float32)
    dz = before_activation(dz, v * gain[:, None] + offset[:, None], SILU)
    p, q = tl.sum(dz, 1), tl.sum(dz * v, 1)  # zero outside the mask, as dy is
    out = pid.to(tl.int64) * per_group + row
    tl.store(p_out + out, p, inside)
    tl.store(q_out + out, q, inside)
    count = per_group * 1.0 * positions  # a size of 1 is Python's int here
    out = rstd * (dz * gain[:, None] - tl.sum(gain * p, 0) / count - v * (tl.sum(gain * q, 0) / count))
    if dtotal is not None:
        out += tl.load(dtotal + b * yb + start * yc + at(row, s, yc, ys), mask, other=0.0).to(tl.float32)
    tl.store(dx + at(row, s, yc, ys), out.to(dx.dtype.element_ty), mask)


@triton.jit
def sums(
    x, dy, weight, bias, scale, shift, mean_in, rstd_in, p_out, q_out, channels, groups, positions, tiles,
    xb, xc, xs, yb, yc, ys, scale_row, shift_row, SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    ALL_C: tl.constexpr, ALL_S: tl.constexpr,
):  # fmt: skip
    """p and q of each channel over a split of `tiles` tiles, into (B, C, splits)."""
    split, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    group = b * groups + c // (channels // groups)
    mean, rstd = tl.load(mean_in + group, inside, other=0.0), tl.load(rstd_in + group, inside, other=0.0)
    gain, offset = gain_offset(b, c, inside, weight, bias, scale, shift, scale_row, shift_row)
    p, q = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for i in range(tiles):
        s = (split * tiles + i) * BLOCK_S + tl.arange(0, BLOCK_S)
        mask = existing(c, s, channels, positions, ALL_C, ALL_S)
        v = tl.load(x + b * xb + at(c, s, xc, xs), mask, other=0.0).to(tl.float32)
        v = (v - mean[:, None]) * rstd[:, None]
        dz = tl.load(dy + b * yb + at(c, s, yc, ys), mask, other=0.0).to(tl.float32)
        dz = before_activation(dz, v * gain[:, None] + offset[:, None], SILU)
        p += tl.sum(dz, 1)
        q += tl.sum(dz * v, 1)
    out = (b * channels + c) * tl.num_programs(0) + split
    tl.store(p_out + out, p, inside)
    tl.store(q_out + out, q, inside)


@triton.jit
def totals(
    p_in, q_in, weight, bias, scale, shift, p_out, q_out, group_p, group_q, groups, per_group, positions, splits,
    scale_row, shift_row, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a (sample, group): p and q of each channel over the splits, and the group's means of gain p and gain q."""
    pid = tl.program_id(0)
    b, first = (pid // groups).to(tl.int64), (pid % groups) * per_group
    start = pid.to(tl.int64) * per_group
    gp, gq = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for done in range(0, per_group, BLOCK_C):
        row = done + tl.arange(0, BLOCK_C)
        inside = row < per_group
        gain, _ = gain_offset(b, first + row, inside, weight, bias, scale, shift, scale_row, shift_row)
        # summed after the loop: Triton 3.6 fails ("loopResult.hasOneUse()") where a sum in an inner loop is used outside twice
        ps, qs = tl.zeros((BLOCK_C, BLOCK), tl.float32), tl.zeros((BLOCK_C, BLOCK), tl.float32)
        for past in range(0, splits, BLOCK):
            split = past + tl.arange(0, BLOCK)
            held = ((start + row) * splits)[:, None] + split[None, :]
            mask = inside[:, None] & (split < splits)[None, :]
            ps += tl.load(p_in + held, mask, other=0.0)
            qs += tl.load(q_in + held, mask, other=0.0)
        p, q = tl.sum(ps, 1), tl.sum(qs, 1)
        tl.store(p_out + start + row, p, inside)
        tl.store(q_out + start + row, q, inside)
        gp += gain * p  # p and q are zero where gain is not masked
        gq += gain * q
    count = per_group * 1.0 * positions  # a size of 1 is Python's int here
    tl.store(group_p + pid, tl.sum(gp, 0) / count)
    tl.store(group_q + pid, tl.sum(gq, 0) / count)


@triton.jit
def apply_backward(
    x, dy, dtotal, weight, bias, scale, shift, mean_in, rstd_in, group_p, group_q, dx, channels, groups, positions,
    xb, xc, xs, yb, yc, ys, scale_row, shift_row, SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    ALL_C: tl.constexpr, ALL_S: tl.constexpr,
):  # fmt: skip
    """One program a tile of channels and positions: dx from the group's means."""
    b, c, s, inside, mask = tile(tl.program_id(0), channels, positions, BLOCK_C, BLOCK_S, ALL_C, ALL_S)
    group = b * groups + c // (channels // groups)
    mean, rstd = tl.load(mean_in + group, inside, other=0.0), tl.load(rstd_in + group, inside, other=0.0)
    p, q = tl.load(group_p + group, inside, other=0.0), tl.load(group_q + group, inside, other=0.0)
    gain, offset = gain_offset(b, c, inside, weight, bias, scale, shift, scale_row, shift_row)
    v = tl.load(x + b * xb + at(c, s, xc, xs), mask, other=0.0).to(tl.float32)
    v = (v - mean[:, None]) * rstd[:, None]
    dz = tl.load(dy + b * yb + at(c, s, yc, ys), mask, other=0.0).to(tl.float32)
    dz = before_activation(dz, v * gain[:, None] + offset[:, None], SILU)
    out = rstd[:, None] * (dz * gain[:, None] - p[:, None] - v * q[:, None])
    if dtotal is not None:
        out += tl.load(dtotal + b * yb + at(c, s, yc, ys), mask, other=0.0).to(tl.float32)
    tl.store(dx + b * yb + at(c, s, yc, ys), out.to(dx.dtype.element_ty), mask)


def on_chip(per_group: int, positions: int, limit: int) -> dict[str, Any] | None:
    """Block sizes and warps of the kernel that reads a group once; None where it does not fit."""
    block_c, block_s = triton.next_power_of_2(per_group), triton.next_power_of_2(positions)
    size = block_c * block_s
    warps = min(max(size // 512, 1), 16)
    if size > limit:
        return None
    return {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": warps, "maxnreg": registers(warps), **FUSED}


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, dtotal: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, p, q): p and q (B, C) are the sums over positions of dz and of dz x_hat; dtotal is added to dx."""
    dx = like(x)
    layout = dx.stride()
    v, out = flat(x), flat(dx)
    given = [None if d is None else flat(torch.empty_strided(x.shape, layout, dtype=d.dtype, device=d.device).copy_(d))
             if d.stride() != layout else flat(d) for d in (dy, dtotal)]  # fmt: skip
    batch, channels, positions = v.shape
    p = torch.empty(batch, channels, dtype=torch.float32, device=x.device)
    q = torch.empty_like(p)  # an op may not return two parts of one tensor
    affine, rows = (norm.weight, norm.bias, norm.scale, norm.shift), norm.rows
    per_group = channels // norm.groups
    strides = (*v.stride(), *out.stride())
    wide = aligned(v, out, *given)
    if blocks := on_chip(per_group, positions, ONE_READ_BACKWARD if wide and v.stride(1) != 1 else ONE_READ_BACKWARD // 2):
        one_read_backward[(batch * norm.groups,)](
            v, *given, *affine, mean, rstd, dx, p, q, norm.groups, per_group, positions, *strides, *rows, SILU=norm.silu,
            **blocks,
        )  # fmt: skip
        return dx, p, q
    cut = Split.of(channels, positions, v.stride(1) == 1)
    grid, blocks = cut.grid(batch, cut.tiles), cut.blocks(wide, all_registers=True)
    space = torch.empty(2, batch, channels, grid[0], dtype=torch.float32, device=x.device)
    group_p, group_q = torch.empty(2, batch, norm.groups, dtype=torch.float32, device=x.device)
    sums[grid](
        v, given[0], *affine, mean, rstd, space[0], space[1], channels, norm.groups, positions, cut.tiles, *strides, *rows,
        SILU=norm.silu, **blocks,
    )  # fmt: skip
    totals[(batch * norm.groups,)](
        space[0], space[1], *affine, p, q, group_p, group_q, norm.groups, per_group, positions, grid[0], *rows, BLOCK_C=8,
        BLOCK=min(triton.next_power_of_2(grid[0]), 64), num_warps=4, maxnreg=registers(4), **FUSED,
    )  # fmt: skip
    apply_backward[cut.grid(batch)](
        v, *given, *affine, mean, rstd, group_p, group_q, dx, channels, norm.groups, positions, *strides, *rows, SILU=norm.silu,
        **blocks,
    )  # fmt: skip
    return dx, p, q
