"""The whole sampler at 8 network calls with guidance, and its update alone: rows as one op against torch's operations.

`update`: microseconds a row of the update without a network, at the states of pixel and latent models. `sample`: milliseconds of
`fd.sample` with torch's operations throughout, with our kernels, and how far the two samples lie apart.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from gpu_networks import NETWORKS, plain, prepared
from gpu_record import Row
from gpu_stage import Case, Stage
from gpu_timing import DEVICE, launched

import fastdiff as fd
from fastdiff import sampling
from fastdiff.sampling import begin, run

NFE, SCALE = 8, 3.0
STATES = [(1, 4, 64, 64), (8, 4, 64, 64), (64, 4, 64, 64), (16, 3, 256, 256)]
SOLVERS = ("dpmpp-2m", "unipc-3", "dpmpp-2m-sde")
BATCHES = (1, 8, 64)
ALLOWED = 1e-5  # of the largest value, between two updates in float32


def by_torch() -> Any:
    """The loop that writes every term of every row, as on the CPU."""
    return patch.object(sampling, "by_rows", lambda x: False)


def guided(network: Callable[..., Any], shape: tuple[int, ...]) -> fd.Denoiser:
    """Two calls an evaluation, their difference scaled; both conditions are empty, since these networks hold theirs."""
    den = fd.Denoiser(network, fd.schedule.vp_cosine(), "eps", shape=shape)
    return fd.guide.cfg(den, SCALE, cond={}, negative={}, batched=True)


@torch.no_grad()
def update(shape: tuple[int, ...], solver: str) -> Row:
    """A network that returns what it has at hand: all that is left is the update, the guidance and the conversion."""
    batch, *sample = shape
    kept = torch.randn(2 * batch, *sample, dtype=torch.bfloat16, device=DEVICE)
    den = guided(lambda x, t: kept, tuple(sample))
    plan = fd.plan(solver, den.schedule, NFE, grid="uniform_t")
    state, source = begin(den, plan, None, range(batch), None, torch.float32, DEVICE)
    row: Row = {}
    samples = {}
    for name, context in (("torch", by_torch()), ("ours", contextlib.nullcontext())):
        with context:
            samples[name] = run(den, plan, state, source)
            row[f"{name} us/row"] = launched([lambda: run(den, plan, state, source)]) / len(plan.rows)
    row["times"] = row["torch us/row"] / row["ours us/row"]
    row["difference"] = apart(samples)
    if not row["difference"] <= ALLOWED:
        row["problem"] = f"the samples lie further apart than {ALLOWED:g}"
    return row


@torch.no_grad()
def whole(name: str, batch: int) -> Row:
    den = guided(prepared(name), NETWORKS[name][1])
    plan = fd.plan("dpmpp-2m", den.schedule, NFE, grid="uniform_t")
    row: Row = {}
    samples = {}
    for who, contexts in (("torch", (plain(), by_torch())), ("ours", ())):
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            samples[who] = fd.sample(den, plan, seeds=range(batch))
            row[f"{who} ms"] = launched([lambda: fd.sample(den, plan, seeds=range(batch))], rounds=5) / 1000
    row["times"] = row["torch ms"] / row["ours ms"]
    return row | {"difference": apart(samples)}


def apart(samples: dict[str, torch.Tensor]) -> float:
    """The largest difference over the largest value."""
    return ((samples["ours"] - samples["torch"]).abs().max() / samples["torch"].abs().max()).item()


def cases() -> Iterator[Case]:
    for shape in STATES:
        for solver in SOLVERS:
            yield Case({"what": f"update, {solver}", "shape": "x".join(map(str, shape))}, partial(update, shape, solver))
    for name, (_, shape) in NETWORKS.items():
        for batch in BATCHES:
            about = {"what": f"sample, {name}", "shape": "x".join(map(str, (batch, *shape)))}
            yield Case(about, partial(whole, name, batch))


stage = Stage("sampler", lambda: list(cases()), seconds=60, longest=120)

if __name__ == "__main__":
    sys.exit(stage.main())
