"""What a stage of gpu.sh has measured: a run in today's file of this device, written anew at every row."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdiff.bench.results import versions
from fastdiff.files import write_text

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


class Record:
    """One run of one stage, or of one of the shares that processes beside each other have in its cases. `run["running"]` is the
    case that was begun and not ended; a process that dies leaves it there."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run

    @classmethod
    def find(cls, folder: Path, **key: Any) -> list[Record]:
        """The runs of such a stage, time (ISO 8601) and share that have written anything."""
        paths = folder.glob(f"gpu-*-{key['time'][:10]}.json")
        return [cls(path, run) for path in paths for run in json.loads(path.read_text()) if same(run, key)]

    @classmethod
    def begin(cls, folder: Path, **key: Any) -> Record:
        """That run, or a new one for the day's file."""
        if found := cls.find(folder, **key):
            return found[0]
        about = versions()
        device = re.sub("[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        triton = metadata.version("triton") if find_spec("triton") else None
        run = {**key, **about, "triton": triton, "cuda": torch.version.cuda, "rows": []}
        return cls(folder / f"gpu-{device}-{key['time'][:10]}.json", run)

    @property
    def rows(self) -> list[Row]:
        return self.run["rows"]

    def running(self, about: Row) -> None:
        self.run["running"] = about
        self.write()

    def add(self, *rows: Row) -> None:
        self.rows.extend(rows)
        self.run.pop("running", None)
        self.write()

    def write(self) -> None:
        """Puts this run into the file, which appears whole or not at all, as others do at the same time."""
        key = {name: self.run.get(name) for name in ("stage", "time", "share")}
        with locked(self.path.parent):
            runs = json.loads(self.path.read_text()) if self.path.exists() else []
            runs = [run for run in runs if not same(run, key)] + [self.run]
            write_text(self.path, json.dumps(runs, indent=1) + "\n")


def same(run: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(run.get(name) == value for name, value in key.items())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def show(rows: Sequence[Row]) -> None:
    """A plain table: no terminal is assumed."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    cells = [names, *([plain(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()


def plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
