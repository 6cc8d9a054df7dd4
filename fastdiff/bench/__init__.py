"""The benchmark: network calls against quality, on a real model, with pictures."""

from .cells import Cell, Setup, full_cells, quick_cells
from .runner import Bench

__all__ = ["Bench", "Cell", "Setup", "full_cells", "quick_cells"]
