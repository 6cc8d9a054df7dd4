"""The Triton kernel of attention and its launcher; imported only where triton is.

A program takes one block of queries of one head and walks over the keys with a running maximum and sum (Milakov and Gimelshein
2018, algorithm 3; Dao et al. 2022), or, where they are few, takes them at once. A head that is no power of two is cut into two
parts that are, and so are a few keys: 80 = 64 + 16, 160 = 128 + 32, 77 keys 64 + 16; 40 is 32 + 16, half of the 16 empty, since
tensor cores sum over 16 at least. Scores, softmax and sums are float32; the softmax's weights are rounded to v's dtype before
they meet v, as torch does.

Block sizes depend on one sample's shape alone, so a sample's result is bit-equal alone and among others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import EACH, empty, like, side_by_side, sums_like
from .tile_triton import FUSED, existing, parts, registers

# Keys taken at once, by the width that a head takes on chip. More spill, where positions lie side by side: 128 keys of a head of
# 128 up to 160 bytes on sm_90, 80 of a head of 160 56 bytes on sm_80.
SINGLE = {16: 128, 32: 128, 48: 128, 64: 128, 80: 80, 96: 128, 128: 80, 144: 80, 160: 64}
SMALLEST = 1e-30  # of a scale: float32 holds it, and every weight is then 1, of scores up to 1e28


@triton.jit
def multiple(n):
    """n, which the launcher saw to be a multiple of 8, so that the compiler sees it too."""
    return n // 8 * 8


@triton.jit
def here(x, b, h, steps):
    """Where a sample's head begins."""
    return x + multiple(b * steps[0] + h * steps[1])


@triton.jit
def places(x, rows, columns, steps, FIRST: tl.constexpr):
    """Of positions by elements of a head. Steps are added to the pointer one after the other: their sum in 32 bits first spills
    (160 bytes at a head of 80 on sm_80)."""
    if FIRST:
        return x + rows[:, None] + columns[None, :] * multiple(steps[3])
    return x + rows[:, None] * multiple(steps[2]) + columns[None, :]


@triton.jit
def load(
    x, rows, columns, steps, end, HEAD: tl.constexpr, FIRST: tl.constexpr, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr
):
    """A tile, 0 outside; FIRST: positions lie side by side, and their number is a multiple of 8."""
    mask = existing(rows, columns, multiple(end) if FIRST else end, HEAD, ALL_ROWS, ALL_COLUMNS)
    return tl.load(places(x, rows, columns, steps, FIRST), mask, other=0.0)


@triton.jit
def halves(x, rows, steps, end, HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FIRST: tl.constexpr):
    """A tile in its head's two parts; with one part, that twice."""
    x0 = load(x, rows, tl.arange(0, D0), steps, end, HEAD, FIRST, False, D0 <= HEAD)
    x1 = x0
    if D1:
        x1 = load(x, rows, D0 + tl.arange(0, D1), steps, end, HEAD, FIRST, False, D0 + D1 <= HEAD)
    return x0, x1


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """a b in float32. The interpreter cannot multiply bfloat16: UPCAST, never set on a GPU, widens what was rounded before."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32)) if UPCAST else tl.dot(a, b)


@triton.jit
def scores(
    q0, q1, k, n, steps, keys, HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FIRST: tl.constexpr,
    ALL_KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """q k^T against keys n; -inf beyond the last."""
    s = product(q0, tl.trans(load(k, n, tl.arange(0, D0), steps, keys, HEAD, FIRST, ALL_KEYS, D0 <= HEAD)), UPCAST)
    if D1:
        k1 = load(k, n, D0 + tl.arange(0, D1), steps, keys, HEAD, FIRST, ALL_KEYS, D0 + D1 <= HEAD)
        s += product(q1, tl.trans(k1), UPCAST)
    return s if ALL_KEYS else tl.where((n < keys)[None, :], s, float("-inf"))


@triton.jit
def weighted(
    p, v, n, steps, keys, HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FIRST: tl.constexpr, ALL_KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """p v, in the head's two parts."""
    p = p.to(v.dtype.element_ty)
    out0 = product(p, load(v, n, tl.arange(0, D0), steps, keys, HEAD, FIRST, ALL_KEYS, D0 <= HEAD), UPCAST)
    out1 = out0
    if D1:
        out1 = product(p, load(v, n, D0 + tl.arange(0, D1), steps, keys, HEAD, FIRST, ALL_KEYS, D0 + D1 <= HEAD), UPCAST)
    return out0, out1


