"""A network's weights on several processes: DistributedDataParallel (each has all) or FSDP2 (each a share of each one)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import FastdiffError
from ..models.unet import EmbedSequential
from ..parallel import World

REACHES_IN = ("DiTTransformer2DModel",)  # of diffusers: its end reads an embedding of its first block


def wrap(network: nn.Module, world: World) -> nn.Module:
    """The network whose gradients are means over the processes."""
    if world.size == 1:
        return network
    if world.sharded:
        return spread(network, world)
    return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def spread(network: nn.Module, world: World) -> nn.Module:
    """The network itself, its weights cut into the processes' shares where they are sharded.

    A block's weights are gathered for its own forward or backward pass alone: the blocks of our own U-Net, the entries of other
    networks' module lists. Without `reshard_after_forward` the root's would stay gathered after a pass without gradients, and an
    average of weights would be taken of the copy.
    """
    if world.sharded:
        mesh = init_device_mesh(next(network.parameters()).device.type, (world.size,))
        for part in (*_blocks(network), network):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return network


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The parts that are gathered by themselves, inner ones first; none of a network known to reach into them from outside."""
    ours: list[nn.Module] = [m for m in network.modules() if isinstance(m, EmbedSequential)]
    if ours:
        return ours
    if any(type(m).__name__ in REACHES_IN for m in network.modules()):
        return []
    listed = {id(m) for parts in network.modules() if isinstance(parts, nn.ModuleList) for m in parts if [*m.children()]}
    return [m for m in reversed(list(network.modules())) if id(m) in listed and type(m).forward is not nn.Module.forward]


@contextlib.contextmanager
def gathered(sharded: bool) -> Iterator[None]:
    """
    Raises:
        FastdiffError: inside, a sharded network met weights that are not gathered.
    """
    try:
        yield
    except RuntimeError as e:
        if not sharded or "DTensor" not in str(e):
            raise
        raise FastdiffError("this network uses weights of a block outside of the block's own call, where shares of them are not "
                            "gathered: leave out --fsdp") from e  # fmt: skip


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
