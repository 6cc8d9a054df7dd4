"""Sampling loops written by hand, one a method: what fastdiff's one loop is compared with.

Weights as Python floats, in place wherever nobody else reads the tensor, the ramp by `if`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastdiff.plans import Plan
from fastdiff.prediction import coefficients

Network = Callable[..., Tensor]


def hand_one(network: Network, x: Tensor, table: Iterable[Any]) -> Tensor:
    batch, device = x.shape[0], x.device
    for t, skip, out, a, (b0,) in table:
        d = (x * skip).add_(network(x, torch.full((batch,), t, device=device)), alpha=out)
        x.mul_(a).add_(d, alpha=b0)
    return x


def hand_two(network: Network, x: Tensor, table: Iterable[Any]) -> Tensor:
    batch, device, d1 = x.shape[0], x.device, None
    for t, skip, out, a, (b0, b1) in table:
        d = (x * skip).add_(network(x, torch.full((batch,), t, device=device)), alpha=out)
        x.mul_(a).add_(d, alpha=b0)
        if b1:
            x.add_(d1, alpha=b1)
        d1 = d
    return x


def hand_three(network: Network, x: Tensor, table: Iterable[Any]) -> Tensor:
    batch, device, d1, d2 = x.shape[0], x.device, None, None
    for t, skip, out, a, (b0, b1, b2) in table:
        d = (x * skip).add_(network(x, torch.full((batch,), t, device=device)), alpha=out)
        x.mul_(a).add_(d, alpha=b0)
        if b1:
            x.add_(d1, alpha=b1)
        if b2:
            x.add_(d2, alpha=b2)
        d2, d1 = d1, d
    return x


def hand_lms(network: Network, x: Tensor, table: Iterable[Any]) -> Tensor:
    batch, device, e1, e2, e3 = x.shape[0], x.device, None, None, None
    for t, skip, out, p, q, a, (b0, b1, b2, b3) in table:
        d = (x * skip).add_(network(x, torch.full((batch,), t, device=device)), alpha=out)
        e = (x * p).add_(d, alpha=q)
        x.mul_(a).add_(e, alpha=b0)
        if b1:
            x.add_(e1, alpha=b1)
        if b2:
            x.add_(e2, alpha=b2)
        if b3:
            x.add_(e3, alpha=b3)
        e3, e2, e1 = e2, e1, e
    return x


def hand_unipc(network: Network, x: Tensor, table: Iterable[Any]) -> Tensor:
    """Corrects the base in place, then predicts from it."""
    batch, device, base, d1, d2, d3 = x.shape[0], x.device, x, None, None, None
    for t, skip, out, ca, (c0, c1, c2, c3), a, (b0, b1, b2) in table:
        d = (x * skip).add_(network(x, torch.full((batch,), t, device=device)), alpha=out)
        if c0:
            base.mul_(ca).add_(d, alpha=c0).add_(d1, alpha=c1)
            if c2:
                base.add_(d2, alpha=c2)
            if c3:
                base.add_(d3, alpha=c3)
        x = (base * a).add_(d, alpha=b0)
        if b1:
            x.add_(d1, alpha=b1)
        if b2:
            x.add_(d2, alpha=b2)
        d3, d2, d1 = d2, d1, d
    return x


def hand_heun(network: Network, x: Tensor, table: Iterable[Any]) -> Tensor:
    batch, device = x.shape[0], x.device
    for (t, skip, out, a, (b0, _)), second in table:
        d = (x * skip).add_(network(x, torch.full((batch,), t, device=device)), alpha=out)
        if second is None:
            x.mul_(a).add_(d, alpha=b0)
            continue
        y = (x * a).add_(d, alpha=b0)
        t, skip, out, a, (b0, b1) = second
        d1 = d
        d = (y * skip).add_(network(y, torch.full((batch,), t, device=device)), alpha=out)
        x.mul_(a).add_(d, alpha=b0).add_(d1, alpha=b1)
    return x


HAND = {
    "ddim": hand_one, "dpmpp-2m": hand_two, "dpmpp-3m": hand_three, "unipc-2": hand_unipc, "unipc-3": hand_unipc,
    "lms-4": hand_lms, "heun": hand_heun,
}  # fmt: skip


def tables(plan: Plan, prediction: str) -> list[Any]:
    """The numbers of a hand-written loop, from the plan's: (t, c_skip, c_out, weights...) a row, all Python floats."""
    kind = HAND[plan.name]
    width = {hand_one: 1, hand_two: 2, hand_three: 3, hand_lms: 4, hand_unipc: 4, hand_heun: 2}[kind]

    def padded(h: tuple[float, ...], size: int = width) -> tuple[float, ...]:
        return (*h, *(0.0,) * (size - len(h)))

    rows: list[Any] = []
    for row in plan.rows:
        c = coefficients(prediction, row.alpha, row.sigma)
        head = (row.t, c.c_skip, c.c_out)
        if kind is hand_lms:
            rows.append((*head, *row.store[0], row.next.x, padded(row.next.h)))
        elif kind is hand_unipc:
            a = row.next.x / row.base.x
            predict = tuple(n - a * b for n, b in zip(padded(row.next.h), padded(row.base.h), strict=True))
            order = max(1, sum(abs(w) > 1e-12 for w in predict))  # what is left of a zero after the subtraction
            rows.append((*head, row.base.x, padded(row.base.h), a, padded(predict[:order], 3)))
        else:
            rows.append((*head, row.next.x, padded(row.next.h)))
    if kind is not hand_heun:
        return rows
    steps, i = [], 0
    while i < len(rows):
        two = plan.rows[i].next != plan.rows[i].base
        steps.append((rows[i], rows[i + 1] if two else None))
        i += 1 + two
    return steps
