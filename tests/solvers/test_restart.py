"""Restart sampling by an interval of levels: where it turns, what it costs, the law it keeps."""

import itertools
import math

import pytest

import fastdiff as fd
from fastdiff.errors import FastdiffError

EDM = fd.schedule.edm()


@pytest.mark.parametrize(("repeats", "length"), [(1, 2), (3, 1), (2, 4)])
def test_an_interval_is_run_again_from_its_upper_end(repeats, length):
    """From the grid's node nearest to low, up to high exactly, and down in karras steps to the node."""
    plan = fd.plan("restart", EDM, steps=12, interval=(0.1, 2.0), repeats=repeats, length=length)
    plain = fd.plan("restart", EDM, steps=12, repeats=0)
    assert plan.spread == plan.mean == "exact" and plan.nfe == plain.nfe + 2 * repeats * length
    sigmas = [row.sigma for row in plan.rows]
    tops = [i for i, s in enumerate(sigmas) if s == pytest.approx(2.0, rel=1e-12)]
    assert len(tops) == repeats == plan.draws
    node = min((r.sigma for r in plain.rows), key=lambda s: abs(math.log(s / 0.1)))
    for i in tops:
        down = [s for s, _ in itertools.groupby(sigmas[i : i + 2 * length])]
        assert down[-1] == node and len(down) == length + 1
        roots = [s ** (1 / 7) for s in down]
        assert all(a - b == pytest.approx((roots[0] - roots[-1]) / length, rel=1e-9) for a, b in itertools.pairwise(roots))
    assert sorted(set(sigmas) - set(down)) == sorted({r.sigma for r in plain.rows} - {node})


@pytest.mark.parametrize("schedule", [EDM, fd.schedule.vp_cosine(), fd.schedule.flow()], ids=lambda s: s.name)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_a_budget_is_met(schedule, end):
    """Too small a budget repeats less, or not at all."""
    repeats = []
    for nfe in (1, 2, 5, 9, 10, 14, 15, 30):
        plan = fd.plan("restart", schedule, nfe, interval=(0.3, 3.0), repeats=2, end=end)
        assert plan.nfe == nfe
        repeats.append(plan.draws)
    assert repeats[0] == 0 and repeats[-1] == 2 and repeats == sorted(repeats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (2.0, 1.0)}, "interval is .low, high."),
        ({"interval": (0.0, 1.0)}, "interval is .low, high."),
        ({"interval": (1.0, math.inf)}, "interval is .low, high."),
        ({"interval": (0.1, 1.0), "after": 3}, "after= does not go with it"),
        ({"interval": (1.0, 200.0)}, "lie below its noisiest level"),
        ({"interval": (1e-5, 2e-5)}, "must hold a node of the grid"),
        ({"repeats": -1}, "repeats >= 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(FastdiffError, match=message) as caught:
        fd.plan("restart", EDM, 20, **options)
    assert "\n" not in str(caught.value)
