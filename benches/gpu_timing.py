"""Times on the GPU: in CUDA-graph replay, and launched from Python. On a CPU, a dry run's, both are the clock's."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

DEVICE = torch.device(os.environ.get("FASTDIFF_STAGE_DEVICE", "cuda"))  # cpu for a dry run
WARM = "FASTDIFF_STAGE_WARM"  # where this is set nothing is timed, but everything compiled
BEYOND_L2 = 256 * 2**20  # bytes that a contestant's buffers take together; the largest L2 (H200: 60 MB) holds a quarter
ROUNDS = 15


def replayed(calls: Sequence[Callable[[], Any]]) -> float:
    """Median microseconds a call, inside the replay of one CUDA graph that makes all of them in turn."""
    if warm() or DEVICE.type == "cpu":
        return launched(calls)
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
    times = [elapsed(graph.replay) for _ in range(ROUNDS + 2)][2:]
    del kept
    return statistics.median(times) * 1000 / len(calls)


def launched(calls: Sequence[Callable[[], Any]], rounds: int | None = None) -> float:
    """Median microseconds a call when Python launches each: what a caller without graphs waits for."""
    if warm():
        calls[0]()
        return math.nan

    def all_of_them() -> None:
        for call in calls:
            call()

    times = [elapsed(all_of_them) for _ in range((rounds or ROUNDS) + 2)][2:]
    return statistics.median(times) * 1000 / len(calls)


def elapsed(run: Callable[[], Any]) -> float:
    """Milliseconds of a run: between events around it, on a GPU."""
    if DEVICE.type == "cpu":
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
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


def warm() -> bool:
    return WARM in os.environ
