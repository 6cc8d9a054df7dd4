"""The Triton kernels of attention's backward and their launcher; imported only where triton is.

FlashAttention-2 (Dao 2023, algorithm 2): no score is stored. The weights are made again from q, k and the sums that the forward
left, P = 2^(S - sum). One kernel walks over the keys for each block of queries, one over the queries for each block of keys, so
every sum has a fixed order and there are no atomics. With dP = dO V^T and delta = rowsum(dO O):

    dS = P (dP - delta)     dQ = scale dS K     dK = scale dS^T Q     dV = P^T dO

P and dS are rounded to the tensors' dtype before they are multiplied, as P is in the forward; sums are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import empty, like
from .attention_triton import fits, halves, here, interpreted, laid, parts_of_head, positions_first, product, store
from .tile_triton import FUSED


@triton.jit
def against(a0, a1, b0, b1, D1: tl.constexpr, UPCAST: tl.constexpr):
    """a b^T of two tiles in parts."""
    c = product(a0, tl.trans(b0), UPCAST)
    if D1:
        c += product(a1, tl.trans(b1), UPCAST)
    return c


@triton.jit
def zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """A sum in a head's two parts."""
    x0 = tl.zeros((ROWS, D0), tl.float32)
    x1 = x0
    if D1:
        x1 = tl.zeros((ROWS, D1), tl.float32)
    return x0, x1


@triton.jit
def put(x0, x1, x, rows, steps, end, HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FIRST: tl.constexpr):
    """Stores a sum in parts."""
    store(x0, None, x, rows, tl.arange(0, D0), steps, steps, end, HEAD, FIRST, D0 <= HEAD)
    if D1:
        store(x1, None, x, rows, D0 + tl.arange(0, D1), steps, steps, end, HEAD, FIRST, D0 + D1 <= HEAD)


