"""The one line that says which package a seat needs."""

from __future__ import annotations

import importlib.util

from ..errors import FastdiffError


def need_diffusers() -> None:
    """Raises FastdiffError where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        raise FastdiffError("this seat needs diffusers: pip install 'fastdiff[diffusers]'")
