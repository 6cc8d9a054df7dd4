"""Microseconds a row outside the network, by pytest-benchmark, and the bar on the two-step multistep loop."""

from __future__ import annotations

import pytest
import torch
from overhead import (
    BAR,
    CORRECTED_BAR,
    KDIFFUSION,
    METHODS,
    PREDICTIONS,
    SEAT_BAR,
    YARDSTICK,
    Case,
    cases,
    check,
    measure,
    missing,
    summary,
)  # fmt: skip

WHO = ("sample", "loop", "hand", "seat", "diffusers", "k-diffusion")
NEEDS = {"seat": "diffusers", "diffusers": "diffusers", "k-diffusion": "k_diffusion"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case(method: str, prediction: str, who: str) -> Case:
    if who in NEEDS and (reason := missing(NEEDS[who])):
        pytest.skip(reason)
    if who == "k-diffusion" and method not in KDIFFUSION:
        pytest.skip(f"k-diffusion has no {method}")
    return next(c for c in cases(method, prediction, peers=who in NEEDS) if c.who == who)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_rows(benchmark, method, prediction, who):
    chosen = case(method, prediction, who)
    benchmark.group = f"{method} {prediction}, {chosen.rows} rows"
    rounds = 30 if who in ("diffusers", "k-diffusion") else 200
    benchmark.pedantic(lambda loop: loop(), setup=lambda: ((chosen.prepare(),), {}), rounds=rounds, warmup_rounds=3)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["us_per_row"] = benchmark.stats.stats.median / chosen.rows * 1e6


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_loops_agree(method, prediction):
    check(cases(method, prediction, peers=False))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_two_step_multistep_within_the_bar(prediction):
    result = summary(measure(cases("dpmpp-2m", prediction, peers=False), rounds=200))
    assert result["loop"]["ratio"] <= BAR, result


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", ["unipc-2", "unipc-3"])
def test_predictor_correctors_within_theirs(method, prediction):
    result = summary(measure(cases(method, prediction, peers=False), rounds=200))
    assert result["loop"]["us_per_row"] <= CORRECTED_BAR * result[YARDSTICK]["us_per_row"], result


@pytest.mark.parametrize("method", METHODS)
def test_the_seat_within_its_bar(method):
    if reason := missing("diffusers"):
        pytest.skip(reason)
    result = summary(measure(cases(method, "eps"), rounds=100))
    assert result["seat"]["us_per_row"] <= result["loop"]["us_per_row"] + SEAT_BAR, result
    assert result["seat"]["us_per_row"] < result["diffusers"]["us_per_row"], result
