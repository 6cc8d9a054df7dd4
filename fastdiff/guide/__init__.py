"""Guidance: functions from Denoiser to Denoiser, composed freely and with every solver. scale 1 means no guidance where two
predictions are combined (papers that write w mean scale - 1), 0 where a gradient is added."""

from .by_plan import cfgpp
from .classifier_free import Guided, apg, cfg
from .composed import compose
from .gradients import classifier, loss
from .images import augmented, image_condition
from .limits import clip, threshold
from .weaker import autoguidance, pag
from .wrapped import Wrapped

__all__ = [
    "Guided", "Wrapped", "apg", "augmented", "autoguidance", "cfg", "cfgpp", "classifier", "clip", "compose", "image_condition",
    "loss", "pag", "threshold",
]  # fmt: skip
