"""Many images to a folder: in shards that appear whole or not at all, beside a manifest that says whose they are.

An image depends on its seed and class alone, so the set of them does not depend on the batch size, the number of processes or
where a run was interrupted: what is there is kept, what is missing is made. (Bit for bit where the network computes every sample
by itself. Convolutions and matrix products round differently at another batch size, which moves a pixel by a grey level now and
then.) Memory holds one shard and one batch.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import FastdiffError
from .files import remove_temporaries, write_bytes, write_text
from .parallel import World
from .resume import check_same

MANIFEST = "images.json"
KIND = "fastdiff images"
SUFFIXES = (".npz", ".png")
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One image: its seed, its class or None, and the file it goes to, which depends on these two alone."""

    seed: int
    label: int | None
    file_name: str


class Layout(ABC):
    """How a shard lies in the folder."""

    name: str

    @abstractmethod
    def files(self, number: int, part: Sequence[Request]) -> list[str]:
        """The names of a shard's files."""

    @abstractmethod
    def missing(self, folder: Path, number: int, part: list[Request]) -> list[Request]:
        """What of a shard is not there yet."""

    @abstractmethod
    def write(self, folder: Path, number: int, part: list[Request], images: Tensor) -> None:
        """Adds images (B, C, H, W) uint8: all that was missing of a shard."""


class Npz(Layout):
    """A file a shard: x (n, H, W, C) uint8, seed (n,) and, with classes, y (n,); `fastdiff train` reads such a file."""

    name = "npz"

    def files(self, number: int, part: Sequence[Request]) -> list[str]:
        return [f"shard-{number:05d}.npz"]

    def missing(self, folder: Path, number: int, part: list[Request]) -> list[Request]:
        path = folder / self.files(number, part)[0]
        if not path.exists():
            return part
        try:
            with np.load(path, allow_pickle=False) as f:
                seeds = f["seed"].tolist() if "x" in f.files else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise FastdiffError(f"{path} is damaged ({e}); delete it, and the same command makes it again") from e
        if seeds != [r.seed for r in part]:
            raise FastdiffError(f"{path} is a shard of another run (other seeds); move it away, or choose another --out")
        return []

    def write(self, folder: Path, number: int, part: list[Request], images: Tensor) -> None:
        arrays = {"x": images.permute(0, 2, 3, 1).contiguous().numpy(), "seed": np.array([r.seed for r in part], np.int64)}
        if part[0].label is not None:
            arrays["y"] = np.array([r.label for r in part], np.int64)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_bytes(folder / self.files(number, part)[0], buffer.getvalue())


class Pictures(Layout):
    """A file an image, by `encode`: (H, W, C) uint8 -> the bytes of a PNG."""

    name = "png"

    def __init__(self, encode: Callable[[np.ndarray], bytes]) -> None:
        self.encode = encode

    def files(self, number: int, part: Sequence[Request]) -> list[str]:
        return [r.file_name for r in part]

    def missing(self, folder: Path, number: int, part: list[Request]) -> list[Request]:
        return [r for r in part if not (folder / r.file_name).exists()]

    def write(self, folder: Path, number: int, part: list[Request], images: Tensor) -> None:
        for request, image in zip(part, images.permute(0, 2, 3, 1).numpy(), strict=True):
            write_bytes(folder / request.file_name, self.encode(image))


