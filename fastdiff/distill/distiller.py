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
from torch import Tensor, nn

from ..checkpoints import load, native, others
from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..files import write_bytes
from ..guide import cfg
from ..models import UNet
from ..parallel import join
from ..resume import check_same, read_state
from ..training.data import Images, batch_indices
from ..training.parallel import gathered, load_network, load_optimiser, local, spread, whole, wrap
from ..training.skips import Skips
from . import lora
from .match import Match
from .method import Batch, Method, Stage
from .students import check_data, fingerprint, frozen, own_format, placed, student_network


@dataclass(frozen=True)
class Settings:
    """How a run computes. A stage's batch is the global one: `accumulate` parts on each process of `torchrun` make it up.

    Args:
        clip: largest gradient norm.
        bf16: bfloat16 autocast of student, teacher and targets; the weights and their optimiser stay float32.
        checkpointing: activations are computed again in the backward pass: less memory, about a third more time.
        lora: rank of a LoRA student (peft); 0 = all weights learn. Its file is an ordinary checkpoint, its adapter beside it.
        guidance: the scale of classifier-free guidance that the teacher runs with; the student, sampled without any, does the
            same with half the calls. Any network can learn one scale; a range of them as an input is fastdiff's own U-Net's.
        sharded: under `torchrun`, each process holds a share of every weight (FSDP2) instead of all of them (DDP).
    """

    seed: int = 0
    clip: float = 1.0
    accumulate: int = 1
    bf16: bool = False
    checkpointing: bool = False
    lora: int = 0
    guidance: float = 1.0
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.lora:
            lora.check_rank(self.lora)
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
        teacher: any denoiser around a torch module; its network is copied for the student, and kept in eval mode and on the
            device (and sharded where the student is). The student of a network that no file describes is loaded with
            `fd.load(out, like=teacher)`.
        data: images, where the method needs them; labels are drawn evenly where there are none to take.
        out: the run's folder.
        device: where the networks are; what an update draws is the same on all of them.

    Raises:
        FastdiffError: data missing, of another shape, or a run in `out` with other settings (which ones).
    """

    def __init__(
        self, teacher: Denoiser, method: Method, out: Path, data: Images | None = None, settings: Settings | None = None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.method, self.out, self.data, self.settings = method, out, data, settings or Settings()
        self.device = torch.device(device)
        self.source, self.stages = teacher, method.stages()
        network = self._new_student()
        self._check_guidance()
        assert isinstance(teacher.network, nn.Module)
        self.fingerprint = teacher.hash or fingerprint(teacher.network)
        check_data(teacher, method, data)
        self.world = join(self.settings.sharded)
        self.parts = self.settings.accumulate * self.world.size
        _check_parts(self.stages, self.parts)
        for stage in self.stages:  # now rather than at the stage's end
            method.plan(stage, teacher.schedule), method.plans(stage, teacher.schedule)
        if self.device.index is not None and self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where FSDP puts a process's shares
        teacher, self.network = placed(teacher, self.device), network.to(self.device)
        self.source = self._whole(teacher)
        self.averages = {name: spread(frozen(copy.deepcopy(network)), self.world) for name in method.averages()}
        assert isinstance(teacher.network, nn.Module)
        self.teacher = teacher.with_network(spread(frozen(teacher.network), self.world))
        self._wrapped = wrap(network, self.world)  # the student's gradients, shared between processes
        self.student = teacher.with_network(self._wrapped, method.prediction(teacher))
        self.target = self.student.with_network(self.averages.get("target", network))
        self.stage = self.update = 0
        self.skips = Skips()
        self.losses: list[float] = []
        self._taught = False  # whether a student of this run is the teacher by now
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

    @property
    def skipped(self) -> int:
        """Updates that were not made: their gradient was not finite."""
        return self.skips.total

    def _new_student(self) -> nn.Module:
        """The student as it is before the first update."""
        network = student_network(self.source, self.method)
        s = self.settings
        if isinstance(network, UNet):
            network.checkpointing = s.checkpointing
        elif s.checkpointing:
            _checkpoint(network)
        if not s.lora:
            return network
        if isinstance(self.method, Match):
            raise FastdiffError("a LoRA student is its teacher's own weights and a term beside them: leave out --network and "
                                "--prediction, or --lora")  # fmt: skip
        return lora.adapt(network, s.lora)

    def _whole(self, teacher: Denoiser) -> Denoiser:
        """The teacher to make further networks and samples of: itself, or before its network is sharded a copy of it, where only
        a copy makes another (in main memory)."""
        if not self.world.sharded or own_format(teacher):
            return teacher
        return teacher.with_network(copy.deepcopy(teacher.network).cpu())  # type: ignore[attr-defined]

    def _check_guidance(self) -> None:
        """
        Raises:
            FastdiffError: guidance of a teacher that knows none, or beside a method that has scales of its own.
        """
        scale = self.settings.guidance
        if scale == 1.0:
            return
        method = self.method.then if isinstance(self.method, Match) else self.method
        if not method.asks_teacher:
            raise FastdiffError(f"{method.name} never asks the teacher, so its guidance teaches nothing: leave it out")
        if getattr(method, "scales", None) or getattr(self.source.network, "guidance_range", None):
            raise FastdiffError("one scale of guidance, or a range of them as an input: leave out guidance or scales")
        labels = {"class_labels": torch.zeros(1, dtype=torch.long)} if self.source.num_classes else {}
        teacher = self.source.bind(**labels)
        cfg(teacher, scale, negative=teacher.unprompted)

    def run(self, callback: Callable[[Progress], None] | None = None, save_every: float = 60.0) -> Denoiser:
        """Trains to the end of the last stage; an exception saves the updates done. Returns the student with its plan."""
        saved = began = time.monotonic()
        images, stopped = 0, False
        try:
            while not self.finished:
                stage = self.stages[self.stage]
                if self.update == stage.updates:
                    self._finish(stage)
                    continue
                loss = self.step(stage)
                images += stage.batch
                now = time.monotonic()
                told = _interrupted(callback, Progress(self.stage, self.update, loss, images / max(now - began, 1e-9)))
                if stopped := self.world.any(told):
                    raise KeyboardInterrupt
                if self.world.any(now - saved > save_every):
                    self.save()
                    saved = now
        finally:
            # what ends one process alone, an error, cannot gather the shares of all
            if images and not self.finished and (stopped or not self.world.sharded):
                self.save()
        self.world.wait()
        like = self.source if others.by_class(self.source) else None
        return load(self.out / "model.safetensors", like=like).to(self.device)

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
        norm = whole(nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip))
        if self.skips.usable(norm, self.update):
            self.optimiser.step()
            self._update_averages()
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
        if self.settings.guidance != 1.0 and not self._taught:
            teacher = cfg(teacher, self.settings.guidance, negative=teacher.unprompted)
        with torch.autocast(batch.noise.device.type, torch.bfloat16, enabled=self.settings.bf16), gathered(self.world.sharded):
            loss = self.method.loss(student, teacher, target, batch) / self.settings.accumulate
        loss.backward()
        return float(loss.detach())

    def _batch(self, stage: Stage, part: int) -> Batch:
        """One of the parts of an update's batch: every part has draws of its own, so that parts may be anywhere."""
        number, n = sum(s.updates for s in self.stages[: self.stage]) + self.update, stage.batch // self.parts
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number + part * 500_000_003)
        assert self.source.shape is not None
        noise = torch.randn((n, *self.source.shape), generator=generator)
        classes = self.source.num_classes
        x0 = labels = scales = None
        if self.data is not None and self.method.needs_data:
            index = batch_indices(len(self.data.x), stage.batch, number, self.settings.seed)[part :: self.parts]
            x0 = self.data.x[index].float() / 127.5 - 1
            labels = self.data.y[index] if self.data.y is not None and classes else None
        if labels is None and classes:
            labels = torch.randint(classes, (n,), generator=generator)
        span = getattr(self.network, "guidance_range", None)
        if span is not None:
            scales = span[0] + (span[1] - span[0]) * torch.rand(n, generator=generator)
        x0, labels, scales = (None if v is None else v.to(self.device) for v in (x0, labels, scales))
        return Batch(x0, noise.to(self.device), labels, generator, scales)

    @torch.no_grad()
    def _update_averages(self) -> None:
        done = sum(s.updates for s in self.stages[: self.stage]) + self.update
        for name, decay in self.method.averages().items():
            # the saved average starts short; the one that makes targets keeps its decay, which is part of the method
            now = min(decay, (1 + done) / (10 + done)) if name == "final" else decay
            torch._foreach_lerp_(list(self.averages[name].parameters()), list(self.network.parameters()), 1 - now)

    def _begin(self) -> None:
        """A stage's fresh optimiser, and what its method prepares."""
        learning = [p for p in self.network.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(learning, lr=self.stages[0].lr)
        if not self.finished:
            self.method.begin(self.stage, self.source.schedule)

    def _finish(self, stage: Stage) -> None:
        """Writes the stage's model, makes it the teacher where the method says so, and begins the next."""
        student = self._in_one_piece(self.saved_network)
        if self.world.first:
            description, weights = self._description(stage), others.weights_of(self._merged(student))
            native.save(self.out / f"stage-{self.stage + 1}-steps-{stage.steps}.safetensors", weights, description)
            native.save(self.out / "model.safetensors", weights, description)
            if self.settings.lora:
                lora.write(student, self.out / "adapter")
        if self.method.hands_on(self.stage):
            self._teach_with(self._merged(self._in_one_piece(self.network)).state_dict())
        self.stage, self.update = self.stage + 1, 0
        self._begin()
        self.save()

    def _in_one_piece(self, network: nn.Module) -> nn.Module:
        """The student's or an average's network with all its weights; every process must ask for it."""
        if not self.world.sharded:
            return network
        empty = self._another()
        fresh = lora.adapt(empty, self.settings.lora) if self.settings.lora else empty
        fresh.load_state_dict(whole(network.state_dict()))
        return fresh

    def _merged(self, network: nn.Module) -> nn.Module:
        return lora.merged(network) if self.settings.lora else network

    def _teach_with(self, weights: dict[str, Tensor]) -> None:
        """A student's weights become the teacher."""
        network = self._another()
        network.load_state_dict(weights)
        self.teacher = self.student.with_network(spread(frozen(network).to(self.device), self.world))
        self._taught = True

    def _another(self) -> nn.Module:
        """A network like the student's, for other weights."""
        if own_format(self.source):
            return UNet(self.network.config)  # type: ignore[arg-type]
        assert isinstance(self.source.network, nn.Module)
        return copy.deepcopy(self.source.network)

    def _description(self, stage: Stage) -> dict[str, Any]:
        training = self.source.info.get("training", {})
        about = {**self._identity(), "steps": stage.steps, "updates_done": sum(s.updates for s in self.stages[: self.stage + 1])}
        kept = {k: v for k, v in training.items() if k == "data_sha256"}
        own = own_format(self.source)
        network = {"network": self.network.config.asdict()} if own else others.described(self.source)  # type: ignore[operator, union-attr]
        return {
            **{k: v for k, v in self.source.info.items() if k != "format"}, "training": {**kept, "distilled": about},
            **network, "prediction": self.student.prediction,
            "plan": self.method.plan(stage, self.source.schedule).to_json(),
            "plans": [plan.to_json() for plan in self.method.plans(stage, self.source.schedule)],
        }  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        """What another run would not share."""
        how = {k: v for k, v in asdict(self.settings).items() if k not in ("accumulate", "sharded")}
        return {
            "method": self.method.name, **self.method.settings(), **how, "parts": self.parts, "teacher": self.fingerprint,
            "data_sha256": self.data.digest if self.data else None,
        }  # fmt: skip

    def save(self) -> None:
        """The state from which the run goes on bit for bit, written by the first process."""
        state = {
            "identity": self._identity(), "stage": self.stage, "update": self.update, "skipped": self.skipped,
            "losses": torch.tensor(self.losses, dtype=torch.float32), "student": whole(self.network.state_dict()),
            "averages": {name: whole(network.state_dict()) for name, network in self.averages.items()},
            "teacher": whole(self.teacher.network.state_dict()) if self._taught else None,  # type: ignore[attr-defined]
            "optimiser": whole(self.optimiser.state_dict()),
        }  # fmt: skip
        if not self.world.first:
            return
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(self.out / "state.pt", buffer.getvalue())

    def _resume(self) -> None:
        state = read_state(self.out / "state.pt", "identity", "averages")
        check_same(self.out, state["identity"], self._identity())
        self.stage, self.update, self.skips = state["stage"], state["update"], Skips(state["skipped"])
        self.losses = state["losses"].tolist()
        load_network(self.network, state["student"])
        for name, weights in state["averages"].items():
            load_network(self.averages[name], weights)
        if state["teacher"] is not None:
            self._teach_with(state["teacher"])
        self._begin()
        load_optimiser(self.optimiser, state["optimiser"])


def _checkpoint(network: nn.Module) -> None:
    """Has the network of another library compute activations twice, in the way of diffusers.

    Raises:
        FastdiffError: a network that has no such mode.
    """
    able = next((m for m in network.modules() if callable(getattr(m, "enable_gradient_checkpointing", None))), None)
    if able is None or getattr(able, "_supports_gradient_checkpointing", True) is False:
        name = type(able or network).__name__
        raise FastdiffError(f"checkpointing: a {name} has no such mode (enable_gradient_checkpointing); leave it out")
    able.enable_gradient_checkpointing()  # type: ignore[operator]


def _interrupted(callback: Callable[[Progress], None] | None, progress: Progress) -> bool:
    """Calls it; whether it asked for the end, which the processes then make together."""
    try:
        if callback:
            callback(progress)
    except KeyboardInterrupt:
        return True
    return False


def _check_parts(stages: list[Stage], parts: int) -> None:
    if uneven := [stage.batch for stage in stages if stage.batch % parts]:
        raise FastdiffError(f"a batch of {uneven[0]} cannot be cut into {parts} equal parts (accumulation times processes)")
