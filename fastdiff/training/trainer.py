"""Training a diffusion network: resumable bit for bit, since draws are functions of seed, step and place in the batch.

Under `torchrun` the processes share every batch, and what an image meets does not depend on which of them has it. The bits are
those of one kind of device: a run may go on elsewhere, by other draws.
"""

from __future__ import annotations

import copy
import io
import operator
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..checkpoints import native
from ..checkpoints.conditions import Conditions
from ..compiled import not_compiled
from ..denoiser import Denoiser, rows_of
from ..errors import FastdiffError
from ..files import write_bytes
from ..models import UNet
from ..models.dropout import seed_dropout
from ..parallel import join
from ..resume import check_same, read_state
from . import losses
from .config import TrainConfig, made_schedule, unet_config
from .data import Images, batch_indices
from .parallel import wrap
from .skips import Skips
from .taken_over import dropped, taken_over
from .variance import bound


@dataclass
class Progress:
    """What a callback sees after each step."""

    step: int
    steps: int
    loss: float
    images_per_second: float


class Material(NamedTuple):
    """Clean images x0 (B, C, H, W), times t (B,), noisy x, unit noise eps, levels that broadcast, what the network is told."""

    x0: Tensor
    t: Tensor
    x: Tensor
    eps: Tensor
    alpha: Tensor
    sigma: Tensor
    cond: dict[str, Any]


