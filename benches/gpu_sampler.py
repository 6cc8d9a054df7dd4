"""The whole sampler at 8 network calls with guidance, and its update alone: rows as one op against torch's operations.

`update`: microseconds a row of the update without a network, at the states of pixel and latent models. `sample`: milliseconds of
`fd.sample` with torch's operations throughout, with our kernels, and how far the two samples lie apart.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from gpu_networks import networks, plain
from gpu_record import keep, launched, show, start

import fastdiff as fd
from fastdiff import fused
from fastdiff.sampling import begin, run

NFE, SCALE = 8, 3.0
STATES = [(1, 4, 64, 64), (8, 4, 64, 64), (64, 4, 64, 64), (16, 3, 256, 256)]
SOLVERS = ("dpmpp-2m", "unipc-3", "dpmpp-2m-sde")
BATCHES = (1, 8, 64)


def by_torch() -> Any:
    """The loop that writes every term of every row, as on the CPU."""
    return patch.object(fused, "fits", lambda plan: False)


def guided(network: Callable[..., Any], shape: tuple[int, ...]) -> fd.Denoiser:
    """Two calls an evaluation, their difference scaled; both conditions are empty, since these networks hold theirs."""
    den = fd.Denoiser(network, fd.schedule.vp_cosine(), "eps", shape=shape)
    return fd.guide.cfg(den, SCALE, cond={}, negative={}, batched=True)


def update(shape: tuple[int, ...], solver: str) -> dict[str, Any]:
    """A network that returns what it has at hand: all that is left is the update, the guidance and the conversion."""
    batch, *sample = shape
    kept = torch.randn(2 * batch, *sample, device="cuda", dtype=torch.bfloat16)
    den = guided(lambda x, t: kept, tuple(sample))
    plan = fd.plan(solver, den.schedule, NFE, grid="uniform_t")
    state, source = begin(den, plan, None, range(batch), None, torch.float32, "cuda")
    row: dict[str, Any] = {"what": f"update, {solver}", "shape": "x".join(map(str, shape))}
    samples = {}
    for name, context in (("torch", by_torch()), ("ours", contextlib.nullcontext())):
        with context:
            samples[name] = run(den, plan, state, source)
            row[f"{name} us/row"] = launched([lambda: run(den, plan, state, source)]) / len(plan.rows)
    row["times"] = row["torch us/row"] / row["ours us/row"]
    return row | {"difference": apart(samples)}


def whole(name: str, network: torch.nn.Module, shape: tuple[int, ...], batch: int) -> dict[str, Any]:
    den = guided(network, shape)
    plan = fd.plan("dpmpp-2m", den.schedule, NFE, grid="uniform_t")
    row: dict[str, Any] = {"what": f"sample, {name}", "shape": f"{batch}x{'x'.join(map(str, shape))}"}
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


def attempt(rows: list[dict[str, Any]], about: str, measure: Callable[[], dict[str, Any]]) -> None:
    try:
        rows.append(measure())
    except Exception as e:  # the next case may still say something
        traceback.print_exc()
        rows.append({"what": about, "problem": f"{type(e).__name__}: {e}"[:200]})
    torch.cuda.empty_cache()


def main() -> None:
    start()
    rows: list[dict[str, Any]] = []
    for shape in STATES:
        for solver in SOLVERS:
            attempt(rows, f"update, {solver}", partial(update, shape, solver))
    for name, make in networks().items():
        torch.manual_seed(0)
        network, sample = make()
        network = network.to("cuda", torch.bfloat16).eval().requires_grad_(False)
        for batch in BATCHES:
            attempt(rows, f"sample, {name}", partial(whole, name, network, sample, batch))
        del network
    show(rows)
    keep("sampler", rows)
    wrong = [row for row in rows if "problem" in row or (row["what"].startswith("update") and row["difference"] > 1e-5)]
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
