"""Runs a method: stages, optimiser, resume bit for bit; each finished stage is a usable model with its plan on disk."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import native
from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..files import write_bytes
from ..parallel import join, local
from ..resume import check_same, read_state
from ..training.data import Images, batch_indices
from .method import Batch, Method, Stage
from .students import check_data, frozen, student_network, with_network

REPEATED = 10  # steps with a non-finite gradient that stop a run


@dataclass(frozen=True)
class Settings:
    """How a run computes. A stage's batch is the global one: `accumulate` parts on each process of `torchrun` make it up.

    Args:
        clip: largest gradient norm.
        bf16: bfloat16 autocast of student, teacher and targets; the weights and their optimiser stay float32.
        checkpointing: activations are computed again in the backward pass: less memory, about a third more time.
    """

    seed: int = 0
    clip: float = 1.0
    accumulate: int = 1
    bf16: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.accumulate < 1 or not self.clip > 0:
            raise FastdiffError(f"accumulate must be at least 1 and clip positive; given {self.accumulate}, {self.clip:g}")


@dataclass
class Progress:
    """What a callback sees after each update."""

    stage: int
    update: int
    loss: float
    images_per_second: float


class Distiller:
    """Turns a teacher into a student of fewer steps; `run()` goes to the end, saving `model.safetensors` and `state.pt`.

    Args:
        teacher: a denoiser of our own format; its network is copied for the student, and kept in eval mode.
        data: images, where the method needs them; labels are drawn evenly where there are none to take.
        out: the run's folder.

    Raises:
        FastdiffError: data missing, of another shape, or a run in `out` with other settings (which ones).
    """

    def __init__(
        self, teacher: Denoiser, method: Method, out: Path, data: Images | None = None, settings: Settings | None = None
    ) -> None:
        self.method, self.out, self.data, self.settings = method, out, data, settings or Settings()
        self.source, self.stages = teacher, method.stages()
        network = student_network(teacher, method)
        check_data(teacher, method, data)
        self.world = join()
        self.parts = self.settings.accumulate * self.world.size
        _check_parts(self.stages, self.parts)
        for stage in self.stages:
            method.plan(stage, teacher.schedule)  # now rather than at the stage's end
        network.checkpointing = self.settings.checkpointing
        self.network: nn.Module = network
        self.averages = {name: frozen(copy.deepcopy(self.network)) for name in method.averages()}
        assert isinstance(teacher.network, nn.Module)
        self.teacher = with_network(teacher, frozen(teacher.network))
        self._wrapped = self.world.wrap(self.network)  # the student's gradients, shared between processes
        self.student = with_network(teacher, self._wrapped)
        self.target = with_network(teacher, self.averages.get("target", self.network))
        self.stage = self.update = self.skipped = 0
        self.losses: list[float] = []
        self._begin()
        if (out / "state.pt").exists():
            self._resume()

    @property
    def finished(self) -> bool:
        return self.stage == len(self.stages)

    @property
    def saved_network(self) -> nn.Module:
        """What a finished stage saves: the average of the weights where the method keeps one."""
        return self.averages.get("final", self.network)

    def run(self, callback: Callable[[Progress], None] | None = None, save_every: float = 60.0) -> Denoiser:
        """Trains to the end of the last stage; an exception saves the updates done. Returns the student with its plan."""
        saved = began = time.monotonic()
        images = 0
        try:
            while not self.finished:
                stage = self.stages[self.stage]
                if self.update == stage.updates:
                    self._finish(stage)
                    continue
                loss = self.step(stage)
                images += stage.batch
                now = time.monotonic()
                if callback:
                    callback(Progress(self.stage, self.update, loss, images / max(now - began, 1e-9)))
                if now - saved > save_every:
                    self.save()
                    saved = now
        finally:
            if images and not self.finished:
                self.save()
        self.world.wait()
        return native.load(self.out / "model.safetensors")

    def step(self, stage: Stage) -> float:
        """One update, on the material that (seed, stage, update) and the number of parts determine."""
        for group in self.optimiser.param_groups:
            group["lr"] = stage.lr * (1 - self.update / stage.updates)
        self.optimiser.zero_grad(set_to_none=True)
        count, total = self.settings.accumulate, 0.0
        for i in range(count - 1):
            with local(self._wrapped):
                total += self._backward(stage, self.world.rank * count + i)
        total += self._backward(stage, self.world.rank * count + count - 1)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        if bool(norm.isfinite()):
            self.optimiser.step()
            self._update_averages()
        else:
            self._skip()
        self.update += 1
        self.losses.append(self.world.mean(total))
        return self.losses[-1]

    def _backward(self, stage: Stage, part: int) -> float:
        """Adds the gradient of one part of the batch; its share of this process's loss."""
        batch = self._batch(stage, part)
        bound: dict[str, Any] = {} if batch.labels is None else {"class_labels": batch.labels}
        scale: dict[str, Any] = {} if batch.scales is None else {"guidance": batch.scales}
        student, target = (d.bind(**bound, **scale) for d in (self.student, self.target))
        takes = getattr(self.teacher.network, "guidance_range", None) is not None
        teacher = self.teacher.bind(**bound, **(scale if takes else {}))
        with torch.autocast(batch.noise.device.type, torch.bfloat16, enabled=self.settings.bf16):
            loss = self.method.loss(student, teacher, target, batch) / self.settings.accumulate
        loss.backward()
        return float(loss.detach())

    def _batch(self, stage: Stage, part: int) -> Batch:
        """One of the parts of an update's batch: every part has draws of its own, so that parts may be anywhere."""
        number, n = sum(s.updates for s in self.stages[: self.stage]) + self.update, stage.batch // self.parts
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number + part * 500_000_003)
        assert self.source.shape is not None
        noise = torch.randn((n, *self.source.shape), generator=generator)
        classes = getattr(self.source.network, "null_label", None)
        x0 = labels = scales = None
        if self.data is not None and self.method.needs_data:
            index = batch_indices(len(self.data.x), stage.batch, number, self.settings.seed)[part :: self.parts]
            x0 = self.data.x[index].float() / 127.5 - 1
            labels = self.data.y[index] if self.data.y is not None and classes is not None else None
        if labels is None and classes is not None:
            labels = torch.randint(classes, (n,), generator=generator)
        span = getattr(self.network, "guidance_range", None)
        if span is not None:
            scales = span[0] + (span[1] - span[0]) * torch.rand(n, generator=generator)
        return Batch(x0, noise, labels, generator, scales)

    def _skip(self) -> None:
        """A step with a non-finite gradient changes nothing; repeated, they stop the run."""
        self.skipped += 1
        if self.skipped >= REPEATED:
            raise FastdiffError(f"{REPEATED} updates had a non-finite gradient (the last is {self.update}): lower the rate")

    @torch.no_grad()
    def _update_averages(self) -> None:
        done = sum(s.updates for s in self.stages[: self.stage]) + self.update
        for name, decay in self.method.averages().items():
            # the saved average starts short; the one that makes targets keeps its decay, which is part of the method
            now = min(decay, (1 + done) / (10 + done)) if name == "final" else decay
            torch._foreach_lerp_(list(self.averages[name].parameters()), list(self.network.parameters()), 1 - now)

    def _begin(self) -> None:
        """A stage's fresh optimiser, and what its method prepares."""
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=self.stages[0].lr)
        if not self.finished:
            self.method.begin(self.stage, self.source.schedule)

    def _finish(self, stage: Stage) -> None:
        """Writes the stage's model, makes it the teacher where the method says so, and begins the next."""
        if self.world.first:
            description, weights = self._description(stage), self.saved_network.state_dict()
            native.save(self.out / f"stage-{self.stage + 1}-steps-{stage.steps}.safetensors", weights, description)
            native.save(self.out / "model.safetensors", weights, description)
        if self.method.chained:
            self.teacher = with_network(self.source, frozen(copy.deepcopy(self.network)))
        self.stage, self.update = self.stage + 1, 0
        self._begin()
        self.save()

    def _description(self, stage: Stage) -> dict[str, Any]:
        training = self.source.info.get("training", {})
        about = {**self._identity(), "steps": stage.steps, "updates_done": sum(s.updates for s in self.stages[: self.stage + 1])}
        kept = {k: v for k, v in training.items() if k == "data_sha256"}
        return {
            **{k: v for k, v in self.source.info.items() if k != "format"}, "training": {**kept, "distilled": about},
            "network": self.network.config.asdict(),  # type: ignore[operator, union-attr]
            "plan": self.method.plan(stage, self.source.schedule).to_json(),
        }  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        """What another run would not share."""
        mine = {k: v for k, v in asdict(self.method).items() if not k.startswith("_")}  # type: ignore[call-overload]
        how = {k: v for k, v in asdict(self.settings).items() if k != "accumulate"}
        return {
            "method": self.method.name, **mine, **how, "parts": self.parts, "teacher": self.source.hash,
            "data_sha256": self.data.digest if self.data else None,
        }  # fmt: skip

    def save(self) -> None:
        """The state from which the run goes on bit for bit."""
        if not self.world.first:
            return
        state = {
            "identity": self._identity(), "stage": self.stage, "update": self.update, "skipped": self.skipped,
            "losses": torch.tensor(self.losses, dtype=torch.float32), "student": self.network.state_dict(),
            "averages": {name: network.state_dict() for name, network in self.averages.items()},
            "teacher": self.teacher.network.state_dict() if self.method.chained and self.stage else None,  # type: ignore[attr-defined]
            "optimiser": self.optimiser.state_dict(),
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(self.out / "state.pt", buffer.getvalue())

    def _resume(self) -> None:
        state = read_state(self.out / "state.pt", "identity", "averages")
        check_same(self.out, state["identity"], self._identity())
        self.stage, self.update, self.skipped = state["stage"], state["update"], state["skipped"]
        self.losses = state["losses"].tolist()
        self.network.load_state_dict(state["student"])
        for name, weights in state["averages"].items():
            self.averages[name].load_state_dict(weights)
        if state["teacher"] is not None:
            self.teacher = with_network(self.source, frozen(copy.deepcopy(self.network)))
            self.teacher.network.load_state_dict(state["teacher"])  # type: ignore[attr-defined]
        self._begin()
        self.optimiser.load_state_dict(state["optimiser"])


def _check_parts(stages: list[Stage], parts: int) -> None:
    if uneven := [stage.batch for stage in stages if stage.batch % parts]:
        raise FastdiffError(f"a batch of {uneven[0]} cannot be cut into {parts} equal parts (accumulation times processes)")