@triton.jit
def store(
    value, residual, out, m, d, residual_steps, steps, queries, HEAD: tl.constexpr, FIRST: tl.constexpr, WHOLE: tl.constexpr
):
    """A part of the result, the residual added; WHOLE where no element lies outside the head."""
    if residual is not None:
        value += load(residual, m, d, residual_steps, queries, HEAD, FIRST, False, WHOLE).to(tl.float32)
    inside = existing(m, d, multiple(queries) if FIRST else queries, HEAD, False, WHOLE)
    tl.store(places(out, m, d, steps, FIRST), value.to(out.dtype.element_ty), inside)


@triton.jit
def attend(
    q, k, v, residual, out, sums, scale, heads, queries, keys, q_steps, k_steps, v_steps, residual_steps, out_steps,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr,
    SINGLE: tl.constexpr, ALL_KEYS: tl.constexpr, FIRST: tl.constexpr, NEGATIVE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program a (sample, head, block of queries); sums (sample, head, position) gets log2 of a query's sum. Steps are
    strides over (sample, head, position, element); scale is in powers of two, log2(e) times softmax's, and without its sign: it
    meets a score in the one instruction that takes the maximum off."""
    blocks = tl.cdiv(queries, BLOCK_M)
    part, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    q, k, v, out = here(q, b, h, q_steps), here(k, b, h, k_steps), here(v, b, h, v_steps), here(out, b, h, out_steps)
    if residual is not None:
        residual = here(residual, b, h, residual_steps)
    m, n = part * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    q0, q1 = halves(q, m, q_steps, queries, HEAD, D0, D1, FIRST)
    if NEGATIVE:
        q0, q1 = -q0, -q1
    if SINGLE:
        s = scores(q0, q1, k, n, k_steps, keys, HEAD, D0, D1, FIRST, ALL_KEYS or REST > 0, UPCAST)
        highest, rest_n, s_rest = tl.max(s, 1), n, s
        if REST:
            rest_n = BLOCK_N + tl.arange(0, REST)
            s_rest = scores(q0, q1, k, rest_n, k_steps, keys, HEAD, D0, D1, FIRST, ALL_KEYS, UPCAST)
            highest = tl.maximum(highest, tl.max(s_rest, 1))
        highest *= scale
        p = tl.exp2(tl.fma(s, scale, -highest[:, None]))
        total = tl.sum(p, 1)
        out0, out1 = weighted(p, v, n, v_steps, keys, HEAD, D0, D1, FIRST, ALL_KEYS or REST > 0, UPCAST)
        if REST:
            p = tl.exp2(tl.fma(s_rest, scale, -highest[:, None]))
            total += tl.sum(p, 1)
            more0, more1 = weighted(p, v, rest_n, v_steps, keys, HEAD, D0, D1, FIRST, ALL_KEYS, UPCAST)
            out0 += more0
            if D1:
                out1 += more1
    else:
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        out0 = tl.zeros((BLOCK_M, D0), tl.float32)
        out1 = out0
        if D1:
            out1 = tl.zeros((BLOCK_M, D1), tl.float32)
        for first in range(0, keys, BLOCK_N):
            s = scores(q0, q1, k, first + n, k_steps, keys, HEAD, D0, D1, FIRST, ALL_KEYS, UPCAST)
            higher = tl.maximum(highest, tl.max(s, 1) * scale)  # finite where scores are: every block holds a key
            p = tl.exp2(tl.fma(s, scale, -higher[:, None]))
            fade = tl.exp2(highest - higher)
            total = tl.fma(total, fade, tl.sum(p, 1))
            more0, more1 = weighted(p, v, first + n, v_steps, keys, HEAD, D0, D1, FIRST, ALL_KEYS, UPCAST)
            out0 = out0 * fade[:, None] + more0
            if D1:
                out1 = out1 * fade[:, None] + more1
            highest = higher
    if sums is not None:
        tl.store(sums + pair.to(tl.int64) * queries + m, highest + tl.log2(total), m < queries)
    store(out0 / total[:, None], residual, out, m, tl.arange(0, D0), residual_steps, out_steps, queries, HEAD, FIRST, D0 <= HEAD)
    if D1:
        d1 = D0 + tl.arange(0, D1)
        store(out1 / total[:, None], residual, out, m, d1, residual_steps, out_steps, queries, HEAD, FIRST, D0 + D1 <= HEAD)


def parts_of_head(head: int) -> tuple[int, int]:
    """Tensor cores sum over 16 at least. Above 160 as one: 128 and 64 spill on sm_80 (56 bytes)."""
    return parts(head, 16) if head <= 160 else (triton.next_power_of_2(head), 0)


@dataclass(frozen=True)
class Blocks:
    """How a head's attention is cut; from one sample's shape alone. Keys that fill their tiles need not be masked."""

    block_m: int
    block_n: int
    rest: int  # keys of a second tile, where all are taken at once
    single: bool
    all_keys: bool
    warps: int
    stages: int

    @classmethod
    def of(cls, head: int, queries: int, keys: int) -> Blocks:
        width = sum(parts_of_head(head))
        if keys <= SINGLE.get(width, 0):
            n, rest = parts(keys, 16)
            # 4 warps: 72 bytes on sm_100, channels first
            return cls(64, n, rest, True, keys == n + rest, 8 if width == n + rest == 64 else 4, 1)
        block_m, block_n, warps = cls.looping(width, queries, keys)
        return cls(block_m, block_n, 0, False, keys % block_n == 0, warps, 2)

    @staticmethod
    def looping(width: int, queries: int, keys: int) -> tuple[int, int, int]:
        """(queries, keys, warps) of a program that walks over the keys."""
        if width > 128:
            return 64, 32, 4 if width == 160 else 8  # 144 by 4 warps and 160 by 8: 8 and 16 bytes on sm_80
        # 80: 8 bytes on sm_100; 128 with masks: 32 bytes on sm_80
        if queries >= 2048 and width != 80 and (width < 128 or keys % 64 == 0):
            return 128, 64, 8
        return 64, 32 if width < 64 else 64, 4  # 64 keys of a head of 24: 48 bytes on sm_100, of 40: 8

    def options(self, head: int, first: bool) -> dict[str, Any]:
        d0, d1 = parts_of_head(head)
        return {
            "HEAD": head, "D0": d0, "D1": d1, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "REST": self.rest,
            "SINGLE": self.single, "ALL_KEYS": self.all_keys, "FIRST": first, "num_warps": self.warps, "num_stages": self.stages,
            "maxnreg": registers(self.warps) if first or not (self.single or self.all_keys) else None, **FUSED,
        }  # fmt: skip


def interpreted() -> bool:
    """Whether Triton interprets the kernel here."""
    return not isinstance(attend, triton.JITFunction)


def fits(x: Tensor, first: bool) -> bool:
    """Whether x has its positions side by side (`first`) or its elements, and a kernel may load 16 bytes of it at a time."""
    inner = 2 if first else 3
    steps = [x.stride(i) for i in range(4) if i != inner and x.shape[i] > 1]
    return x.stride(inner) == 1 and x.data_ptr() % 16 == 0 and all(step % EACH == 0 for step in steps)


def laid(x: Tensor, first: bool) -> Tensor:
    """x, or a copy that `fits`."""
    return x if fits(x, first) else empty(x, first).copy_(x)


def positions_first(q: Tensor, k: Tensor) -> bool:
    """Whether a kernel reads and writes positions side by side, as q has them: where their numbers are multiples of 16 bytes."""
    return side_by_side(q) and q.shape[2] % EACH == 0 and k.shape[2] % EACH == 0


def forward(q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v + residual, laid out as `attention.like`; and the sums that `attention.sums_like` makes room for.
    The contract is `attention.why_not`."""
    batch, heads, queries, head = q.shape
    out, sums, first = like(q), sums_like(q, True), positions_first(q, k)
    made = out if fits(out, first) else empty(q, first)
    q, k, v = (laid(x, first) for x in (q, k, v))
    residual = None if residual is None else laid(residual, first)
    cut = Blocks.of(head, queries, k.shape[2])
    base_two = (head**-0.5 if scale is None else scale) * math.log2(math.e)
    size = max(abs(base_two), SMALLEST)  # times -inf, 0 would be NaN
    attend[(batch * heads * triton.cdiv(queries, cut.block_m),)](
        q, k, v, residual, made, sums if sums.ndim == 3 else None, size, heads, queries, k.shape[2], q.stride(), k.stride(),
        v.stride(), (0, 0, 0, 0) if residual is None else residual.stride(), made.stride(), NEGATIVE=base_two < 0,
        UPCAST=interpreted() and q.dtype == torch.bfloat16, **cut.options(head, first),
    )  # fmt: skip
    return out if made is out else out.copy_(made), sums
