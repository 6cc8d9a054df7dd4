"""The loop as a CUDA graph: captured once for each shape and dtype, replayed with new noise and with other plans.

A row is one op (fastdiff.fused). What varies lies in one table on the device: the weights of the rows, then four scalars (c_in,
c_skip, c_out, c_noise) for each call of each network. The captured kernels read it. What the loop does with these numbers is its
layout and stays: which tensors a row sums, where it draws, where guidance acts. Plans of one solver and length mostly share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import fused
from .denoiser import Denoiser
from .errors import FastdiffError
from .fused import Row
from .noise import stacked
from .plans import Plan
from .prediction import Coefficients
from .sampling import DenoiserLike, Executor

DTYPES = (torch.float32, torch.float64)
Loop = Callable[[], None]  # reads and writes tensors that stay where they are
Rows = list[tuple[Row, float]]


def record_cuda(loop: Loop) -> Loop:
    """Captures what `loop` enqueues on the current device; calling the result enqueues it again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loop()  # what a first run sets up must not be captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    return graph.replay


class Moment(float):
    """A row's time as a key of its own: two rows at one time may lie at two in the next plan."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


@dataclass(frozen=True)
class Layout:
    """What a captured loop keeps of a plan: what its rows do, and for each, where the network is called, what the denoiser takes
    from the host. A loop can run every plan of an equal layout."""

    rows: tuple[Row, ...]
    choices: tuple[tuple[Any, ...] | None, ...]

    @classmethod
    def of(cls, denoiser: DenoiserLike, plan: Plan) -> tuple[Layout, list[float]]:
        """The layout of a plan, and its table."""
        steps = fused.matrices(plan, denoiser)
        table = fused.table(steps)
        choices: list[tuple[Any, ...] | None] = []
        for row, t, *_ in steps:
            choices.append(_choices(denoiser, t) if row.call else None)
            for leaf in leaves(denoiser) if row.call else ():
                c, c_noise = leaf.level(t)
                table += [*c, c_noise]
        return cls(tuple(step.row for step in steps), tuple(choices)), table

    def bound(self, denoiser: DenoiserLike, times: list[float], table: Tensor) -> tuple[Rows, list[dict[float, Any]]]:
        """The rows with their times, and the levels of each leaf by these, 0-d tensors: the table's last entries."""
        rows: Rows = [(row, Moment(t)) for row, t in zip(self.rows, times, strict=True)]
        found = leaves(denoiser)
        levels: list[dict[float, Any]] = [{} for _ in found]
        entries = iter(table[len(table) - 4 * len(found) * sum(row.call for row in self.rows) :].unbind())
        for row, t in rows:
            for known in levels if row.call else ():
                known[t] = Coefficients(next(entries), next(entries), next(entries)), next(entries)
        return rows, levels


def leaves(denoiser: DenoiserLike) -> list[Denoiser]:
    """The denoiser's leaves that differ in their levels: bound copies of one share them."""
    found = denoiser.leaves if isinstance(denoiser, Denoiser) else ()
    return list({id(leaf.levels): leaf for leaf in found}.values())


def _choices(denoiser: DenoiserLike, t: float) -> tuple[Any, ...]:
    return denoiser.choices(t) if isinstance(denoiser, Denoiser) else (t,)


@contextmanager
def _known(denoiser: DenoiserLike, levels: list[dict[float, Any]]) -> Iterator[None]:
    """The leaves know the levels of these times."""
    found = leaves(denoiser)
    for leaf, known in zip(found, levels, strict=True):
        leaf.levels.update(known)
    try:
        yield
    finally:
        for leaf, known in zip(found, levels, strict=True):
            for t in known:
                del leaf.levels[t]


@dataclass
class Capture:
    """A captured loop's buffers, all of one dtype: x (B, *shape), noises (draws, B, *shape) and table (a vector) to out, as x."""

    x: Tensor
    noises: Tensor
    table: Tensor
    out: Tensor
    plan: Plan | None = None  # whose numbers the table holds
    replay: Loop | None = None


