"""The training of a plan: Adam on a robust endpoint error, the best table by validation kept; resumable, seeded."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FastdiffError
from ..files import write_bytes
from ..plans import Plan
from .features import Distribution
from .table import Table
from .targets import Pairs, Score, measure

TARGET_STEP = 0.25  # of the relaxed target's radius: how far a start may move in one update
SAVE_SECONDS = 10.0  # at most so much is lost by an interrupt
ROUNDING = 1 / 2, 1 / 64  # at the first and the last step


@dataclass(frozen=True)
class TuneConfig:
    """What determines the plan, beside checkpoint, pairs and starting table.

    `relax` is the radius of the ball in which each training pair's start may move, in units of its own norm (LD3, Tong et al.
    2024, eq. 8); `distribution` the weight of the MMD term; both 0 = off. `rounding` is the error below which the loss is a
    square, in units of the start's RMSE, at the first and the last step: it falls geometrically, so that the table first finds
    its place by large errors and then loses the small ones. Large values make it the squared error.
    """

    steps: int = 250
    batch: int = 32
    lr: float = 0.02
    seed: int = 0
    validate_every: int = 50
    relax: float = 0.0
    distribution: float = 0.0
    rounding: tuple[float, float] = ROUNDING
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2 or not self.lr > 0 or self.validate_every < 1:
            raise FastdiffError(f"tuning needs steps, validate_every >= 1, batch >= 2 and lr > 0; given {asdict(self)}")
        if not (self.relax >= 0 and self.distribution >= 0 and min(self.rounding) > 0):
            raise FastdiffError(f"relax and distribution must not be negative, and rounding positive; given {asdict(self)}")


@dataclass
class Progress:
    step: int
    loss: float
    best: Score
    start: Score


def endpoint_error(x: Tensor, target: Tensor, scale: float) -> Tensor:
    """Mean over all elements of sqrt(e^2 + scale^2) - scale (Charbonnier et al. 1994): a square below `scale`, linear above.

    The few trajectories that land in another mode do not pull the table towards an average of modes, as they would with a
    square, and faint speckle on flat ground counts beside the large errors at edges, as it does to the eye and to a classifier.
    """
    return (((x - target).square() + scale**2).sqrt() - scale).mean()


def check(table: Table, train: Sequence[Pairs], validation: Sequence[Pairs], batch: int) -> None:
    """
    Raises:
        FastdiffError: fewer pairs than a batch, seeds in both sets, targets from another noise schedule than the table's.
    """
    if (fewest := min(p.setup.n for p in train)) < batch:
        raise FastdiffError(f"{fewest} pairs are fewer than one batch of {batch}: give more pairs")
    a, b = ({i for p in parts for i in p.setup.seeds} for parts in (train, validation))
    if a & b:
        raise FastdiffError(f"training and validation share {len(a & b)} seeds: give other ones")
    mine = table.schedule.config()
    for other in (p.denoiser.schedule.config() for p in (*train, *validation)):
        if other != mine:
            raise FastdiffError(f"the targets are from schedule {other}, the plan is on {mine}: make both from one denoiser")


class Tuner:
    """Tunes one table for one denoiser and budget; `run()` returns the best plan by validation, `state` resumes.

    Args:
        table: what is trained; its plan as it stands is the one to beat.
        train, validation: pairs, one set a guidance scale: the plan holds for all of them.
        state: file from which an interrupted run goes on bit for bit.

    Raises:
        FastdiffError: too few pairs, seeds in both sets, a network without gradients, a state of another run.
    """

    def __init__(
        self, table: Table, train: Sequence[Pairs], validation: Sequence[Pairs], config: TuneConfig, state: Path | None = None
    ) -> None:
        check(table, train, validation, config.batch)
        self.table, self.config, self.train, self.validation, self.state_path = table, config, train, validation, state
        self.source = table.plan("start", {})
        self.distribution = Distribution(torch.cat([p.target for p in validation]))
        trainable = [p for p in table.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(trainable, lr=config.lr, eps=1e-15)  # gradients of late nodes are tiny
        self.moved = [torch.zeros_like(p.noise) for p in train] if config.relax else []
        self.start = measure(self.source, validation, self.distribution)
        self.best, self.best_score, self.step = self.source, self.start, 0
        self.seconds = 0.0  # spent on steps and validation, of all runs together
        self._check_gradients()
        if state is not None and state.exists():
            self._resume()

    def run(self, budget: float = math.inf, callback: Callable[[Progress], None] | None = None) -> Plan:
        """Trains to `config.steps` or for `budget` seconds; an interrupt keeps the best table so far in `best`."""
        saved = last = time.monotonic()
        began = self.seconds
        while self.step < self.config.steps and self.seconds - began < budget:
            loss = self.train_step()
            considered = self.step % self.config.validate_every == 0 or self.step == self.config.steps
            if considered:
                self._consider()
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if considered or now - saved > SAVE_SECONDS:
                self.save()
                saved = now
            if callback:
                callback(Progress(self.step, loss, self.best_score, self.start))
        return self.best

    def train_step(self) -> float:
        c = self.config
        generator = torch.Generator().manual_seed(c.seed * 1_000_003 + self.step)
        group = self.step % len(self.train)
        pairs = self.train[group]
        index = torch.randperm(pairs.setup.n, generator=generator)[: c.batch]
        den, noise, target = pairs.batch(index)
        if c.relax:
            noise = (noise + self.moved[group][index]).requires_grad_()
        for options in self.optimiser.param_groups:
            options["lr"] = c.lr * (0.05 + 0.95 * (1 + math.cos(math.pi * self.step / c.steps)) / 2)
        x = self.table(den, noise * self.source.start[1], c.checkpointing)
        loss = endpoint_error(x, target, self.scale)
        if c.distribution:
            loss = loss + c.distribution * self.distribution.squared(x, target)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if all(bool(p.grad.isfinite().all()) for p in self.table.parameters() if p.grad is not None):
            self.optimiser.step()
            if c.relax:
                assert noise.grad is not None
                self.moved[group][index] = relaxed(self.moved[group][index], noise.grad, c.relax)
        self.step += 1
        return float(loss.detach())

    @property
    def scale(self) -> float:
        """The loss's scale at this step."""
        first, last = self.config.rounding
        return max(self.start.rmse, 1e-5) * first * (last / first) ** (self.step / self.config.steps)

    def _consider(self) -> None:
        candidate = self.table.plan(self.source.name, {})
        score = measure(candidate, self.validation, self.distribution)
        if score.against(self.start) < self.best_score.against(self.start):
            self.best, self.best_score = candidate, score

    def _check_gradients(self) -> None:
        den, noise, _ = self.train[0].batch(torch.arange(2))
        d = den((noise * self.source.start[1]).requires_grad_(), torch.full((2,), self.source.rows[0].t))
        if not d.requires_grad:
            raise FastdiffError("the network passes no gradient from its output to its input: tune it with --derivative-free")

    def save(self) -> None:
        """The state from which the run goes on bit for bit."""
        if self.state_path is None:
            return
        buffer = io.BytesIO()
        torch.save({
            "identity": self._identity(), "step": self.step, "seconds": self.seconds,
            "best": self.best.to_json(), "best_score": asdict(self.best_score),
            "table": self.table.state_dict(), "optimiser": self.optimiser.state_dict(), "moved": self.moved,
        }, buffer)  # fmt: skip
        write_bytes(self.state_path, buffer.getvalue())

    def _identity(self) -> dict[str, Any]:
        """What another run would not share."""
        parts = [[p.setup.first_seed, p.setup.n, p.setup.guidance] for p in (*self.train, *self.validation)]
        return {
            "settings": asdict(self.config), "source": self.source.to_json(), "table": type(self.table).__name__,
            "pairs": parts, "checkpoint": self.train[0].denoiser.hash,
        }  # fmt: skip

    def _resume(self) -> None:
        assert self.state_path is not None
        state = torch.load(self.state_path, weights_only=True)
        if state["identity"] != self._identity():
            raise FastdiffError(f"{self.state_path} belongs to another tuning run: give its settings, or another --out")
        self.step, self.best_score, self.moved = state["step"], Score(**state["best_score"]), state["moved"]
        self.best, self.seconds = Plan.from_json(state["best"]), state["seconds"]
        self.table.load_state_dict(state["table"])
        self.optimiser.load_state_dict(state["optimiser"])


def relaxed(moved: Tensor, gradient: Tensor, radius: float) -> Tensor:
    """Moves each start (B, *) of unit noise a step down its own gradient, and back into the ball around the noise it was."""
    dims = tuple(range(1, moved.ndim))
    size = radius * math.sqrt(moved[0].numel())
    norm = torch.linalg.vector_norm(gradient, dim=dims, keepdim=True).clamp_min(1e-30)
    out = moved - TARGET_STEP * size * gradient / norm
    return out * (size / torch.linalg.vector_norm(out, dim=dims, keepdim=True).clamp_min(size))
