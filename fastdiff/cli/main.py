"""`fastdiff`: the commands, and what happens when one fails."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from ..errors import FastdiffError
from .bench import bench, demo
from .console import errors
from .convert import convert
from .distill import distill
from .export import export
from .info import info, solvers
from .run import run
from .sample import sample
from .train import train
from .tune import tune

# typer vendors click or imports it, by its version: the base of its own public exception is right for both
UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(demo)
app.command()(sample)
app.command()(bench)
app.command()(train)
app.command()(distill)
app.command()(tune)
app.command()(export)
app.command()(run)
app.command()(solvers)
app.command()(info)
app.command()(convert)


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """fastdiff: make a diffusion checkpoint sample fast."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Runs a command; exit code 2 and one line for a mistake, 130 after Ctrl-C."""
    try:
        code = app(standalone_mode=False)
    except UsageError as e:
        where = getattr(getattr(e, "ctx", None), "command_path", "fastdiff")
        message = e.format_message().rstrip(".")  # type: ignore[attr-defined]
        _fail(f"{message}; `{where} --help` lists what is allowed")
    except FastdiffError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        code = 130
    if code == 130:  # typer turns Ctrl-C into this code itself
        errors.print("interrupted; what is done is kept")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    """One line on stderr, however long and wherever its parts come from; exit code 2."""
    line = " ".join(message.split())
    errors.print(f"fastdiff: {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)
