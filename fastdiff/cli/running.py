"""What long commands share: an interrupt that waits for the end of a step, and the loss curve."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from .console import say


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait for the end of a step, so that what is saved is whole; a second one does not wait."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def plot_losses(values: list[float], path: Path) -> None:
    """The loss curve, as means over 1 % of the run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no loss.png: pip install 'fastdiff[plots]' for pictures")
        return
    from ..files import atomic

    width = max(len(values) // 100, 1)
    means = [sum(values[i : i + width]) / width for i in range(0, len(values) - width + 1, width)]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    axes.plot([(i + 0.5) * width for i in range(len(means))], means)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
