"""The record of a benchmark: one JSON with everything that is needed to repeat it, and the same rows as CSV."""

from __future__ import annotations

import csv
import io
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import files
from .runner import Bench

COLUMNS = (
    "solver", "grid", "nfe", "network_calls", "n", "rmse", "rmse_lo", "rmse_hi", "mse_minus_ddim", "mse_minus_ddim_lo",
    "mse_minus_ddim_hi", "fd_clf", "kid_clf", "kid_error", "precision", "recall", "sliced_wasserstein", "class_accuracy",
    "class_entropy", "fid", "fd_inception", "kid_inception", "ms_per_image", "order", "stochastic",
)  # fmt: skip


def versions() -> dict[str, str]:
    """What ran: package, torch, numpy, Python, processor or GPU, and the commit where the source is a checkout."""
    from .. import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    found = {
        "fastdiff": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
        "device": device, "threads": str(torch.get_num_threads()),
    }  # fmt: skip
    here = Path(__file__).resolve().parent
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        git = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return found
    return found | {"commit": git.stdout.strip()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def collect(bench: Bench) -> dict[str, Any]:
    """The whole record. `converged.ok` says whether the reference is fine enough for the smallest error beside it."""
    return {
        "versions": versions(),
        "checkpoint": {
            "sha256": bench.denoiser.hash, "fingerprint": bench.fingerprint, "shape": list(bench.shape),
            "prediction": bench.denoiser.prediction, "schedule": bench.denoiser.schedule.config(),
        },
        "setup": {
            "n": bench.setup.n, "first_seed": bench.setup.first_seed, "guidance": bench.setup.guidance,
            "scorer": bench.scorer.name if bench.scorer else None,
            **({"compiled": True} if bench.sampled is not bench.denoiser else {}),
        },
        "anchor": bench.scorer.anchor(bench.setup.n) if bench.scorer else None,
        "converged": bench.converged,
        "cells": bench.records,
    }  # fmt: skip


def write(record: dict[str, Any], out: Path) -> None:
    """results.json and results.csv, each whole or not at all."""
    files.write_text(out / "results.json", json.dumps(record, indent=1) + "\n")
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in record["cells"])]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(record["cells"])
    files.write_text(out / "results.csv", buffer.getvalue())
