"""The one console and the one style of progress bar."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()
errors = Console(stderr=True)
CHECKPOINT_HELP = "a checkpoint's file or folder (README: what is read), or a shipped model"
CONDITION_HELP = "what a network without its text encoders is told: .safetensors, tensors by the network's names for them"


def say(line: str) -> None:
    """A line of result, as it is: not wrapped, and brackets in a path are no markup."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def progress_bar(shown: bool = True) -> Progress:
    """A bar with count, elapsed and remaining time; the task's description is its live figure. Silent in a log, and where one of
    several processes shows it for all."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=errors, disable=not (shown and errors.is_terminal),
    )  # fmt: skip
