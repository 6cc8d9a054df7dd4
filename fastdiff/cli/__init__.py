"""The command line. A user's mistake is one line and exit code 2; a traceback here is a bug."""

from .main import main

__all__ = ["main"]