class Trainer:
    """Holds network, EMA and optimiser; `run()` trains to the end, saving `model.safetensors` (EMA) and `state.pt`.

    With `start` the first step begins with that denoiser's weights (`continuing` makes the configuration). A network of another
    library is saved in the layout that it came in, and told what `conditions` say, one row for all images or one for each.
    Network, images and draws are on `device`.

    Raises:
        FastdiffError: resuming a run whose configuration or data differ (the message names them); a batch that the processes
            cannot share evenly.
    """

    def __init__(
        self, config: TrainConfig, data: Images, out: Path, start: Denoiser | None = None, conditions: Conditions | None = None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        self.config, self.data, self.out, self.conditions = config, data.to(self.device), out, conditions
        self.schedule, self.world = made_schedule(config.schedule), join()
        if config.batch % self.world.size:
            raise FastdiffError(f"a batch of {config.batch} cannot be shared evenly by {self.world.size} processes: change it")
        torch.manual_seed(config.seed)
        if start is None or isinstance(start.network, UNet):
            self.denoiser = self._own(start)
        else:
            self.denoiser = taken_over(start.to(self.device), self.data, conditions, config.label_dropout, bool(config.vlb))
        self.network = cast(Any, self.denoiser.network)
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        self.shared: Callable[..., Tensor] = wrap(self.network, self.world)  # its gradients are those of the whole batch
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=config.lr, weight_decay=0.0)
        self.step = 0
        self.losses: list[float] = []
        self.skips = Skips()
        if (out / "state.pt").exists():
            self._resume()

    def _own(self, start: Denoiser | None) -> Denoiser:
        """Our own U-Net, new or with the weights of `start`; the Denoiser checks the prediction's name."""
        network, scale = UNet(unet_config(self.config, self.data)).to(self.device), self.config.time_scale
        if start is not None:
            network.load_state_dict(start.network.state_dict())  # type: ignore[attr-defined]
        told = None if scale is None else partial(operator.mul, scale)
        return Denoiser(network, self.schedule, self.config.prediction, time=told)

    @property
    def skipped(self) -> int:
        """Steps that were not taken: their gradient was not finite."""
        return self.skips.total

    def compile(self) -> None:
        """Runs the network through torch.compile from now on: faster steps, after half a minute or more here.

        Raises:
            FastdiffError: torch cannot compile it; a network with dropout, whose masks are drawn sample by sample.
        """
        if isinstance(self.network, UNet) and self.network.config.dropout:
            raise FastdiffError("torch.compile would compile dropout anew in every step: leave out --compile")
        self.shared = torch.compile(self.shared)
        self.network.train(isinstance(self.network, UNet))
        try:
            self.loss(self._generator()).backward()  # what fails does so before the first step
        except Exception as e:
            raise not_compiled(e) from e
        self.optimiser.zero_grad(set_to_none=True)

    def run(self, callback: Callable[[Progress], None] | None = None, save_every: float = 60.0) -> None:
        """Trains to `config.steps`. An exception saves the steps done; SIGKILL loses `save_every` seconds at most."""
        saved = start = time.monotonic()
        first = self.step
        try:
            while self.step < self.config.steps:
                loss = self.train_step()
                now = time.monotonic()
                if callback:
                    rate = (self.step - first) * self.config.batch / max(now - start, 1e-9)
                    callback(Progress(self.step, self.config.steps, loss, rate))
                if now - saved > save_every:
                    self.save()
                    saved = time.monotonic()
        finally:
            if self.step > first:  # a run that is refused in its first step leaves nothing behind
                self.save()
        self.world.wait()

    def train_step(self) -> float:
        """One optimiser step on the images and draws that (seed, step) determine; returns the loss of the whole batch."""
        c = self.config
        generator = self._generator()
        self.network.train(isinstance(self.network, UNet))
        for group in self.optimiser.param_groups:
            group["lr"] = c.lr * min((self.step + 1) / max(c.warmup, 1), 1.0) * (1 - self.step / c.steps)
        loss = self.loss(generator)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), c.clip)
        if self.skips.usable(norm, self.step):
            self.optimiser.step()
            self._update_ema()
        self.step += 1
        self.losses.append(self.world.mean(float(loss.detach())))
        return self.losses[-1]

    def _generator(self) -> torch.Generator:
        """Of the next step's draws."""
        return torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + self.step + 500_000_000)

    def loss(self, generator: torch.Generator) -> Tensor:
        """The weighted squared error of the network's output over this process's images of one batch."""
        c = self.config
        x0, t, x, eps, alpha, sigma, cond = self._material(generator)
        k = losses.coefficients(c.prediction, alpha, sigma, self.denoiser.sigma_data)
        want = losses.target(c.prediction, x0, eps, alpha, sigma, self.denoiser.sigma_data)
        c_noise = self.denoiser._at_tensor(x, t)[1]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=c.bf16):
            got = self.denoiser.output(self.shared(x * k.c_in, c_noise, **cond))
        got, v = got.float().split(x.shape[1], dim=1) if c.vlb else (got.float(), None)
        if c.prediction == "both":
            x0_head, eps_head = got.chunk(2, dim=1)
            got = losses.joined(x0_head, eps_head, k)
        loss = (losses.weights(c.weighting, c.prediction, alpha, sigma) * (got - want).square()).mean()
        if v is None:
            return loss
        d = k.c_skip * x + k.c_out * got
        return loss + c.vlb * c.vlb_steps * bound(self.schedule, x0, x, d, v, t, c.vlb_steps).mean()

    def _material(self, generator: torch.Generator) -> Material:
        """This process's images of one batch, and what they meet.

        Every process makes the draws of the whole batch, a small part of a step's time, and keeps its own: every `size`-th. So
        image i of a batch meets the same time, noise, label and dropout in every world.
        """
        c = self.config
        index = batch_indices(len(self.data.x), c.batch, self.step, c.seed).to(self.device)
        x0 = self.data.clean(index)
        t = losses.sample_times(self.schedule, c.batch, c.times, generator)
        x, eps, alpha, sigma = losses.noised(x0, t, self.schedule, generator)
        cond = self._cond(index, generator)
        mine = slice(self.world.rank, None, self.world.size)
        first = (c.seed * 1_000_003 + self.step) * 2_654_435_761  # near 2^32 over the golden ratio: steps lie far apart
        seed_dropout(self.network, range(first, first + c.batch)[mine])
        cut = rows_of(cond, torch.arange(c.batch)[mine], c.batch)
        return Material(x0[mine], t[mine], x[mine], eps[mine], alpha[mine], sigma[mine], cut)

    def _cond(self, index: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """What the network is told of the images beside the time."""
        labels = self._labels(index, generator) if self.denoiser.num_classes else None
        out = {} if labels is None else {"class_labels": labels}
        if self.conditions is None:
            return out
        cond, negative = self.conditions.rows(index)
        if negative is not None and self.config.label_dropout:
            drop = torch.rand(len(index), generator=generator, device=index.device) < self.config.label_dropout
            cond = dropped(cond, negative, drop)
        return out | cond

    def _labels(self, index: Tensor, generator: torch.Generator) -> Tensor | None:
        if self.data.y is None:
            return None
        dropped = torch.rand(len(index), generator=generator, device=index.device) < self.config.label_dropout
        null = getattr(self.network, "null_label", None)
        if null is None:
            return self.data.y[index]
        return torch.where(dropped, null, self.data.y[index])

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))  # the average starts short
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), 1 - decay)

    def training(self) -> dict[str, Any]:
        """What the checkpoint says of how it was trained."""
        c = self.config
        name = {"device": torch.cuda.get_device_name(self.device)} if self.device.type == "cuda" else {}
        return {**asdict(c), "step": self.step, "images": self.step * c.batch, "data_sha256": self.data.digest, **name}

    def description(self) -> dict[str, Any]:
        """What a checkpoint of our own says of itself: everything a Denoiser needs and how it was trained."""
        c = self.config
        return {
            "network": self.network.config.asdict(),
            "schedule": self.schedule.config(),
            "prediction": c.prediction,
            "time_scale": c.time_scale,
            "data_range": [-1, 1],
            "shape": list(self.data.x.shape[1:]),
            "class_names": list(self.data.names),
            "training": self.training(),
        }

    def save(self) -> None:
        """Writes the EMA weights as a checkpoint and the whole state for resuming; each appears whole or not at all."""
        if not self.world.first:
            return
        if self.denoiser.write is None:
            native.save(self.out / "model.safetensors", self.ema.state_dict(), self.description())
        else:
            self.denoiser.write(self.out, self.ema, {**self.training(), "shape": list(self.data.x.shape[1:])})
        state = {
            "config": asdict(self.config),
            "data_sha256": self.data.digest,
            "step": self.step,
            "skipped": self.skipped,
            "losses": torch.tensor(self.losses, dtype=torch.float32),
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(self.out / "state.pt", buffer.getvalue())

    def _resume(self) -> None:
        state = read_state(self.out / "state.pt", "config", "data_sha256")
        # the number of steps may change: the learning rate then falls to 0 at the new end
        before = asdict(TrainConfig(steps=1)) | state["config"]  # a state from before a setting existed had its default
        then, now = ({**c, "data_sha256": d} for c, d in (
            (before, state["data_sha256"]), (asdict(self.config), self.data.digest)))  # fmt: skip
        check_same(self.out, then, now, free=("steps",))
        self.step, self.skips = state["step"], Skips(state["skipped"])
        self.losses = state["losses"].tolist()
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
