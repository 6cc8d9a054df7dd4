"""The eager loop keeps no more alive than the history that a later row reads, and two states."""

from __future__ import annotations

import pytest
import torch
from memory import SLACK, peak, plans


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: f"{plan.name}{' learned' * plan.learned_variance}")
def test_peak(plan):
    assert peak(plan) <= plan.registers + SLACK


def test_the_count_sees_what_is_kept():
    """A callback that keeps every point: the 20 of them, where two would do."""
    plan = next(p for p in plans() if p.name == "dpmpp-2m")
    kept: list[torch.Tensor] = []
    assert peak(plan, lambda i, y: kept.append(y)) >= 20
