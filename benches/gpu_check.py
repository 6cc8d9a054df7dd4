"""Every op on the GPU against float64, forward and backward, beside torch's own error in the same dtype."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from gpu_record import Row, show
from gpu_stage import Case, Stage
from gpu_timing import DEVICE

from fastdiff.kernels import attention as a
from fastdiff.kernels import combine as c
from fastdiff.kernels import group_norm as m
from fastdiff.philox import normals, seed_bits

SHAPES = [(2, 320, 64, 64), (1, 1280, 8, 8), (3, 64, 28, 28), (2, 6, 7, 5), (1, 128, 256, 256), (1, 32, 5, 40, 40), (4, 96)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# batch, heads, queries, keys, head
ATTENTIONS = [
    (2, 8, 4096, 4096, 40), (2, 8, 1024, 77, 80), (1, 8, 256, 256, 160), (2, 4, 64, 64, 64), (1, 3, 1001, 333, 72),
    (2, 2, 100, 100, 8), (1, 2, 300, 300, 256), (1, 2, 128, 128, 128), (3, 5, 17, 5, 96),
]  # fmt: skip
ROWS = [((1, 4, 64, 64), 4, 2), ((16, 3, 32, 32), 12, 5), ((3, 1, 7, 9), 16, 8)]  # shape, inputs, outputs
VALUES = ("y", "embedded", "noise", "dx", "p", "q", "dq", "dk", "dv")
LIMIT = 2.0  # times torch's own error, plus 4 units of rounding at the largest value


@cache
def random() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


def draw(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return (2 * torch.randn(size, generator=random(), device=DEVICE) + 1).to(dtype)


def ratio(ours: torch.Tensor, torchs: torch.Tensor, right: torch.Tensor) -> float:
    """Our error over what is allowed: at most 1."""
    unit = torch.finfo(ours.dtype).eps * right.abs().max()
    allowed = LIMIT * (torchs.double() - right).abs().max() + 4 * unit
    return ((ours.double() - right).abs().max() / allowed).item()


def same(*pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    if not all(torch.equal(x, y) for x, y in pairs):
        raise RuntimeError("two runs differ")


def runs(reason: str | None) -> None:
    if reason:
        raise RuntimeError(f"the kernels did not run: {reason}")


def group_norm(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> dict[str, float]:
    x, residual, dy = (draw(*shape, dtype=dtype) for _ in range(3))
    if channels_last:
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        x, residual, dy = (v.to(memory_format=last) for v in (x, residual, dy))
    weight, bias, scale, shift = (draw(*s, dtype=dtype) for s in (shape[1:2], shape[1:2], shape[:2], shape[:2]))
    groups = 2 if shape[1] % 32 else 32
    norm = m.Norm(groups, weight, bias, 1e-5, scale, shift, True)
    runs(m.why_not(x, norm))
    wide = m.Norm(groups, weight.double(), bias.double(), 1e-5, scale.double(), shift.double(), True)
    y, total, mean, rstd = torch.ops.fastdiff.add_group_norm(x, residual, groups, weight, bias, 1e-5, scale, shift, True)
    again = torch.ops.fastdiff.add_group_norm(x, residual, groups, weight, bias, 1e-5, scale, shift, True)
    same(*zip((y, total, mean, rstd), again, strict=True))
    if not torch.equal(total, x + residual):
        raise RuntimeError("the returned sum is not x + residual")
    exact = m.statistics(total.double(), wide)
    got = torch.ops.fastdiff.group_norm_backward(dy, total, mean, rstd, groups, weight, bias, 1e-5, scale, shift, True, None)
    own = m.backward_reference(dy, total, *m.statistics(total, norm), norm)
    want = m.backward_reference(dy.double(), total.double(), *exact, wide)
    triples = {"y": (y, m.reference(total, norm), m.reference(total.double(), wide))}
    triples |= {name: v for name, *v in zip(("dx", "p", "q"), got, own, want, strict=True)}
    embedded, embedded_wide = norm._replace(added=shift), wide._replace(added=wide.shift)
    z = torch.ops.fastdiff.group_norm(x, *embedded)[0]
    triples["embedded"] = z, m.reference(x, embedded), m.reference(x.double(), embedded_wide)
    return {name: ratio(*v) for name, v in triples.items()}


def attention(size: tuple[int, ...], dtype: torch.dtype, channels_first: bool) -> dict[str, float]:
    """q, k and v as views of fused projections, in rows or in columns."""
    batch, heads, queries, keys, head = size

    def part(length: int) -> torch.Tensor:
        if channels_first:
            return draw(batch, heads, head, length, dtype=dtype).transpose(-1, -2)
        return draw(batch, length, heads, head, dtype=dtype).transpose(1, 2)

    q, k, v, residual = (part(n) for n in (queries, keys, keys, queries))
    runs(a.why_not(q, k, v))
    op = torch.ops.fastdiff.attention
    y = op(q, k, v, residual, None)[0]
    same((y, op(q, k, v, residual, None)[0]))
    same((y[-1:], op(q[-1:], k[-1:], v[-1:], residual[-1:], None)[0]))  # whatever stands beside it
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = a.reference(q.double(), k.double(), v.double(), residual.double())
        own = a.reference(q, k, v, residual)
        found = {"y": ratio(y, own, exact)}
        if head > a.BACKWARD:
            return found
        right = torchs_gradients(*(x.double() for x in (q, k, v, residual)))
        torchs = torchs_gradients(q, k, v, residual)
    given = (residual, q, k, v, *op(q, k, v, None, None), None)
    got = torch.ops.fastdiff.attention_backward(*given)
    same(*zip(got, torch.ops.fastdiff.attention_backward(*given), strict=True))
    return found | {name: ratio(*three) for name, *three in zip(("dq", "dk", "dv"), got, torchs, right, strict=True)}


def torchs_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(a.reference(*leaves), leaves, dout)


def combine(shape: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, float]:
    """Sums against float64; the noise of the kernel against torch's, of which 1e-6 is allowed."""
    columns = [draw(*shape, dtype=torch.float32 if i % 2 else dtype) for i in range(inputs)]
    weights = draw(outputs, inputs + 1, dtype=torch.float32)
    seeds = seed_bits(range(2**64 - shape[0], 2**64), DEVICE)
    runs(c.why_not(columns))
    got = torch.stack(torch.ops.fastdiff.combine(columns, weights, seeds, 3))
    same((got, torch.stack(torch.ops.fastdiff.combine(columns, weights, seeds, 3))))
    z = normals(seeds, 3, columns[0][0].numel()).view(shape)
    own = torch.stack(c.reference(columns, weights, seeds, 3))
    exact = torch.einsum("ji,i...->j...", weights.double(), torch.stack([x.double() for x in [*columns, z]]))
    only = torch.zeros(1, 2, device=DEVICE)
    only[0, 1] = 1
    noise = torch.ops.fastdiff.combine([columns[1]], only, seeds, 3)[0]
    return {"y": ratio(got, own, exact), "noise": ((noise - z).abs().max() / 1e-6).item()}


