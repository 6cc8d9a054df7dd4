"""Where a tuned plan comes from: kept in its file, and read by `Denoiser.why_not` before it is used elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .derivative_free import NodeSearch
from .tune import Tuner


def provenance(run: Tuner | NodeSearch) -> dict[str, Any]:
    """Checkpoint, guidance, seeds, settings, and the figures before and after."""
    den = run.train[0].denoiser
    (first, *_), (held, *_) = run.train, run.validation
    return {
        "tuned_for": {"checkpoint": den.hash, "prediction": den.prediction, "schedule": den.schedule.config(),
                      "guidance": [p.setup.guidance for p in run.train]},
        "started_from": run.table.label, "freedom": run.table.freedom, "method": type(run).__name__,
        "settings": asdict(run.config), "steps_done": run.step,
        "train_seeds": [first.setup.first_seed, first.setup.n],
        "validation_seeds": [held.setup.first_seed, held.setup.n],
        "validation": {"before": asdict(run.start), "after": asdict(run.best_score)},
    }  # fmt: skip
