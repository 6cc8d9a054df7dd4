"""One pass of a diffusers pipeline through a plan."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import FastdiffError
from ..plans import Row
from .diffusers_seat import Prepared, Seat
from .stepper import Stepper

DDIM = ("DDIMScheduler", "DDIMParallelScheduler")


class Run:
    """One pass of a pipeline through a plan: the rows' times on the sample's device, and the state between calls."""

    def __init__(self, prepared: Prepared, seat: Seat, device: torch.device | str | None) -> None:
        self.prepared = prepared
        rows = [row for row in prepared.plan.rows if row.calls]
        self.values = [seat.network_time(row.t) for row in rows]
        whole = seat.time_scale == 1.0 and all(v == round(v) for v in self.values)
        self.timesteps = torch.tensor(self.values, dtype=torch.int64 if whole else torch.float32, device=device)
        if seat.prediction == "eps" and rows[0].alpha == 0.0:
            raise FastdiffError("an epsilon model has no prediction at full noise (alpha = 0): give a grid that starts below it")
        self.coefficients = [tuple(float(c) for c in seat.denoising(row.alpha, row.sigma)) for row in rows]
        self.levels = [(row.alpha, row.sigma) for row in rows]
        self.imitated = seat.solver if seat.is_class else None
        self.eta: float | None = None
        self.begin_index: int | None = None
        self.begin(0)

    def use_eta(self, eta: float | None) -> None:
        """The eta of a pipeline's call, for the classes that take theirs there; elsewhere only 0, every pipeline's default."""
        name = {**dict.fromkeys(DDIM, "eta"), "TCDScheduler": "gamma"}.get(self.imitated or "")
        if name and eta is not None:
            self.prepared = self.prepared.with_options({name: float(eta)})
            self.begin(self.first)
        elif eta:
            raise FastdiffError(f"eta={eta:g} was given to the pipeline: give it to from_config, for a solver that has it")
        self.eta = eta

    def begin(self, first: int) -> None:
        """Makes call `first` the next one."""
        self.stepper = Stepper(self.prepared.plan if first == 0 else self.prepared.rest(first))
        self.first = first
        # DDIMScheduler keeps the noise of the prediction before clipping: x weighs sigma'/sigma there, and with it D -alpha
        # times that, which a table has as one weight on one prediction
        rows: list[Row | None] = [None] * first + [row for row in self.stepper.plan.rows if row.calls]
        self.raw_noise = [row.alpha * row.next.x / row.next.h[0] if row else 0.0 for row in rows] if self.imitated in DDIM else []
        # SASolverScheduler draws at every call, also where its noise has no weight: a generator would else run behind it
        self.idle_draw = [self.imitated == "SASolverScheduler" and row is not None and row.draw is None for row in rows]

    @property
    def index(self) -> int:
        return self.first + self.stepper.done

    def expect(self, timestep: float | Tensor) -> int:
        """The index of the call that comes next; a finished run begins again. The timestep must be that call's.

        An entry of `timesteps` is known by its address, so that a GPU is not waited for; anything else is read.
        """
        if self.stepper.finished:
            self.stepper.begin()
        i, own = self.index, self.timesteps
        if isinstance(timestep, Tensor):
            if timestep.data_ptr() == own.data_ptr() + i * own.element_size():
                return i
            timestep = timestep.flatten()[0]
        value = float(timestep)
        if not math.isclose(value, self.values[i], rel_tol=1e-4, abs_tol=1e-4):
            raise FastdiffError(
                f"timestep {value:g} was given where call {i} of {len(self.values)} is at {self.values[i]:g}: call step once for "
                "each of scheduler.timesteps, in order (set_begin_index(k) starts at entry k)"
            )
        return i
