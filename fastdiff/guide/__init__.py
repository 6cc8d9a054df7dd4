"""Guidance: functions from Denoiser to Denoiser. scale 1 means no guidance (papers that write w mean scale - 1)."""

from .classifier_free import Guided, cfg

__all__ = ["Guided", "cfg"]