@dataclass(frozen=True)
class Work:
    """What a folder is to hold: images 0 to `count` - 1, `shard` of them at a time.

    Image i has seed i; `requests` gives a range of them, in order. `about` names everything else that their pixels depend on.
    """

    count: int
    shard: int
    layout: Layout
    requests: Callable[[Sequence[int]], list[Request]]
    about: dict[str, Any]

    @property
    def shards(self) -> range:
        return range(-(-self.count // self.shard))

    def part(self, number: int) -> list[Request]:
        return self.requests(range(number * self.shard, min((number + 1) * self.shard, self.count)))

    def manifest(self) -> dict[str, Any]:
        """What tells this folder's images from those of any other run."""
        return {KIND: 1, "format": self.layout.name, "seeds": f"0-{self.count - 1}", "shard": self.shard, **self.about}


class Stream:
    """A folder and the shards that it lacks; `run` makes this process's share of them.

    Raises:
        FastdiffError: the folder holds images of another run, or a damaged shard (which). Nothing is changed then.
    """

    def __init__(self, folder: Path, work: Work, world: World | None = None) -> None:
        self.folder, self.work, self.world = folder, work, world or World()
        self.todo = self.world.share(lambda: _open(folder, work))

    @property
    def lacking(self) -> int:
        """Images of the shards that are not whole, of all processes."""
        return sum(len(self.work.part(number)) for number in self.todo)

    @property
    def assigned(self) -> int:
        """Of those, the images that this process sees to."""
        return sum(len(self.work.part(number)) for number in self.world.mine(self.todo))

    def run(self, batches: Batches[Tensor]) -> Iterator[int]:
        """Yields a number of images each time so many more are made or found; at the end all processes are done.

        Raises:
            FastdiffError: a disk that is full, a network that fails, a process that died (which): shards written stay.
        """
        layout = self.work.layout
        with self.world.named():
            for number in self.world.mine(self.todo):
                part = self.work.part(number)
                wanted = layout.missing(self.folder, number, part)
                yield len(part) - len(wanted)
                made = []
                for images in batches(wanted):
                    made.append(images)
                    yield len(images)
                if made:
                    layout.write(self.folder, number, wanted, torch.cat(made))
        self.world.wait()


def _open(folder: Path, work: Work) -> list[int]:
    """The numbers of the shards to make, in a folder that is ours: new, without images, or of the same manifest."""
    path, mine = folder / MANIFEST, work.manifest()
    names = _names(folder)
    before = _read(path) if MANIFEST in names else None
    there = {name for name in names if name.endswith(SUFFIXES) and not name.startswith(".")}
    if there:
        if before is None:
            raise FastdiffError(f"{folder} holds images ({min(there)}) and no {MANIFEST}: choose an empty folder")
        check_same(folder, before, mine)
        ours = {name for number in work.shards for name in work.layout.files(number, work.part(number))}
        if strange := there - ours:
            raise FastdiffError(f"{folder} holds {min(strange)}, which is not of this run: move it away, or choose another --out")
    todo = [number for number in work.shards if work.layout.missing(folder, number, work.part(number))]
    if not there:  # a manifest without images keeps nobody out: its run made none
        write_text(path, json.dumps(mine, indent=1) + "\n")
    remove_temporaries(folder)
    return todo


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise FastdiffError(f"cannot look into {folder}: {e.strerror}; choose another --out") from e


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise FastdiffError(f"{path} is damaged ({e}); choose another --out") from e
    if not (isinstance(found, dict) and KIND in found):
        raise FastdiffError(f"{path} belongs to something else than `fastdiff sample -n`; choose another --out")
    return found


class Batches(Generic[T]):
    """Makes requests batch by batch. One that does not fit in memory is halved, and so are all after it.

    Args:
        make: what one batch gives.
        size: the first batch size.
        say: told when it is halved.
    """

    def __init__(self, make: Callable[[list[Request]], T], size: int, say: Callable[[str], None]) -> None:
        self.make, self.size, self.say = make, size, say

    def __call__(self, wanted: list[Request]) -> Iterator[T]:
        done = 0
        while done < len(wanted):
            part = wanted[done : done + self.size]
            for made in self._attempt(part):
                done += len(part)
                yield made

    def _attempt(self, part: list[Request]) -> list[T]:
        """The batch; nothing, and half the size for the next, where memory ran out."""
        try:
            return [self.make(part)]
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
        # outside the handler: the traceback held the batch's tensors
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if len(part) == 1:
            raise FastdiffError("not even one image fits in memory: use a smaller checkpoint or size, or another --device")
        self.size = len(part) // 2
        self.say(f"out of memory with a batch of {len(part)}: going on with {self.size}")
        return []


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, where torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
