"""The training of a plan: Adam on a robust endpoint error, the best table by validation kept; resumable, seeded."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FastdiffError
from ..files import write_bytes
from ..plans import Plan
from ..sampling import sample
from .table import LearnedTable
from .targets import Pairs


@dataclass(frozen=True)
class TuneConfig:
    """What determines the plan, beside checkpoint, pairs and starting plan."""

    steps: int = 200
    batch: int = 32
    lr: float = 0.02
    freedom: str = "full"
    seed: int = 0
    validate_every: int = 20
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.lr > 0 or self.validate_every < 1:
            raise FastdiffError(f"tuning needs steps, batch, validate_every >= 1 and lr > 0; given {asdict(self)}")


@dataclass
class Progress:
    step: int
    loss: float
    validation: float
    start: float


def endpoint_error(x: Tensor, target: Tensor, scale: float) -> Tensor:
    """Mean over samples of sqrt(mse + scale^2) - scale: quadratic for errors below `scale`, linear above, so that the few
    trajectories that land in another mode do not pull the whole table towards an average of modes."""
    mse = (x - target).square().flatten(1).mean(dim=1)
    return ((mse + scale**2).sqrt() - scale).mean()


def paired_error(plan: Plan, pairs: Pairs) -> float:
    """RMSE of a plan's samples to the targets of the pairs, as the executors run it."""
    squared, n = 0.0, pairs.setup.n
    for index in torch.arange(n).split(128):
        den, noise, target = pairs.batch(index)
        squared += float((sample(den, plan, noise=noise) - target).square().flatten(1).mean(dim=1).sum())
    return math.sqrt(squared / n)


class Tuner:
    """Tunes one plan for one denoiser and budget; `run()` returns the best plan by validation, `state` resumes.

    Raises:
        FastdiffError: too few pairs, overlapping seeds, a network without gradients.
    """

    def __init__(self, plan: Plan, train: Pairs, validation: Pairs, config: TuneConfig, state: Path | None = None) -> None:
        if train.setup.n < config.batch:
            raise FastdiffError(f"{train.setup.n} pairs are fewer than one batch of {config.batch}: give more pairs")
        a, b = ({*range(s.first_seed, s.first_seed + s.n)} for s in (train.setup, validation.setup))
        if a & b:
            raise FastdiffError(f"training and validation share {len(a & b)} seeds: give other ones")
        self.config, self.train, self.validation, self.state_path = config, train, validation, state
        self.source = plan
        self.table = LearnedTable(plan, train.denoiser.schedule, config.freedom)
        trainable = [p for p in self.table.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(trainable, lr=config.lr, eps=1e-15)  # gradients of late nodes are tiny
        self.start_error = paired_error(plan, validation)
        self.scale = self.start_error / 2
        self.best, self.best_error, self.step = plan, self.start_error, 0
        self._check_gradients()
        if state is not None and state.exists():
            self._resume()

    def run(self, budget: float = math.inf, callback: Callable[[Progress], None] | None = None) -> Plan:
        """Trains to `config.steps` or for `budget` seconds; an interrupt keeps the best table so far in `best`."""
        began = time.monotonic()
        while self.step < self.config.steps and time.monotonic() - began < budget:
            loss = self.train_step()
            if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
                self._consider()
                self.save()
            if callback:
                callback(Progress(self.step, loss, self.best_error, self.start_error))
        return self.best

    def train_step(self) -> float:
        c = self.config
        generator = torch.Generator().manual_seed(c.seed * 1_000_003 + self.step)
        den, noise, target = self.train.batch(torch.randperm(self.train.setup.n, generator=generator)[: c.batch])
        for group in self.optimiser.param_groups:
            group["lr"] = c.lr * (0.05 + 0.95 * (1 + math.cos(math.pi * self.step / c.steps)) / 2)
        x = self.table(den, noise * self.source.start[1], c.checkpointing)
        loss = endpoint_error(x, target, self.scale)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if all(bool(p.grad.isfinite().all()) for p in self.table.parameters() if p.grad is not None):
            self.optimiser.step()
        self.step += 1
        return float(loss.detach())

    def _consider(self) -> None:
        candidate = self.table.plan(f"tuned-{len(self.source.rows)}", {})
        error = paired_error(candidate, self.validation)
        if error < self.best_error:
            self.best, self.best_error = candidate, error

    def _check_gradients(self) -> None:
        den, noise, _ = self.train.batch(torch.arange(2))
        times = self.table.times()
        x = noise * self.source.start[1]
        d = den(x.requires_grad_(), times[0].detach().expand(2))
        if not d.requires_grad:
            raise FastdiffError("the network passes no gradient from its output to its input: it cannot be tuned by gradients")

    def provenance(self) -> dict[str, Any]:
        """Where the best plan comes from: kept in its file."""
        den = self.train.denoiser
        return {
            "tuned_for": {"checkpoint": den.hash, "prediction": den.prediction, "schedule": den.schedule.config(),
                          "guidance": self.train.setup.guidance},
            "started_from": self.source.name, "settings": asdict(self.config), "steps_done": self.step,
            "train_seeds": [self.train.setup.first_seed, self.train.setup.n],
            "validation_seeds": [self.validation.setup.first_seed, self.validation.setup.n],
            "validation_rmse": {"before": self.start_error, "after": self.best_error},
        }  # fmt: skip

    def save(self) -> None:
        """The state from which the run goes on bit for bit."""
        if self.state_path is None:
            return
        buffer = io.BytesIO()
        torch.save({
            "settings": asdict(self.config), "source": self.source.to_json(), "step": self.step, "best": self.best.to_json(),
            "best_error": self.best_error, "table": self.table.state_dict(), "optimiser": self.optimiser.state_dict(),
        }, buffer)  # fmt: skip
        write_bytes(self.state_path, buffer.getvalue())

    def _resume(self) -> None:
        assert self.state_path is not None
        state = torch.load(self.state_path, weights_only=True)
        if state["settings"] != asdict(self.config) or state["source"] != self.source.to_json():
            raise FastdiffError(f"{self.state_path} belongs to another tuning run: give its settings, or another --out")
        self.step, self.best_error = state["step"], state["best_error"]
        self.best = Plan.from_json(state["best"])
        self.table.load_state_dict(state["table"])
        self.optimiser.load_state_dict(state["optimiser"])
