"""Adaptive steps sample by sample against one step size for the whole batch: network calls at equal error.

    python benches/adaptive.py                                      # results/adaptive.json; three minutes of one core
    python benches/adaptive.py --skip-model --out out/adaptive.json

Three controls run the same pair:

- `sample`: every sample has its own steps, and leaves the batch when it is done;
- `batch`: one step size, decided by the root mean square of the error over the whole batch. The batch is handed over as one
  sample of one dimension more, so it is the same code;
- `worst`: one step size, decided by the batch's worst sample, as our exported engines do.

Beside each of them `dpm_adaptive`: k-diffusion's sampler of that name, one step size for the batch by its own pair, dpm-23, and
its own controller. That is what `sample` is held against; `batch` says how much of it is the pair and how much the control.

A call is the network's on one sample. A sample's error is its RMSE from the exact end of its trajectory. Controls are compared
where their median errors are equal.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import files
from fastdiff.bench import converged
from fastdiff.bench.analytic import Mixture
from fastdiff.bench.results import versions
from fastdiff.pairs import PAIRS as KNOWN
from fastdiff.pairs import Field, spread

OUT = Path(__file__).parent / "results" / "adaptive.json"
PAIRS = ("unipc-3", "unipc-2", "dpmpp-23", "dpm-23", "dopri5")  # the first is held against the bar and run on the model
BAR = 1.5  # calls of `dpm_adaptive` over calls of `sample` at equal median error
MIXTURE: dict[str, Any] = {"seed": 0, "n": 64, "components": 16, "dimensions": 8, "spread": 0.6, "widths": [0.01, 1.0]}
TOLERANCES = [round(10 ** (-k / 3), 6) for k in range(13)]  # 1 to 1e-4, rtol and atol alike
MODEL_N = 16
MODEL_TOLERANCES = [0.3, 0.1, 0.03, 0.01]
EXACT = 1e-9  # tolerance of the reference, by dopri5

DPM_23 = KNOWN["dpm-23"]

Run = Callable[[float], tuple[Tensor, Tensor]]  # tolerance -> samples (n, *shape), and the calls of each (n,)


class Known(fd.Denoiser):
    """A closed-form denoiser (x, t) -> x0 in float64, levels and all."""

    def __init__(self, call: Callable[[Tensor, Any], Tensor], schedule: fd.schedule.NoiseSchedule, shape: Sequence[int]) -> None:
        super().__init__(call, schedule, "x0", shape=shape)
        self.call = call

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        return self.call(x, t)


def as_one(denoiser: fd.Denoiser, shape: Sequence[int]) -> fd.Denoiser:
    """The denoiser of a whole batch (n, *shape) as that of one sample, at one time."""

    def call(x: Tensor, t: float | Tensor) -> Tensor:
        return denoiser(x[0], t.expand(x.shape[1]) if isinstance(t, Tensor) else t)[None]

    return Known(call, denoiser.schedule, shape)


def mixture() -> tuple[fd.Denoiser, Tensor]:
    """The problem and its unit start noise (n, d)."""
    m = MIXTURE
    generator = torch.Generator().manual_seed(m["seed"])
    means = m["spread"] * torch.randn(m["components"], m["dimensions"], generator=generator, dtype=torch.float64)
    low, high = map(math.log, m["widths"])
    widths = torch.exp(low + (high - low) * torch.rand(m["components"], generator=generator, dtype=torch.float64))
    schedule = fd.schedule.vp_cosine()
    noise = torch.randn(m["n"], m["dimensions"], generator=generator, dtype=torch.float64)
    return Known(Mixture(means, widths).denoiser(schedule), schedule, (m["dimensions"],)), noise


def controls(denoiser: fd.Denoiser, noise: Tensor, pair: str) -> dict[str, Run]:
    """The three and k-diffusion's, by name."""

    def options(tol: float) -> dict[str, Any]:
        return {"solver": pair, "rtol": tol, "atol": tol, "max_nfe": 100_000, "dtype": noise.dtype}

    def apart(tol: float) -> tuple[Tensor, Tensor]:
        return tuple(fd.sample_adaptive(denoiser, noise, **options(tol)))

    def batch(tol: float) -> tuple[Tensor, Tensor]:
        found = fd.sample_adaptive(as_one(denoiser, noise.shape), noise[None], **options(tol))
        return found.x[0], found.nfe.expand(len(noise))

    def worst(tol: float) -> tuple[Tensor, Tensor]:
        return tuple(fd.sample_adaptive(denoiser, noise, together=True, **options(tol)))

    return {"sample": apart, "batch": batch, "worst": worst, "dpm_adaptive": lambda tol: dpm_adaptive(denoiser, noise, tol)}


