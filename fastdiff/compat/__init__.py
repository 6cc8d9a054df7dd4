"""Seats in other libraries: diffusers pipelines, k-diffusion samplers (ComfyUI, A1111). None of theirs is loaded until used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import kdiffusion

if TYPE_CHECKING:
    from .diffusers_scheduler import DiffusersScheduler

__all__ = ["DiffusersScheduler", "kdiffusion"]


def __getattr__(name: str) -> Any:
    if name == "DiffusersScheduler":  # its base classes are diffusers'
        from .need import need_diffusers

        need_diffusers()
        from .diffusers_scheduler import DiffusersScheduler

        return DiffusersScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
