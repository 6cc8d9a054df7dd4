"""`fd.fastest`: how a network runs best on this processor, found by a short measurement and reported.

A variant changes how the same weights are computed with: the memory layout of images, bfloat16 where the processor multiplies it
itself, torch.compile where that is asked for. Torch's own default is one of them, so what is chosen is not slower than that.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import not_compiled
from .denoiser import Denoiser
from .errors import FastdiffError
from .sampling import naming_conditions

BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # instructions, as torch.cpu.get_capabilities names them
ROUNDS = 5  # of the measurement, at least
MARGIN = 1.03  # what is not so many times as fast as torch's default may in truth be slower
LEVELS = (0.2, 0.5, 0.8)  # of the way to full noise: where errors are looked at; a call at the middle one is timed


@dataclass(frozen=True)
class Variant:
    """A way to compute a network; with nothing set it is torch's default."""

    channels_last: bool = False
    bf16: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        words = [word.replace("_", "-") for word in ("compiled", "bf16", "channels_last") if getattr(self, word)]
        return "-".join(words) or "plain"

    def of(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser with its network computed so; torch's default is the denoiser itself, else the weights are copied.

        Raises:
            FastdiffError: the network is no torch module, or the processor has no instructions for bfloat16.
        """
        if self == PLAIN:
            return denoiser
        if not isinstance(denoiser.network, nn.Module):
            raise FastdiffError(f"only a torch module has variants; this network is a {type(denoiser.network).__name__}")
        if self.bf16 and denoiser.device.type == "cpu" and not has_bf16():
            raise FastdiffError("this processor has no instructions for bfloat16")
        other = copy.copy(denoiser)
        network: Any = copy.deepcopy(denoiser.network)
        other.network = network
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.bf16:
            network.to(torch.bfloat16)
            other.__dict__.pop("_dtype", None)
            other.cond = {name: _narrow(value) for name, value in denoiser.cond.items()}
        return other.compiled() if self.compiled else other


PLAIN = Variant()
EAGER = (PLAIN, Variant(channels_last=True), Variant(bf16=True), Variant(bf16=True, channels_last=True))
COMPILED = (Variant(compiled=True), Variant(compiled=True, bf16=True))  # torch.compile chooses layouts by itself
VARIANTS = {variant.name: variant for variant in (*EAGER, *COMPILED)}


@dataclass
class Report:
    """What `fastest` found for a batch. By variant: median milliseconds of a call; how many times as fast it is as torch's
    default (median over rounds); how far its prediction lies from the default's (root mean square, of the prediction's own). And
    the variants that were left, with the reason."""

    batch: int
    chosen: str = PLAIN.name
    ms: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def lines(self) -> tuple[str, ...]:
        seen = (f"{name}: {ms:.1f} ms, {self.times[name]:.2f} times as fast, error {self.errors[name]:.1e}"
                for name, ms in self.ms.items())  # fmt: skip
        return (f"batch {self.batch}: {self.chosen}", *seen, *(f"{name}: left, {why}" for name, why in self.left.items()))

    def __str__(self) -> str:
        return "\n".join(self.lines)


@torch.no_grad()
def fastest(
    denoiser: Denoiser, batch: int = 16, *, tolerance: float = 0.02, compile: bool = False, seconds: float = 2.0
) -> tuple[Denoiser, Report]:
    """The denoiser in the variant that is fastest on this processor, and a report; the denoiser itself where that is torch's
    default. Variants are timed in turns on one call; while that lasts, each holds a copy of the weights.

    Args:
        denoiser: a network on the CPU in float32, without guidance around it; conditions other than classes bound.
        batch: samples of a call.
        tolerance: the largest error of a prediction (`Report.errors`): 0.02 lets bfloat16 in, 1e-4 keeps it out.
        compile: torch.compile's variants too, half a minute or more each.
        seconds: how long to time.

    Raises:
        FastdiffError: another denoiser than that, or numbers out of range.
    """
    _check(denoiser, batch, tolerance, seconds)
    report, made = Report(batch), {PLAIN.name: denoiser}
    states = list(_states(denoiser, batch))
    with naming_conditions(denoiser, batch):
        wanted = _predictions(denoiser, states)
    report.errors[PLAIN.name] = 0.0
    for variant in (*EAGER[1:], *(COMPILED if compile else ())):
        try:
            found = variant.of(denoiser)
            error = max(_apart(a, b) for a, b in zip(_predictions(found, states), wanted, strict=True))
        except Exception as e:  # a network that does not go with it
            report.left[variant.name] = str(not_compiled(e) if variant.compiled else e).strip().split("\n")[0]
            continue
        if not error <= tolerance:
            report.left[variant.name] = f"its error of {error:.1e} is above {tolerance:g}"
            continue
        report.errors[variant.name], made[variant.name] = error, found
    _time(made, states[len(states) // 2], seconds, report)
    best = max(made, key=lambda name: report.times[name])
    report.chosen = best if report.times[best] >= MARGIN else PLAIN.name
    return made[report.chosen], report


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 by instructions of its own."""
    asked: Any = getattr(torch.cpu, "get_capabilities", None)
    if asked is None:  # an older torch
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    found = asked()
    return any(found.get(name) for name in BF16)


