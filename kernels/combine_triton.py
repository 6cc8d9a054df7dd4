"""The Triton kernel of the sampler's update and its launcher; imported only where triton is.

A program takes one block of one sample: it loads every input once, makes the noise in registers, and stores every output once.
Elements are independent and nothing depends on the batch size: a sample's result is bit-equal alone and among others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile_triton import FUSED

WARPS = 4


def block(inputs: int) -> int:
    """Elements of a program: 4 a thread, one 16-byte load of float32, while that fits in registers. 16 inputs of which none is
    aligned spill 16 bytes (sm_100, float16), so beyond 12, more than fastdiff's solvers take, it is 2."""
    return 512 if inputs <= 12 else 256


@triton.jit
def cos_sin(angle):
    """Of an angle in [0, 2 pi), to 1 unit in the last place: the quarter turn taken off in two parts, then Cephes' polynomials.

    libdevice's functions reduce any angle, for which they keep 32 bytes of stack a thread.
    """
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = tl.fma(turns, -1.5707963705062866, angle)
    r = tl.fma(turns, 4.371138828673793e-08, r)
    z = r * r
    s = tl.fma(tl.fma(tl.fma(z, -1.9515295891e-4, 8.3321608736e-3), z, -1.6666654611e-1) * z, r, r)
    c = tl.fma(tl.fma(z, 2.443315711809948e-5, -1.388731625493765e-3), z, 4.166664568298827e-2)
    c = tl.fma(c, z * z, tl.fma(z, -0.5, 1.0))
    quarter = turns.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def box_muller(a, b):
    """Two unit normals of two 32-bit words, as fastdiff.philox makes them: 24 bits of each."""
    u = ((a >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    angle = (b >> 8).to(tl.float32) * 5.9604644775390625e-08 * 6.2831854820251465
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    cos, sin = cos_sin(angle)
    return radius * cos, radius * sin


@triton.jit
def noise(seed, counter, draw):
    """Four unit normals a counter, side by side."""
    zero = counter * 0
    a, b, c, d = tl.philox(seed, counter, zero, zero + draw, zero)
    first, second = box_muller(a, b)
    third, fourth = box_muller(c, d)
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


# Else draw 1 and every 16th, and rows whose weights begin at 16 bytes of the plan's table, would be kernels of their own.
@triton.jit(do_not_specialize=["draw"], do_not_specialize_on_alignment=["weights"])
def rows(inputs, strides, outputs, weights, seeds, size, draw, BLOCK: tl.constexpr):
    """`inputs` and `outputs` are tuples of pointers; `strides` are the inputs' elements from one sample to the next."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK)
    b, part = (pid // blocks).to(tl.int64), pid % blocks
    i = part * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    values = ()
    for k in tl.static_range(len(inputs)):
        values += (tl.load(inputs[k] + b * strides[k] + i, inside, other=0.0).to(tl.float32),)
    if seeds is not None:
        values += (noise(tl.load(seeds + b), part * (BLOCK // 4) + tl.arange(0, BLOCK // 4), draw),)
    for j in tl.static_range(len(outputs)):
        total = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(len(values)):
            total = tl.fma(values[k], tl.load(weights + j * len(values) + k), total)
        tl.store(outputs[j] + b * size + i, total, inside)


def forward(inputs: Sequence[Tensor], weights: Tensor, seeds: Tensor | None, draw: int) -> list[Tensor]:
    """One float32 tensor a row of the weights. The contract is `combine.why_not`; an input whose samples are not contiguous is
    copied first."""
    dense = [x if x[0].is_contiguous() else x.contiguous() for x in inputs]
    weights, seeds = weights.float().contiguous(), None if seeds is None else seeds.contiguous()
    made = [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in dense[:1] * len(weights)]
    size = dense[0][0].numel()
    strides = tuple(x.stride(0) for x in dense)
    elements = block(len(dense))
    grid = (len(dense[0]) * triton.cdiv(size, elements),)
    rows[grid](tuple(dense), strides, tuple(made), weights, seeds, size, draw, BLOCK=elements, num_warps=WARPS, **FUSED)
    return made
