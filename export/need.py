"""The packages of the extra, asked for where they are used: one line says what to install."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import FastdiffError


def need(name: str) -> Any:
    """The module of a package in the extra `onnx`.

    Raises:
        FastdiffError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise FastdiffError(f"engines need {name.split('.')[0]}: pip install 'fastdiff[onnx]' ({e})") from e
