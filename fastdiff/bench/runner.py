"""Runs the cells of a benchmark: each result is a file named by the hash of all that determines it, so nothing runs twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..compiled import not_compiled
from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..metrics import bootstrap, paired_bootstrap
from ..noise import normal
from ..plans import Plan
from ..sampling import sample
from ..solvers import plan
from .cells import Cell, Setup, student_setup
from .converged import FIRST_STEPS, GRID, PROBE, SOLVER, Converged, converge, rmse, shipped
from .scoring import Scorer

SHOWN = 8  # samples of each cell in the pictures
PAIRED = 256  # samples that the paired error is measured on; more would change its interval, not its meaning
ANCHOR_STEPS = 80  # of the converged ODE beyond the stored endpoints: on the shipped model 0.0046 from them
Record = dict[str, Any]
Progress = Callable[[str, int], None]  # what is running, evaluations done since the last call


class Bench:
    """A benchmark of one denoiser in one folder: `run`, then `records`, `converged` and `pictures` hold what it found."""

    def __init__(
        self, denoiser: Denoiser, setup: Setup, out: Path, scorer: Scorer | None, paired_n: int = PAIRED, compile: bool = False
    ) -> None:
        if denoiser.shape is None:
            raise FastdiffError("a benchmark needs the shape of a sample: make the Denoiser with shape=")
        self.denoiser, self.setup, self.out, self.scorer = denoiser, setup, out, scorer
        self.paired_n = min(paired_n, setup.n)  # seeds that the paired error is measured on
        self.shape = denoiser.shape
        self.fingerprint = self._fingerprint()
        self.compiled: dict[str, Denoiser] | None = {} if compile else None  # by hash; cells do not depend on it
        self.sampled = self._as_sampled(denoiser)
        self.records: list[Record] = []
        self.converged: Record = {}
        self.reference: Converged
        self.pictures: dict[tuple[str, int], np.ndarray] = {}  # (line, nfe) -> (SHOWN, C, H, W) uint8

    def run(self, cells: Sequence[Cell], progress: Progress | None = None) -> list[Record]:
        """Measures every cell that has no stored result, in order, then the reference; an interrupt keeps what is finished."""
        found = [self._cell(cell, progress) for cell in cells]
        count = self.paired_n
        solutions = [x[:count] for record, x in found if not record["stochastic"]]
        reference = self.reference = self._reference(count, solutions, progress)
        errors: dict[tuple[str, int], np.ndarray] = {}
        for cell, (record, x) in zip(cells, found, strict=True):
            self.pictures[(cell.line, cell.nfe)] = self._picture(x)
            if not record["stochastic"]:
                error = (x[:count].float() - reference.x.float()).square().flatten(1).mean(dim=1).double().numpy()
                errors[(cell.line, cell.nfe)] = error
                record |= paired(error)
            self.records.append(record)
        compare(self.records, errors)
        smallest = min((record["rmse"] for record in self.records if "rmse" in record), default=1.0)
        self.pictures[("converged ODE", reference.steps)] = self._picture(reference.x)
        self.converged = {
            **self._anchor(reference, progress), "steps": reference.steps, "movement": reference.movement,
            "ok": reference.ok_for(smallest), "paired_n": count,
        }  # fmt: skip
        return self.records

    def samples(self, cell: Cell) -> Tensor:
        """The samples (n, *shape) of a cell that was run."""
        return self._cell(cell, None)[1]

    def cost(self, cells: Sequence[Cell]) -> int:
        """Evaluations (images x NFE) still to do, the reference counted as if 320 steps were enough."""
        n, count = self.setup.n, self.paired_n
        todo = n * sum(cell.nfe for cell in cells if not self._path(self._key(cell)).exists())
        runs = [(ANCHOR_STEPS, n)] if n > count and self.scorer else []
        if count > PAIRED and self._stored(PAIRED):
            runs.append((ANCHOR_STEPS, count))
        elif not self._stored(count):
            runs += [*((FIRST_STEPS << k, min(PROBE, count)) for k in range(4)), *((FIRST_STEPS << k, count) for k in (2, 3))]
        return todo + sum(s * m for s, m in runs if not self._path(self._endpoint_key(s, m)).exists())

    # The reference

    def _reference(self, count: int, solutions: Sequence[Tensor], progress: Progress | None) -> Converged:
        """The stored endpoints where they suffice; more seeds than are stored get `ANCHOR_STEPS`, judged by the stored ones."""
        stored = self._stored(min(count, PAIRED))
        if stored is None:
            return converge(lambda steps, n: self._endpoints(steps, n, progress), count, solutions)
        if len(stored.x) == count:
            return stored
        x = self._endpoints(ANCHOR_STEPS, count, progress)
        return Converged(x, ANCHOR_STEPS, rmse(x[: len(stored.x)], stored.x))

    def _stored(self, count: int) -> Converged | None:
        plain = self.setup.guidance == 1.0 and self.setup.first_seed == 0
        return shipped(self.denoiser, count) if plain else None

    def _anchor(self, reference: Converged, progress: Progress | None) -> Record:
        """The scores of the solved equation at the table's n: the endpoints themselves, or as many at `ANCHOR_STEPS`."""
        if self.scorer is None:
            return {}
        if len(reference.x) == self.setup.n:
            return self._score(reference.x)
        return self._score(self._endpoints(ANCHOR_STEPS, self.setup.n, progress)) | {"scored_steps": ANCHOR_STEPS}

    def _endpoints(self, steps: int, n: int, progress: Progress | None) -> Tensor:
        """The reference solver's endpoints of the first n seeds."""
        path = self._path(self._endpoint_key(steps, n))
        if not path.exists():
            setup = replace(self.setup, n=n)
            # a student of several step counts knows none so large: it is told its largest
            counts = self.denoiser.step_counts
            sampled = self.sampled.bind(steps=counts[-1]) if counts else self.sampled
            what = f"converged ODE, {steps} steps"
            x, _ = self._sample(sampled, lambda den: plan(SOLVER, den, steps, grid=GRID), setup, what, progress)
            self._store(path, {}, x)
        return self._read(path)[1]

    # One cell

    def _cell(self, cell: Cell, progress: Progress | None) -> tuple[Record, Tensor]:
        path = self._path(self._key(cell))
        if not path.exists():
            self._store(path, *self._measure(cell, progress))
        return self._read(path)

    def _measure(self, cell: Cell, progress: Progress | None) -> tuple[Record, Tensor]:
        table = cell.plan(self.denoiser)
        start = time.perf_counter()
        sampled, setup = self.sampled, self.setup
        if cell.student is not None:
            sampled, setup = self._as_sampled(cell.student), student_setup(cell.student, setup)
        x, calls = self._sample(sampled, lambda den: table, setup, f"{cell.line} · {cell.nfe}", progress)
        seconds = time.perf_counter() - start
        record: Record = {
            "solver": cell.solver, "grid": cell.grid, "line": cell.line, "nfe": cell.nfe, "network_calls": calls,
            "order": table.order, "stochastic": table.stochastic, "ms_per_image": 1e3 * seconds / self.setup.n,
        }  # fmt: skip
        return record | self._score(x), x

    def _sample(
        self, denoiser: Denoiser, make: Callable[[Denoiser], Plan], setup: Setup, what: str, progress: Progress | None
    ) -> tuple[Tensor, int]:
        """Samples of a setup, and the network calls of one image."""
        out, calls = [], 0
        for seeds, den in setup.batches(denoiser):
            table = make(den)
            out.append(sample(den, table, seeds=seeds).cpu())
            calls = table.nfe * den.calls
            if progress:
                progress(what, table.nfe * len(seeds))
        return torch.cat(out), calls

    def _as_sampled(self, denoiser: Denoiser) -> Denoiser:
        """What makes the samples: the denoiser itself, or compiled."""
        if self.compiled is None:
            return denoiser
        if denoiser.hash not in self.compiled:
            self.compiled[denoiser.hash] = self._compile(denoiser)
        return self.compiled[denoiser.hash]

    def _compile(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser compiled, and called once with a whole batch, so that no cell's time holds the compilation."""
        compiled = denoiser.compiled()
        setup = self.setup if denoiser is self.denoiser else student_setup(denoiser, self.setup)
        seeds, den = setup.batches(compiled)[0]
        try:
            with torch.no_grad():  # as the samples are made, or torch would compile again
                den(torch.zeros(len(seeds), *self.shape, device=den.device), den.schedule.t_max / 2)
        except Exception as e:
            raise not_compiled(e) from e
        return compiled

    def _score(self, x: Tensor) -> Record:
        if self.scorer is None:
            return {}
        return self.scorer.score(self.denoiser.images(x), self.setup.labels(self.denoiser))

    # Files and hashes

    def _fingerprint(self) -> str:
        """What the denoiser does to one fixed input: tells two networks apart, a file's hash or none."""
        den = next(iter(Setup(2, batch=2, conditions=self.setup.conditions).batches(self.denoiser)))[1]
        schedule = den.schedule
        t = (schedule.t_min + schedule.t_max) / 2
        x = normal([0, 1], 0, int(np.prod(self.shape))).view(2, *self.shape).to(den.device)
        with torch.no_grad():
            d = den(x * float(schedule.sigma(t)), t)
        return hashlib.sha256(d.float().cpu().numpy().round(4).tobytes()).hexdigest()[:16]

    def _hash(self, what: dict[str, Any]) -> str:
        setup: dict[str, Any] = {"n": self.setup.n, "first_seed": self.setup.first_seed, "guidance": self.setup.guidance}
        if self.setup.conditions is not None:
            setup["conditions"] = self.setup.conditions.hash
        scorer = self.scorer.name if self.scorer else None
        everything = {**what, "setup": setup, "model": self.fingerprint, "hash": self.denoiser.hash, "scorer": scorer}
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:20]

    def _key(self, cell: Cell) -> str:
        student = {"student": cell.student.hash} if cell.student else {}
        return self._hash({"line": cell.line, "plan": json.loads(cell.plan(self.denoiser).to_json()), **student})

    def _endpoint_key(self, steps: int, n: int) -> str:
        return self._hash({"endpoints": [SOLVER, GRID, steps, n]})

    def _path(self, key: str) -> Path:
        return self.out / "cells" / f"{key}.npz"

    def _store(self, path: Path, record: Record, x: Tensor) -> None:
        # float16 rounds by 2e-4 of the data's range, a hundredth of the smallest errors, at half the disk space
        with files.atomic(path) as temporary, open(temporary, "wb") as f:
            np.savez(f, record=np.array(json.dumps(record)), x=x.half().numpy())

    def _read(self, path: Path) -> tuple[Record, Tensor]:
        with np.load(path, allow_pickle=False) as f:
            return json.loads(str(f["record"])), torch.from_numpy(f["x"])

    def _picture(self, x: Tensor) -> np.ndarray:
        return (self.denoiser.images(x[:SHOWN]) * 255).round().to(torch.uint8).numpy()


def paired(error: np.ndarray) -> Record:
    """The RMSE of per-sample squared errors (n,), with its bootstrap interval over samples."""
    found = bootstrap(lambda rows: float(np.sqrt(error[rows].mean())), len(error))
    return {"rmse": found.value, "rmse_lo": found.lo, "rmse_hi": found.hi}


def compare(records: list[Record], errors: dict[tuple[str, int], np.ndarray]) -> None:
    """Adds to each deterministic record the paired difference of its squared errors to DDIM's at the same NFE."""
    ddim = {nfe: error for (line, nfe), error in errors.items() if line == "ddim · uniform_t"}
    for record in records:
        mine, other = errors.get((record["line"], record["nfe"])), ddim.get(record["nfe"])
        if mine is not None and other is not None and record["line"] != "ddim · uniform_t":
            gain = paired_bootstrap(mine, other)
            record |= {"mse_minus_ddim": gain.value, "mse_minus_ddim_lo": gain.lo, "mse_minus_ddim_hi": gain.hi}