def dpm_adaptive(denoiser: fd.Denoiser, noise: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """k-diffusion 0.1.1's sample_dpm_adaptive without noise: steps of dpm-23 for the whole batch, the first 0.05 long. The error
    is a root mean square in x / alpha, relative to max(atol, rtol max(|low|, |last low|)); its inverse to the power 1/3, through
    1 + atan(x - 1), is the factor of the next step, and 0.81 the least that takes a step. Each attempt costs three calls."""
    schedule = denoiser.schedule
    lam, end = (float(schedule.lam(t)) for t in (schedule.t_max, schedule.t_min))
    field = Field(schedule, lambda x, at: denoiser(x, schedule.t_of_lam(at)))
    x = noise * float(schedule.sigma(schedule.t_max))
    last = x / float(schedule.alpha(schedule.t_max))
    h, calls = 0.05, 0
    while lam < end - 1e-5:
        now, length = (torch.full((len(x),), v, dtype=torch.float64) for v in (lam, min(h, end - lam)))
        tried = DPM_23.attempt(field, x, now, length, ())
        calls += 3
        low, high = (spread(1 / field.levels(now + length)[0], x) * r for r in (tried.low, tried.high))
        delta = torch.maximum(torch.tensor(tol, dtype=x.dtype), tol * torch.maximum(low.abs(), last.abs()))
        error = float(((low - high) / delta).square().mean().sqrt())
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / 3) - 1)
        if factor >= 0.81:
            x, last, lam = tried.high, low, lam + min(h, end - lam)
        h *= factor
    return denoiser(x, torch.full((len(x),), schedule.t_min, dtype=torch.float64)), torch.full((len(x),), calls + 1)


def curve(run: Run, exact: Tensor, tolerances: Sequence[float]) -> list[dict[str, float]]:
    """Calls a sample and errors at each tolerance."""
    rows = []
    for tol in tolerances:
        x, calls = run(tol)
        error = (x - exact).double().flatten(1).square().mean(dim=1).sqrt()
        rows.append({
            "tolerance": tol, "calls": float(calls.double().mean()), "fewest": int(calls.min()), "most": int(calls.max()),
            "median": float(error.median()), "p90": float(error.quantile(0.9)), "max": float(error.max()),
        })  # fmt: skip
    return rows


def calls_at(rows: list[dict[str, float]], error: float) -> float | None:
    """Calls a sample where the median error is `error`: a parabola, or a line for a few runs, through all of them in log and log,
    since single runs scatter by a tenth; None outside of what was run."""
    x, y = (np.log([row[key] for row in rows]) for key in ("median", "calls"))
    if not x.min() <= math.log(error) <= x.max():
        return None
    return float(np.exp(np.polyval(np.polyfit(x, y, 1 + (len(rows) > 5)), math.log(error))))


def compare(curves: dict[str, list[dict[str, float]]], errors: Sequence[float]) -> list[dict[str, Any]]:
    """Calls of each control at equal median errors, and their ratios to those of `sample`."""
    lines = []
    for error in errors:
        calls = {name: calls_at(rows, error) for name, rows in curves.items()}
        if all(calls.values()):
            ratios = {f"{name}/sample": round(calls[name] / calls["sample"], 3) for name in ("batch", "worst", "dpm_adaptive")}
            lines.append({"median": error, **{name: round(c, 1) for name, c in calls.items()}, **ratios})
    return lines


def on_mixture(pair: str) -> dict[str, Any]:
    denoiser, noise = mixture()
    tight = [fd.sample_adaptive(denoiser, noise, solver="dopri5", rtol=tol, atol=tol, max_nfe=100_000, dtype=noise.dtype).x
             for tol in (EXACT, 10 * EXACT)]  # fmt: skip
    curves = {name: curve(run, tight[0], TOLERANCES) for name, run in controls(denoiser, noise, pair).items()}
    movement = float((tight[1] - tight[0]).abs().max())
    return {"reference_movement": movement, "equal_error": compare(curves, [1e-2, 3e-3, 1e-3, 3e-4, 1e-4]), "curves": curves}


def on_model() -> dict[str, Any]:
    """The shipped model, its classes in turn, against the endpoints of its converged ODE."""
    denoiser = fd.load("fashion-mnist")
    denoiser = denoiser.bind(class_labels=torch.arange(MODEL_N) % denoiser.num_classes)
    exact = converged.shipped(denoiser, MODEL_N)
    assert exact is not None and denoiser.shape is not None
    noise = fd.noise.normal(range(MODEL_N), 0, math.prod(denoiser.shape)).view(MODEL_N, *denoiser.shape)
    runs = controls(denoiser, noise, PAIRS[0])
    curves = {name: curve(run, exact.x.float(), MODEL_TOLERANCES) for name, run in runs.items()}
    low = max(min(row["median"] for row in rows) for rows in curves.values())
    high = min(max(row["median"] for row in rows) for rows in curves.values())
    middle = float(f"{math.sqrt(low * high):.2g}")
    about = {"checkpoint": denoiser.hash, "n": MODEL_N, "pair": PAIRS[0]}
    return {**about, "equal_error": compare(curves, [middle]), "curves": curves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--skip-model", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = {pair: on_mixture(pair) for pair in PAIRS}
    least = min(line["dpm_adaptive/sample"] for line in pairs[PAIRS[0]]["equal_error"])
    record = {"versions": versions(), "bar": BAR, "least": least, "reached": least >= BAR, "mixture": MIXTURE, "pairs": pairs}
    if not options.skip_model:
        record["model"] = on_model()
    files.write_text(options.out, json.dumps(record, indent=1) + "\n")
    for name, found in [*pairs.items(), *([("model", record["model"])] if "model" in record else [])]:
        for line in found["equal_error"]:
            print(name, line)
    print(options.out)


if __name__ == "__main__":
    main()
