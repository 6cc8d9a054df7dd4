"""Several processes of one run, as plain `torchrun` starts them; one process is a world of one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import FastdiffError

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # how long the others are waited for: a process that died is noticed at once all the same


@dataclass(frozen=True)
class World:
    """This process among those of its run; the first alone writes what they share. `sharded`: each has part of each weight."""

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The GPU of this process where several share a machine; None where there is nothing to share."""
        if self.size == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    def mine(self, parts: Sequence[T]) -> Sequence[T]:
        """This process's share: every `size`-th part."""
        return parts[self.rank :: self.size]

    def mean(self, value: float) -> float:
        """The mean of every process's value."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self.size

    def any(self, flag: bool) -> bool:
        """Whether it holds on some process: all then do the same."""
        return self.mean(float(flag)) > 0

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first process, on every one; so too the mistake that it raises there."""
        if self.size == 1:
            return make()
        box: list[Any] = [None]
        if self.first:
            try:
                box = [make()]
            except FastdiffError as e:
                box = [e]
        dist.broadcast_object_list(box)
        if isinstance(box[0], FastdiffError):
            raise box[0]
        return box[0]

    def wait(self) -> None:
        """Until every process is here: a file that the first wrote is then whole.

        Raises:
            FastdiffError: another process died before it came; its rank.
        """
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(timeout=PATIENCE, wait_all_ranks=True)
        except RuntimeError as e:
            # "[Rank 0]: Ranks 1, 3 failed to pass monitoredBarrier ...", or gloo's own words where a connection broke while it
            # waited; the other processes only see the first one fail
            found = re.search(r"Ranks? ([\d, ]*\d) failed", str(e))
            others = "rank 1" if self.size == 2 else f"one of ranks 1 to {self.size - 1}"
            ranks = "rank 0, or one that it waited for," if not self.first else f"rank {found[1]}" if found else others
            raise FastdiffError(f"{ranks} of {self.size} processes died: start the run again; what was written is whole") from e

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Mistakes raised inside say which process they come from, where there are several."""
        try:
            yield
        except FastdiffError as e:
            if self.size == 1:
                raise
            raise FastdiffError(f"rank {self.rank} of {self.size} processes: {e}") from e


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
