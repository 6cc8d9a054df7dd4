"""The eager loop keeps no more predictions alive than the plan's registers say."""

from __future__ import annotations

import weakref

import pytest
import torch

import fastdiff as fd

KEEP_D = ("ddim", "dpmpp-2m", "dpmpp-3m", "unipc-2", "unipc-3", "heun")  # methods whose history entries are D itself


@pytest.mark.parametrize("method", KEEP_D)
def test_live_predictions(method):
    schedule = fd.schedule.vp_linear()
    plan = fd.plan(method, schedule, nfe=20)
    made: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def denoiser(x: torch.Tensor, t: float) -> torch.Tensor:
        d = x * 0.5
        made.append(weakref.ref(d))
        alive.append(sum(r() is not None for r in made))
        return d

    fd.sample(denoiser, plan, noise=torch.ones(1, 1, 2, 2))
    # register 0 is the base; the loop's own name holds the previous prediction until the next one is there
    assert max(alive) == max(plan.registers - 1, 2)
