"""Few-step students from a teacher: one file a method, one way to run them."""

from .distiller import Distiller, Progress
from .method import Batch, Method, Stage
from .progressive import Progressive
from .trajectory import Trajectory

METHODS: dict[str, type[Method]] = {"progressive": Progressive, "trajectory": Trajectory}
__all__ = ["METHODS", "Batch", "Distiller", "Method", "Progress", "Progressive", "Stage", "Trajectory"]