def _check(denoiser: Denoiser, batch: int, tolerance: float, seconds: float) -> None:
    if len(denoiser.leaves) != 1 or denoiser.leaves[0] is not denoiser:
        raise FastdiffError("the variant is chosen for a network: call fd.fastest before guidance is put around the denoiser")
    if not isinstance(denoiser.network, nn.Module) or denoiser.dtype != torch.float32 or denoiser.device.type != "cpu":
        raise FastdiffError(
            f"fd.fastest takes a torch module in float32 on the CPU; given {type(denoiser.network).__name__}, {denoiser.dtype}, "
            f"{denoiser.device} (on a GPU: fd.patch, fd.capture)"
        )
    if denoiser.shape is None:
        raise FastdiffError("the shape of a sample is not known: make the Denoiser with shape=")
    if batch < 1 or not tolerance >= 0 or not seconds >= 0:
        raise FastdiffError(f"batch must be at least 1, tolerance and seconds 0; given {batch}, {tolerance}, {seconds}")


def _states(denoiser: Denoiser, batch: int) -> Iterator[tuple[Tensor, float]]:
    """Noisy grey samples (B, *shape) and their times."""
    schedule = denoiser.schedule
    assert denoiser.shape is not None
    noise = torch.randn((batch, *denoiser.shape), generator=torch.Generator().manual_seed(0))
    for level in LEVELS:
        t = float(schedule.time_of_uniform(level))
        yield noise * float(schedule.sigma(t)), t


def _called(denoiser: Denoiser, batch: int) -> Denoiser:
    """With classes bound, where the network takes them and none are."""
    if not denoiser.num_classes or "class_labels" in denoiser.cond:
        return denoiser
    return denoiser.bind(class_labels=torch.arange(batch) % denoiser.num_classes)


def _predictions(denoiser: Denoiser, states: list[tuple[Tensor, float]]) -> list[Tensor]:
    ready = _called(denoiser, len(states[0][0]))
    return [ready(x, t) for x, t in states]


def _narrow(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-12))


def _time(made: dict[str, Denoiser], state: tuple[Tensor, float], seconds: float, report: Report) -> None:
    """One call of each in every round, the order turned around every other one; of the first round only the calls are used."""
    x, t = state
    ready = {name: _called(den, len(x)) for name, den in made.items()}
    seen: dict[str, list[float]] = {name: [] for name in made}
    end, rounds = time.perf_counter() + seconds, -1
    while rounds < ROUNDS or time.perf_counter() < end:
        for name in sorted(ready, reverse=bool(rounds % 2)):
            began = time.perf_counter()
            ready[name](x, t)
            if rounds >= 0:
                seen[name].append(time.perf_counter() - began)
        rounds += 1
    for name, times in seen.items():
        report.ms[name] = 1000 * statistics.median(times)
        report.times[name] = statistics.median(p / q for p, q in zip(seen[PLAIN.name], times, strict=True))
