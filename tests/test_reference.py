"""The torch executor against the float64 reference: a table read literally, for every solver."""

import every
import numpy as np
import pytest
import torch

from fastdiff.noise import stacked
from fastdiff.sampling import run


@pytest.mark.parametrize("schedule", every.SCHEDULES)
@every.every
def test_every_plan_agrees_with_the_reference_to_rounding(case, schedule):
    plan, den = every.make(case, schedule), every.denoiser(schedule)
    start, noises = every.given(plan)
    points = every.points_of(plan, den, start, noises)
    scale = max(1.0, *(np.abs(p).max() for p in points))

    seen = []
    out = run(den, plan, start, stacked(noises), lambda i, y: seen.append(y.clone()))
    double = np.abs(torch.stack(seen).numpy() - points[1:]).max() / scale
    assert torch.equal(out, seen[-1]) and double <= 1e-12  # 1.6e-13 seen, dpm-solver-3s

    single = run(den, plan, start.float(), stacked(noises.float()))
    assert single.dtype == torch.float32
    # what the plan makes of float64's rounding it makes of float32's, which is 2^29 times larger
    assert np.abs(single.numpy() - points[-1]).max() / scale <= 1e-5 + 2**32 * double