class Captured(Executor):
    """A denoiser's loop, captured; called as `sample`, without denoiser and plan.

    Networks and bound conditions are read where they lie: change their tensors in place, and the next call sees it.

    Args:
        device: where the buffers lie; the network must lie there too.
        record: makes a loop over fixed buffers repeatable.
    """

    def __init__(
        self, denoiser: DenoiserLike, plan: Plan | None, device: torch.device, record: Callable[[Loop], Loop] = record_cuda
    ) -> None:
        super().__init__(denoiser, plan)
        self.device, self.record = device, record
        self.layout, self.table = Layout.of(denoiser, self.plan)
        self.captures: dict[tuple[tuple[int, ...], torch.dtype], Capture] = {}

    def use(self, plan: Plan) -> None:
        """Runs this plan from the next call on, without a new capture.

        Raises:
            FastdiffError: a plan of another length, or one whose rows do other things; what was captured stays as it was.
        """
        rows, given = len(self.plan.rows), len(plan.rows)
        if given != rows:
            raise FastdiffError(
                f"this loop was captured for {rows} rows ({self.plan.name}); plan {plan.name} has {given}: capture it anew"
            )
        layout, table = Layout.of(self.denoiser, plan)
        if layout != self.layout:
            raise FastdiffError(
                f"this loop was captured for {self.plan.name}; {plan.name} differs in {self._difference(layout)}: capture it anew"
            )
        self.plan, self.table = plan, table

    def _difference(self, layout: Layout) -> str:
        if layout.choices != self.layout.choices:
            return "where guidance acts, or what else the denoiser takes from the times"
        return "what its rows sum, keep or draw"

    def execute(self, x: Tensor, noises: Tensor) -> Tensor:
        key = tuple(x.shape), x.dtype
        capture = self.captures.get(key) or self._buffers(x, noises)
        with torch.cuda.device_of(capture.x):
            if capture.plan is not self.plan:
                capture.table.copy_(torch.tensor(self.table, dtype=x.dtype))
                capture.plan = self.plan
            capture.x.copy_(x)
            capture.noises.copy_(noises)
            if capture.replay is None:
                capture.replay = self.record(self._loop_over(capture))
                self.captures[key] = capture
            capture.replay()
        return capture.out.clone()

    def _buffers(self, x: Tensor, noises: Tensor) -> Capture:
        if x.dtype not in DTYPES:
            raise FastdiffError(f"a captured loop keeps its state in float32 or float64; given {x.dtype}")
        table = torch.empty(len(self.table), dtype=x.dtype, device=self.device)
        start, draws, out = (torch.empty(v.shape, dtype=x.dtype, device=self.device) for v in (x, noises, x))
        return Capture(start, draws, table, out)

    def _loop_over(self, capture: Capture) -> Loop:
        times = [step.t for step in self.plan.program.all]
        rows, levels = self.layout.bound(self.denoiser, times, capture.table)

        def loop() -> None:
            with _known(self.denoiser, levels):
                for y in fused.points(self.denoiser, rows, capture.table, capture.x, stacked(capture.noises)):
                    point = y
                capture.out.copy_(point)

        return loop


def capture(denoiser: DenoiserLike, plan: Plan | None = None) -> Captured:
    """`sample` as a CUDA graph: captured at the first call of each shape and dtype, replayed from then on; `.use(plan)` changes
    the plan for one of the same layout.

    Raises:
        FastdiffError: no NVIDIA GPU, or a network that lies elsewhere; no plan.
    """
    if not torch.cuda.is_available():
        raise FastdiffError("a CUDA graph needs an NVIDIA GPU, and torch sees none: use fd.sample or fd.compile")
    device = getattr(denoiser, "device", torch.device("cuda"))
    if device.type != "cuda":
        raise FastdiffError(f"a CUDA graph needs the network on a GPU; it is on {device}: move it first, denoiser.to('cuda')")
    return Captured(denoiser, plan, device)
