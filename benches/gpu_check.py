"""Every op on the GPU against float64, forward and backward, beside torch's own error in the same dtype."""

from __future__ import annotations

import itertools
import sys
import traceback

import torch
from gpu_record import keep, show, start

from fastdiff.kernels import group_norm as m

SHAPES = [(2, 320, 64, 64), (1, 1280, 8, 8), (3, 64, 28, 28), (2, 6, 7, 5), (1, 128, 256, 256), (1, 32, 5, 40, 40), (4, 96)]
LIMIT = 2.0  # times torch's own error, plus 4 units of rounding at the largest value


def inputs(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> tuple[torch.Tensor, ...]:
    """x, a residual and a gradient, then weight, bias, scale and shift."""
    random = torch.Generator("cuda").manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return (2 * torch.randn(size, generator=random, device="cuda") + 1).to(dtype)

    whole = [draw(*shape) for _ in range(3)]
    if channels_last:
        whole = [v.to(memory_format=torch.channels_last if v.ndim == 4 else torch.channels_last_3d) for v in whole]
    return *whole, draw(shape[1]), draw(shape[1]), draw(*shape[:2]), draw(*shape[:2])


def errors(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> dict[str, float]:
    """Ours over what is allowed, output by output: at most 1."""
    x, residual, dy, weight, bias, scale, shift = inputs(shape, dtype, channels_last)
    groups = 2 if shape[1] % 32 else 32
    norm = m.Norm(groups, weight, bias, 1e-5, scale, shift, True)
    if reason := m.why_not(x, norm):
        raise RuntimeError(f"the kernels did not run: {reason}")
    wide = m.Norm(groups, weight.double(), bias.double(), 1e-5, scale.double(), shift.double(), True)
    y, total, mean, rstd = torch.ops.fastdiff.add_group_norm(x, residual, groups, weight, bias, 1e-5, scale, shift, True)
    again = torch.ops.fastdiff.add_group_norm(x, residual, groups, weight, bias, 1e-5, scale, shift, True)
    if not all(torch.equal(a, b) for a, b in zip((y, total, mean, rstd), again, strict=True)):
        raise RuntimeError("two runs differ")
    if not torch.equal(total, x + residual):
        raise RuntimeError("the returned sum is not x + residual")
    exact = m.statistics(total.double(), wide)
    got = torch.ops.fastdiff.group_norm_backward(dy, total, mean, rstd, groups, weight, bias, 1e-5, scale, shift, True, None)
    own = m.backward_reference(dy, total, *m.statistics(total, norm), norm)
    want = m.backward_reference(dy.double(), total.double(), *exact, wide)
    triples = {"y": (y, m.reference(total, norm), m.reference(total.double(), wide))}
    triples |= {name: v for name, *v in zip(("dx", "p", "q"), got, own, want, strict=True)}
    return {name: ratio(*v) for name, v in triples.items()}


def ratio(ours: torch.Tensor, torchs: torch.Tensor, right: torch.Tensor) -> float:
    unit = torch.finfo(ours.dtype).eps * right.abs().max()
    allowed = LIMIT * (torchs.double() - right).abs().max() + 4 * unit
    return ((ours.double() - right).abs().max() / allowed).item()


def main() -> None:
    start()
    rows = []
    for shape, dtype, last in itertools.product(SHAPES, (torch.float32, torch.float16, torch.bfloat16), (False, True)):
        if last and len(shape) < 4:
            continue
        row = {"shape": "x".join(map(str, shape)), "dtype": str(dtype)[6:], "layout": "nhwc" if last else "nchw"}
        try:
            found = errors(shape, dtype, last)
            row |= {**found, "ok": all(v <= 1 for v in found.values())}
        except Exception as e:  # the next case may still say something
            traceback.print_exc()
            row |= {"ok": False, "problem": f"{type(e).__name__}: {e}"[:200]}
        rows.append(row)
    show(rows)
    keep("check", rows)
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
