"""Where engines that were built on this machine are kept, so that they are built once."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "FASTDIFF_CACHE"


def cache_folder(*parts: str) -> Path:
    """$FASTDIFF_CACHE, else $XDG_CACHE_HOME/fastdiff, else ~/.cache/fastdiff; and the parts below it. Not made here."""
    named = os.environ.get(VARIABLE)
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdiff"
    return base.joinpath(*parts)
