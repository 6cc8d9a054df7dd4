"""fastdiff: make an existing diffusion checkpoint sample fast.

    den = fd.load("fashion-mnist").bind(class_labels=labels)
    plan = fd.plan("unipc-2", den, nfe=8)
    x = fd.sample(den, plan, seeds=range(16))
"""

from . import compat, errors, grid, guide, noise, schedule
from .adaptive import sample_adaptive
from .checkpoints import load
from .compat.accelerated import accelerate
from .compiled import compile
from .denoiser import Denoiser
from .graph import capture
from .patching import patch
from .plans import Plan, Row, Weights
from .sampling import sample
from .solvers import list_solvers, plan
from .variants import fastest

__version__ = "0.1.0"
__all__ = [
    "Denoiser", "Plan", "Row", "Weights", "accelerate", "capture", "compat", "compile", "errors", "fastest", "grid", "guide",
    "list_solvers", "load", "noise", "patch", "plan", "sample", "sample_adaptive", "schedule",
]  # fmt: skip
