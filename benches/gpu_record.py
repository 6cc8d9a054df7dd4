"""What every stage of gpu.sh shares: the device, the record of a run, and times inside CUDA-graph replay."""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

SKIPPED = 3  # how a stage ends that lacks something, after one line that says what
RESULTS = Path(__file__).parent / "results"
BEYOND_L2 = 256 * 2**20  # bytes that a contestant's buffers take together; the largest L2 (H200: 60 MB) holds a quarter


def start() -> str:
    """The GPU's name; ends the stage as skipped, with one line, where there is none or it has no Triton."""
    if not torch.cuda.is_available():
        print(f"this stage needs an NVIDIA GPU; torch {torch.__version__} sees none")
        sys.exit(SKIPPED)
    try:
        import triton
    except ImportError as e:
        print(f"this stage needs triton ({e})")
        sys.exit(SKIPPED)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}", flush=True)
    return name


def keep(stage: str, rows: Sequence[dict[str, Any]], folder: Path = RESULTS) -> None:
    """Appends a stage's rows to today's record of this device, which appears whole or not at all."""
    from fastdiff.bench.results import versions
    from fastdiff.files import write_text

    about, now = versions(), datetime.datetime.now(datetime.UTC)
    label = re.sub("[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = folder / f"gpu-{label}-{now:%Y-%m-%d}.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    triton = metadata.version("triton") if find_spec("triton") else None
    runs.append({
        "stage": stage, **about, "triton": triton, "cuda": torch.version.cuda, "time": now.isoformat(timespec="seconds"),
        "rows": list(rows),
    })  # fmt: skip
    write_text(path, json.dumps(runs, indent=1) + "\n")
    print(f"appended {len(rows)} rows to {path}")


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A plain table: no terminal is assumed."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    cells = [names, *([plain(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()


def plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def replayed(calls: Sequence[Callable[[], Any]], rounds: int = 15) -> float:
    """Median microseconds a call, inside the replay of one CUDA graph that makes all of them in turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # alive until the timing ends, so that no call writes where another did
    times = [elapsed(graph.replay) for _ in range(rounds + 2)][2:]
    del kept
    return statistics.median(times) * 1000 / len(calls)


def launched(calls: Sequence[Callable[[], Any]], rounds: int = 15) -> float:
    """Median microseconds a call when Python launches each: what a caller without graphs waits for."""
    def all_of_them() -> None:
        for call in calls:
            call()

    times = [elapsed(all_of_them) for _ in range(rounds + 2)][2:]
    return statistics.median(times) * 1000 / len(calls)


def elapsed(run: Callable[[], Any]) -> float:
    """Milliseconds between events around a run."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def copies(bytes_each: int) -> int:
    """How many sets of buffers go beyond L2; at most 64 calls in a graph."""
    return max(2, min(64, -(-BEYOND_L2 // bytes_each)))
