"""`fastdiff`: the commands, and what happens when one fails."""

from __future__ import annotations

import sys

import typer

from ..errors import FastdiffError
from .console import errors
from .train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(train)


@app.callback()
def root() -> None:
    """fastdiff: make a diffusion checkpoint sample fast."""


def main() -> None:
    """Runs a command; exit code 2 and one line for a mistake, 130 after Ctrl-C."""
    try:
        app()
    except FastdiffError as e:
        errors.print(f"fastdiff: {e}", style="bold red", markup=False, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted; what is done is kept")
        sys.exit(130)
