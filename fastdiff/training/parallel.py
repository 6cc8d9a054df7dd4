"""Training on several processes: plain `torchrun`, with DistributedDataParallel (every process holds the whole network) or FSDP2
(each holds a share of every weight); one process is a world of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import FastdiffError
from ..models.unet import EmbedSequential


@dataclass(frozen=True)
class World:
    """This process among those that train together; the first alone writes files. `sharded`: by FSDP2, else by DDP."""

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network whose gradients are means over the processes."""
        if self.size == 1:
            return network
        if self.sharded:
            return self.spread(network)
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)

    def spread(self, network: nn.Module) -> nn.Module:
        """The network itself, its weights cut into the processes' shares where they are sharded.

        A block's weights are gathered for its own forward or backward pass alone; without `reshard_after_forward` the root's
        would stay gathered after a pass without gradients, and an average of weights would be taken of the copy.
        """
        if self.sharded:
            blocks = [m for m in network.modules() if isinstance(m, EmbedSequential)]
            for part in (*blocks, network):
                fully_shard(part, mesh=self._mesh(network), reshard_after_forward=True)
        return network

    def mean(self, value: float) -> float:
        """The mean of every process's value."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self.size

    def any(self, flag: bool) -> bool:
        """Whether any process says so: what all of them must do together, they decide together."""
        return self.mean(float(flag)) > 0

    def wait(self) -> None:
        """Until every process is here: a file that the first wrote is then whole."""
        if self.size > 1:
            dist.barrier()

    def _mesh(self, network: nn.Module) -> dist.DeviceMesh:
        return dist.init_device_mesh(next(network.parameters()).device.type, (self.size,))


def join(sharded: bool = False) -> World:
    """The world that `torchrun` describes, or a world of one.

    Raises:
        FastdiffError: shards asked for, with one process to hold them all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if sharded:
            raise FastdiffError("shards are the processes' of torchrun: start it with torchrun --nproc-per-node 2 or more")
        return World()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return World(dist.get_rank(), dist.get_world_size(), sharded)


@contextlib.contextmanager
def local(network: nn.Module) -> Iterator[None]:
    """Backward passes inside add to the gradients of this process alone; the first one after it shares them all."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        with network.no_sync():
            yield
    elif isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(False)
        yield
        network.set_requires_gradient_sync(True)
    else:
        yield


def whole(tree: Any) -> Any:
    """A tensor, or a dictionary of them, with every share gathered: every process must ask for it, and each gets it."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return tree


def load_network(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Whole weights into a network, of which a sharded one takes this process's share."""
    own = network.state_dict()
    network.load_state_dict({name: _share(value, own.get(name)) for name, value in weights.items()})


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """A whole optimiser's state (`whole(optimiser.state_dict())`), of which each process takes its shares."""
    optimiser.load_state_dict(state)
    for parameter, moments in optimiser.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = _share(value, parameter)


def _share(value: Tensor, like: Tensor | None) -> Tensor:
    """This process's share of a whole tensor, cut as the parameter it is for."""
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
