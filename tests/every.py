"""A short plan of every solver, and a denoiser that all of them run on, those of learned variance too."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff import reference

SCHEDULES = {"vp_cosine": fd.schedule.vp_cosine(), "flow": fd.schedule.flow()}  # flow starts at alpha = 0
SHAPE = (2, 3, 3)
BATCH = 3
CASES = {
    **{name: (name, {}) for name in fd.list_solvers()},
    "ddpm learned": ("ddpm", {"variance": "learned"}),
    "heun churn": ("heun", {"s_churn": 20.0}),
    "noise first": ("euler", {"s_churn": 20.0, "grid": [0.9, 0.7, 0.5, 0.35, 0.2, 0.1]}),
}
CALLS = 6
every = pytest.mark.parametrize("case", CASES)


def make(case, schedule="vp_cosine", nfe=CALLS, **more):
    name, options = CASES[case]
    return fd.plan(name, SCHEDULES[schedule], nfe, **{**options, **more})


class Network(torch.nn.Module):
    """A v and a variance output that no two points and no two times share; no parameters, so of its input's precision."""

    def forward(self, x, t):
        t = t.to(x.dtype).view(-1, 1, 1, 1)
        return torch.cat([torch.tanh(0.7 * x + t) - 0.3 * x, torch.sin(x + 2 * t)], dim=1)


def denoiser(schedule="vp_cosine", network=None):
    return fd.Denoiser(network or Network(), SCHEDULES[schedule], "v", shape=SHAPE)


def given(plan, dtype=torch.float64):
    """A start state and the plan's draws, (draws, B, *shape), all multiples of 2^-12: the same in float32 and float64."""
    drawn = torch.randn(1 + plan.draws, BATCH, *SHAPE, generator=torch.Generator().manual_seed(plan.nfe))
    drawn = torch.round(drawn * 4096) / 4096
    return (drawn[0] * float(np.float32(plan.start[1]))).to(dtype), drawn[1:].to(dtype)


def points_of(plan, den, start, noises):
    """What the reference executor makes of a plan: every point, and the sample."""

    def denoise(y, row):
        if row.var is not None:
            return [v.numpy() for v in den.with_variance(torch.from_numpy(y), row.t)]
        return den(torch.from_numpy(y), row.t).numpy()

    return reference.run(plan, denoise, start.double().numpy(), noises.double().numpy())


class NoReads(TorchDispatchMode):
    """What would wait for a device, or copy a number of the host to it, is an error, however deep inside torch it happens."""

    OPS = frozenset(
        f"aten::{name}" for name in (
            "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim", "lift_fresh",
        )
    )  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        masked = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.OPS or masked:
            raise AssertionError(f"{func} reads a tensor's value, or copies one to the device")
        return func(*args, **(kwargs or {}))