def checked(check: Callable[..., dict[str, float]], *given: Any) -> Row:
    found = check(*given)
    wrong = [name for name, v in found.items() if not v <= 1]  # NaN is wrong
    return {**found, **({"problem": f"{', '.join(wrong)} further away than allowed"} if wrong else {})}


def cases() -> Iterator[Case]:
    """Small ones first: what is wrong is mostly wrong there too."""
    torch.backends.cuda.matmul.allow_tf32 = False

    def case(check: Callable[..., dict[str, float]], shape: Any, dtype: torch.dtype, layout: str, *given: Any) -> Case:
        about = {"op": check.__name__, "shape": "x".join(map(str, shape)), "dtype": str(dtype)[6:], "layout": layout}
        return Case(about, partial(checked, check, *given))

    for (shape, inputs, outputs), dtype in itertools.product(ROWS, DTYPES):
        yield case(combine, shape, dtype, f"{inputs} to {outputs}", shape, inputs, outputs, dtype)
    for shape, dtype, last in itertools.product(SHAPES, DTYPES, (False, True)):
        if not last or len(shape) > 3:
            yield case(group_norm, shape, dtype, "nhwc" if last else "nchw", shape, dtype, last)
    for size, dtype, first in itertools.product(ATTENTIONS, a.DTYPES, (False, True)):
        yield case(attention, size, dtype, "columns" if first else "rows", size, dtype, first)


def digest(rows: Sequence[Row]) -> None:
    """What failed, and the largest error of each op and dtype, 1 being what is allowed."""
    show([row for row in rows if "problem" in row])
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["op"], row["dtype"]), []).extend(row[name] for name in VALUES if name in row)
    show([{"op": op, "dtype": dtype, "values": len(v), "worst": max(v, default=0.0)} for (op, dtype), v in found.items()])


stage = Stage("check", lambda: list(cases()), seconds=200, show=digest, timed=False)

if __name__ == "__main__":
    sys.exit(stage.main())
