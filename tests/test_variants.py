"""fd.fastest: the same predictions in every variant, a choice by the clock and the error alone, and what it says of them."""

import pytest
import tiny
import torch
from torch import nn

import fastdiff as fd
from fastdiff import variants
from fastdiff.errors import FastdiffError
from fastdiff.variants import COMPILED, EAGER, PLAIN, VARIANTS, Variant

MIXED = {"channel_mult": [1, 2], "attention": [2], "num_classes": 4, "null_class": True}


@pytest.fixture
def den(tmp_path):
    return fd.load(tiny.checkpoint(tmp_path / "a.safetensors", tiny.network(**MIXED)))


@pytest.fixture
def clock(monkeypatch):
    """A processor whose calls take what the test says; the calls themselves are made."""
    speeds = dict.fromkeys(VARIANTS, 1.0)

    def timed(made, state, seconds, report):
        for name, found in made.items():
            variants._called(found, len(state[0]))(*state)
            report.ms[name], report.times[name] = 100 / speeds[name], speeds[name]

    monkeypatch.setattr(variants, "_time", timed)
    return speeds


@pytest.mark.parametrize("variant", [*EAGER, *(pytest.param(v, marks=pytest.mark.slow) for v in COMPILED)], ids=lambda v: v.name)
def test_every_variant_predicts_alike_and_leaves_the_denoiser_as_it_was(den, variant, monkeypatch):
    monkeypatch.setattr(variants, "has_bf16", lambda: True)  # slowly, where it is not so
    before = {name: (p.clone(), p.stride()) for name, p in den.network.named_parameters()}
    other = variant.of(den)
    bound = {"class_labels": torch.tensor([0, 1, 2])}
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = den.bind(**bound)(x, 0.5), other.bind(**bound)(x, 0.5)
    assert got.dtype == torch.float32 and other.hash == den.hash
    assert (other is den) == (variant == PLAIN)
    torch.testing.assert_close(got, want, rtol=0, atol=0.05 if variant.bf16 else 1e-5)
    assert not (variant.bf16 and torch.equal(got, want))
    for name, p in den.network.named_parameters():
        assert torch.equal(p, before[name][0]) and p.stride() == before[name][1] and p.dtype == torch.float32


def test_the_fastest_is_chosen_within_the_error_allowed(den, clock, monkeypatch):
    monkeypatch.setattr(variants, "has_bf16", lambda: True)
    clock |= {"channels-last": 1.2, "bf16": 1.6}
    found, report = fd.fastest(den, 3)
    assert report.chosen == "bf16" and found.dtype == torch.bfloat16 and 0 < report.errors["bf16"] <= 0.02
    assert report.times["plain"] == 1.0 and report.errors["plain"] == 0.0 and set(report.times) == {v.name for v in EAGER}
    found, report = fd.fastest(den, 3, tolerance=1e-4)
    assert report.chosen == "channels-last" and found.network is not den.network
    assert "above 0.0001" in report.left["bf16"] and "bf16" not in report.times
    assert all(words in str(report) for words in ("batch 3: channels-last", "1.20 times as fast", "bf16: left, its error"))


def test_torchs_default_stays_where_nothing_clearly_beats_it(den, clock):
    clock |= {"channels-last": 1.02, "bf16": 0.5}
    found, report = fd.fastest(den, 1)
    assert found is den and report.chosen == "plain"


def test_a_processor_without_bfloat16_and_a_network_that_breaks(den, clock, monkeypatch):
    monkeypatch.setattr(variants, "has_bf16", lambda: False)
    _, report = fd.fastest(den, 1)
    assert report.left["bf16"] == "this processor has no instructions for bfloat16"

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 2, 3, 3))

        def forward(self, x, t):
            return x * self.weight.view(-1).mean()  # no view in another layout

    other = fd.Denoiser(Flat().requires_grad_(False), fd.schedule.vp_cosine(), "v", shape=(1, 4, 4))
    found, report = fd.fastest(other, 2)
    assert found is other and "view" in report.left["channels-last"]


def test_the_real_clock_times_them_in_turns(den):
    found, report = fd.fastest(den, 2, seconds=0.0)
    assert set(report.ms) == set(report.times) and all(ms > 0 for ms in report.ms.values())
    assert report.times["plain"] == 1.0 and report.chosen in report.ms
    x = fd.sample(found.bind(class_labels=torch.arange(2)), fd.plan("ddim", den, 3), seeds=[0, 1])
    assert x.isfinite().all()


def test_what_cannot_be_chosen_for(den):
    net = den.network
    for given, word in (
        (fd.guide.cfg(den.bind(class_labels=torch.zeros(1, dtype=torch.long)), 2.0), "before guidance"),
        (fd.Denoiser(lambda x, t: x, den.schedule, "v", shape=(1, 8, 8)), "a torch module in float32"),
        (fd.Denoiser(net.half(), den.schedule, "v", shape=(1, 8, 8)), "float16"),
        (fd.Denoiser(tiny.network(), den.schedule, "v"), "shape="),
    ):
        with pytest.raises(FastdiffError, match=word):
            fd.fastest(given)
    with pytest.raises(FastdiffError, match="at least 1"):
        fd.fastest(fd.Denoiser(tiny.network(), den.schedule, "v", shape=(1, 8, 8)), 0)
    with pytest.raises(FastdiffError, match="only a torch module"):
        Variant(bf16=True).of(fd.Denoiser(lambda x, t: x, den.schedule, "v"))
