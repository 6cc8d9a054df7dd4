"""Triton in its interpreter, which is chosen where `@triton.jit` decorates: before a module of kernels is first imported."""

import importlib
import importlib.util
import os

PRESENT = importlib.util.find_spec("triton") is not None


def load(*modules):
    """Imports modules of kernels so that they are interpreted, and leaves the environment as it was."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    for name in modules:
        importlib.import_module(name)
    if before is None:
        del os.environ["TRITON_INTERPRET"]