@triton.jit
def of_queries(
    q, k, v, out, dout, sums, deltas, dq, scale, base_two, heads, queries, keys, q_steps, k_steps, v_steps, out_steps, dout_steps,
    dq_steps, HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program a (sample, head, block of queries): dq, and delta (sample, head, position) for the other kernel."""
    blocks = tl.cdiv(queries, BLOCK_M)
    part, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    q, k, v, dout = here(q, b, h, q_steps), here(k, b, h, k_steps), here(v, b, h, v_steps), here(dout, b, h, dout_steps)
    out, dq = here(out, b, h, out_steps), here(dq, b, h, dq_steps)
    m, n = part * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    place, inside = pair.to(tl.int64) * queries + m, m < queries
    g0, g1 = halves(dout, m, dout_steps, queries, HEAD, D0, D1, FIRST)
    o0, o1 = halves(out, m, out_steps, queries, HEAD, D0, D1, FIRST)
    delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if D1:
        delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    tl.store(deltas + place, delta, inside)
    total = tl.load(sums + place, inside, other=0.0)
    q0, q1 = halves(q, m, q_steps, queries, HEAD, D0, D1, FIRST)
    dq0, dq1 = zeros(BLOCK_M, D0, D1)
    for first in range(0, keys, BLOCK_N):
        k0, k1 = halves(k, first + n, k_steps, keys, HEAD, D0, D1, FIRST)
        v0, v1 = halves(v, first + n, v_steps, keys, HEAD, D0, D1, FIRST)
        p = tl.exp2(tl.fma(against(q0, q1, k0, k1, D1, UPCAST), base_two, -total[:, None]))
        ds = tl.where((first + n < keys)[None, :], p * (against(g0, g1, v0, v1, D1, UPCAST) - delta[:, None]), 0.0)
        ds = ds.to(k.dtype.element_ty)
        dq0 += product(ds, k0, UPCAST)
        if D1:
            dq1 += product(ds, k1, UPCAST)
    put(dq0 * scale, dq1 * scale, dq, m, dq_steps, queries, HEAD, D0, D1, FIRST)


@triton.jit
def of_keys(
    q, k, v, dout, sums, deltas, dk, dv, scale, base_two, heads, queries, keys, q_steps, k_steps, v_steps, dout_steps, dk_steps,
    dv_steps, HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program a (sample, head, block of keys): dk and dv. Tiles of weights stand on their side, keys by queries."""
    blocks = tl.cdiv(keys, BLOCK_N)
    part, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    q, k, v, dout = here(q, b, h, q_steps), here(k, b, h, k_steps), here(v, b, h, v_steps), here(dout, b, h, dout_steps)
    dk, dv = here(dk, b, h, dk_steps), here(dv, b, h, dv_steps)
    sums += pair.to(tl.int64) * queries
    deltas += pair.to(tl.int64) * queries
    m, n = tl.arange(0, BLOCK_M), part * BLOCK_N + tl.arange(0, BLOCK_N)
    k0, k1 = halves(k, n, k_steps, keys, HEAD, D0, D1, FIRST)
    v0, v1 = halves(v, n, v_steps, keys, HEAD, D0, D1, FIRST)
    dk0, dk1 = zeros(BLOCK_N, D0, D1)
    dv0, dv1 = zeros(BLOCK_N, D0, D1)
    for first in range(0, queries, BLOCK_M):
        inside = first + m < queries
        q0, q1 = halves(q, first + m, q_steps, queries, HEAD, D0, D1, FIRST)
        g0, g1 = halves(dout, first + m, dout_steps, queries, HEAD, D0, D1, FIRST)
        total = tl.load(sums + first + m, inside, other=float("inf"))  # weights of queries beyond the last are 0
        delta = tl.load(deltas + first + m, inside, other=0.0)
        p = tl.exp2(tl.fma(against(k0, k1, q0, q1, D1, UPCAST), base_two, -total[None, :]))
        p = tl.where((n < keys)[:, None], p, 0.0)  # finite beyond the last key too
        ds = (p * (against(v0, v1, g0, g1, D1, UPCAST) - delta[None, :])).to(q.dtype.element_ty)
        rounded = p.to(dout.dtype.element_ty)
        dv0 += product(rounded, g0, UPCAST)
        dk0 += product(ds, q0, UPCAST)
        if D1:
            dv1 += product(rounded, g1, UPCAST)
            dk1 += product(ds, q1, UPCAST)
    put(dk0 * scale, dk1 * scale, dk, n, dk_steps, keys, HEAD, D0, D1, FIRST)
    put(dv0, dv1, dv, n, dv_steps, keys, HEAD, D0, D1, FIRST)


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut, for every head."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def options(self, head: int, first: bool) -> dict[str, Any]:
        d0, d1 = parts_of_head(head)
        return {
            "HEAD": head, "D0": d0, "D1": d1, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "FIRST": first,
            "num_warps": self.warps, "num_stages": self.stages, **FUSED,
        }  # fmt: skip


# 64 keys at once spill 8 bytes at a head of 64 on sm_80
OF_QUERIES, OF_KEYS = Blocks(64, 32, 4, 1), Blocks(32, 64, 8, 1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), laid out as `attention.like`; out and sums as `attention_triton.forward` gave them without a residual. The
    contract is `attention.why_not_backward`."""
    batch, heads, queries, head = q.shape
    keys, factor, first = k.shape[2], head**-0.5 if scale is None else scale, positions_first(q, k)
    found = like(q), like(k), like(v)
    dq, dk, dv = made = [x if fits(x, first) else empty(x, first) for x in found]
    q, k, v, out, dout = (laid(x, first) for x in (q, k, v, out, dout))
    deltas = torch.empty_like(sums)
    sizes = (factor, factor * math.log2(math.e), heads, queries, keys)
    upcast = interpreted() and q.dtype == torch.bfloat16
    of_queries[(batch * heads * triton.cdiv(queries, OF_QUERIES.block_m),)](
        q, k, v, out, dout, sums, deltas, dq, *sizes, q.stride(), k.stride(), v.stride(), out.stride(), dout.stride(),
        dq.stride(), UPCAST=upcast, **OF_QUERIES.options(head, first),
    )  # fmt: skip
    of_keys[(batch * heads * triton.cdiv(keys, OF_KEYS.block_n),)](
        q, k, v, dout, sums, deltas, dk, dv, *sizes, q.stride(), k.stride(), v.stride(), dout.stride(), dk.stride(),
        dv.stride(), UPCAST=upcast, **OF_KEYS.options(head, first),
    )  # fmt: skip
    dq, dk, dv = (x if x is y else y.copy_(x) for x, y in zip(made, found, strict=True))
    return dq, dk, dv
