"""Few-step students from a teacher: one file a method, one way to run them."""

from .consistency import Consistency
from .distiller import Distiller, Progress, Settings
from .ect import ECT
from .guided import Guided
from .match import Match
from .method import Batch, Method, Stage
from .progressive import Progressive
from .trajectory import Trajectory

METHODS: dict[str, type[Method]] = {m.name: m for m in (Progressive, Trajectory, Guided, Consistency, ECT)}
__all__ = [
    "ECT", "METHODS", "Batch", "Consistency", "Distiller", "Guided", "Match", "Method", "Progress", "Progressive", "Settings",
    "Stage", "Trajectory",
]  # fmt: skip
