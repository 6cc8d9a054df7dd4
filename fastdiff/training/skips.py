"""Steps whose gradient is not finite: taken back, counted, and the end of a run that goes on making them."""

from __future__ import annotations

from torch import Tensor

from ..errors import FastdiffError

IN_A_ROW = 10


class Skips:
    """Counts them; `total` belongs to the run's state."""

    def __init__(self, total: int = 0) -> None:
        self.total, self._row = total, 0

    def usable(self, norm: Tensor, step: int) -> bool:
        """Whether a gradient of this norm may change the weights.

        Raises:
            FastdiffError: the last of ten in a row that may not.
        """
        if bool(norm.isfinite()):
            self._row = 0
            return True
        self.total, self._row = self.total + 1, self._row + 1
        if self._row >= IN_A_ROW:
            raise FastdiffError(f"{IN_A_ROW} steps had a non-finite gradient (the last is {step}): lower the rate")
        return False
