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
from ..training.data import Images, batch_indices
from ..training.resume import check_same, read_state
from .method import Batch, Method, Stage

REPEATED = 10  # steps with a non-finite gradient that stop a run


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
        self, teacher: Denoiser, method: Method, out: Path, data: Images | None = None, seed: int = 0, clip: float = 1.0
    ) -> None:
        if not isinstance(teacher.network, nn.Module) or not teacher.info:
            raise FastdiffError("a teacher is a checkpoint of fastdiff's own format: its description goes into the student's")
        self.source, self.stages = teacher, method.stages()
        _check_data(teacher, method, data)
        self.method, self.out, self.data, self.seed, self.clip = method, out, data, seed, clip
        self.teacher = _with_network(teacher, teacher.network)
        self.student = _with_network(teacher, copy.deepcopy(teacher.network))
        self.stage = self.update = self.skipped = 0
        self.losses: list[float] = []
        self._begin()
        if (out / "state.pt").exists():
            self._resume()

    @property
    def finished(self) -> bool:
        return self.stage == len(self.stages)

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
        return native.load(self.out / "model.safetensors")

    def step(self, stage: Stage) -> float:
        """One update, on the material that (seed, stage, update) determine."""
        batch = self._batch(stage)
        network = self._network
        for group in self.optimiser.param_groups:
            group["lr"] = stage.lr * (1 - self.update / stage.updates)
        student, teacher = self.student, self.teacher
        if batch.labels is not None:
            student, teacher = (d.bind(class_labels=batch.labels) for d in (student, teacher))
        loss = self.method.loss(student, teacher, batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), self.clip)
        if bool(norm.isfinite()):
            self.optimiser.step()
        else:
            self.skipped += 1
            if self.skipped >= REPEATED:
                raise FastdiffError(f"{REPEATED} updates had a non-finite gradient (the last is {self.update}): lower the rate")
        self.update += 1
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    @property
    def _network(self) -> nn.Module:
        assert isinstance(self.student.network, nn.Module)
        return self.student.network

    def _batch(self, stage: Stage) -> Batch:
        number = sum(s.updates for s in self.stages[: self.stage]) + self.update
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        assert self.source.shape is not None
        noise = torch.randn((stage.batch, *self.source.shape), generator=generator)
        classes = getattr(self.source.network, "null_label", None)
        x0 = labels = None
        if self.data is not None and self.method.needs_data:
            index = batch_indices(len(self.data.x), stage.batch, number, self.seed)
            x0 = self.data.x[index].float() / 127.5 - 1
            labels = self.data.y[index] if self.data.y is not None and classes is not None else None
        elif classes is not None:
            labels = torch.randint(classes, (stage.batch,), generator=generator)
        return Batch(x0, noise, labels, generator)

    def _begin(self) -> None:
        """A stage's fresh optimiser, and what its method prepares."""
        self.optimiser = torch.optim.Adam(self._network.requires_grad_(True).parameters(), lr=self.stages[0].lr)
        if not self.finished:
            self.method.begin(self.stages[self.stage], self.source.schedule)

    def _finish(self, stage: Stage) -> None:
        """Writes the stage's model, makes it the teacher where the method says so, and begins the next."""
        description = self._description(stage)
        weights = self._network.state_dict()
        native.save(self.out / f"stage-{self.stage + 1}-steps-{stage.steps}.safetensors", weights, description)
        native.save(self.out / "model.safetensors", weights, description)
        if self.method.chained:
            self.teacher = _with_network(self.source, copy.deepcopy(self._network))
        self.stage, self.update = self.stage + 1, 0
        self._begin()
        self.save()

    def _description(self, stage: Stage) -> dict[str, Any]:
        training = self.source.info.get("training", {})
        about = {**self._identity(), "steps": stage.steps, "updates_done": sum(s.updates for s in self.stages[: self.stage + 1])}
        kept = {k: v for k, v in training.items() if k == "data_sha256"}
        return {
            **{k: v for k, v in self.source.info.items() if k != "format"}, "training": {**kept, "distilled": about},
            "plan": self.method.plan(stage, self.source.schedule).to_json(),
        }  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        """What another run would not share."""
        settings = {k: v for k, v in asdict(self.method).items() if not k.startswith("_")}  # type: ignore[call-overload]
        return {
            "method": self.method.name, **settings, "seed": self.seed, "clip": self.clip, "teacher": self.source.hash,
            "data_sha256": self.data.digest if self.data else None,
        }  # fmt: skip

    def save(self) -> None:
        """The state from which the run goes on bit for bit."""
        state = {
            "identity": self._identity(), "stage": self.stage, "update": self.update, "skipped": self.skipped,
            "losses": torch.tensor(self.losses, dtype=torch.float32), "student": self._network.state_dict(),
            "teacher": self.teacher.network.state_dict() if self.method.chained and self.stage else None,  # type: ignore[attr-defined]
            "optimiser": self.optimiser.state_dict(),
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(self.out / "state.pt", buffer.getvalue())

    def _resume(self) -> None:
        state = read_state(self.out / "state.pt", "identity")
        check_same(self.out, state["identity"], self._identity())
        self.stage, self.update, self.skipped = state["stage"], state["update"], state["skipped"]
        self.losses = state["losses"].tolist()
        self._network.load_state_dict(state["student"])
        if state["teacher"] is not None:
            self.teacher = _with_network(self.source, copy.deepcopy(self._network))
            self.teacher.network.load_state_dict(state["teacher"])  # type: ignore[attr-defined]
        self._begin()
        self.optimiser.load_state_dict(state["optimiser"])


def _with_network(denoiser: Denoiser, network: Any) -> Denoiser:
    """The denoiser around another network, in eval mode and without gradients of its own."""
    out = copy.copy(denoiser)
    out.network, out.plan, out.tuned = network.eval().requires_grad_(False), None, ()
    return out


def _check_data(teacher: Denoiser, method: Method, data: Images | None) -> None:
    if method.needs_data and data is None:
        raise FastdiffError(f"{method.name} distillation needs images: give --data")
    if data is not None and tuple(data.x.shape[1:]) != teacher.shape:
        raise FastdiffError(f"the teacher makes samples of shape {teacher.shape}, the data have {tuple(data.x.shape[1:])}")
    if data is not None and data.y is not None:
        classes = getattr(teacher.network, "null_label", None)
        if classes is not None and data.num_classes > classes:
            raise FastdiffError(f"the data have {data.num_classes} classes, the teacher knows {classes}")

