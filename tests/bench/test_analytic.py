"""The cross product on analytic data: its denoiser, its record, and what the README says of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.bench import analytic
from fastdiff.bench.cells import LEFT_OUT
from fastdiff.cli import budgets, figures, solver_table

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benches" / "results"
RECORD = json.loads((RECORDS / "analytic.json").read_text())


def block(marks):
    return (ROOT / "README.md").read_text().split(marks[0])[1].split(marks[1])[0]


def test_the_denoiser_is_the_gradient_of_the_log_density():
    """Tweedie: D = (x + sigma^2 grad log p)/alpha, p summed up by itself and differentiated by autograd."""
    data, schedule = analytic.Mixture.made(), fd.schedule.vp_cosine()
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    for t in (0.05, 0.4, 0.95):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        parts = [
            torch.distributions.MultivariateNormal(alpha * m, ((alpha * w) ** 2 + sigma**2) * torch.eye(8, dtype=torch.float64))
            for m, w in zip(data.means, data.widths, strict=True)
        ]
        density = torch.logsumexp(torch.stack([p.log_prob(x) for p in parts]), 0)
        (slope,) = torch.autograd.grad(density.sum(), x)
        torch.testing.assert_close(data.denoiser(schedule)(x, t), (x + sigma**2 * slope) / alpha, rtol=0, atol=1e-9)


def test_samples_have_the_mixtures_moments():
    data = analytic.Mixture.made()
    x = data.samples(20_000)
    np.testing.assert_allclose(x.mean(0), data.means.mean(0), atol=0.03)
    spread = data.means.var(0, correction=0) + data.widths.square().mean()
    np.testing.assert_allclose(x.var(0), spread, rtol=0.06)


def test_the_record_holds_the_whole_cross_product():
    grids = [g for g in fd.grid.GRIDS if g not in LEFT_OUT]
    solvers = [s for s in fd.list_solvers() if s not in analytic.DISTILLED]
    assert [(line["solver"], line["grid"]) for line in RECORD["lines"]] == [(s, g) for s in solvers for g in grids]
    assert RECORD["setup"] == analytic.SETUP and tuple(RECORD["budgets"]) == analytic.BUDGETS
    for line in RECORD["lines"]:
        stochastic = fd.list_solvers()[line["solver"]].stochastic
        assert (line["rmse"] is None) == stochastic and len(line["distance"]) == len(analytic.BUDGETS)
        assert np.isfinite(line["distance"]).all() and (stochastic or np.isfinite(line["rmse"]).all())
    least = min(min(line["rmse"]) for line in RECORD["lines"] if line["rmse"])
    assert RECORD["reference"]["movement"] < 1e-3 * least


def test_a_few_of_its_cells_come_out_again(monkeypatch):
    """With a reference of 160 calls, 1e-5 from the record's own."""
    monkeypatch.setattr(analytic, "REFERENCE", ("unipc-3", "uniform_lambda", 160))
    again = analytic.measure((4, 10), ("heun", "unipc-2", "sa-solver"))
    stored = {(line["solver"], line["grid"]): line for line in RECORD["lines"]}
    places = [analytic.BUDGETS.index(n) for n in (4, 10)]
    assert len(again["lines"]) == 3 * (len(fd.grid.GRIDS) - len(LEFT_OUT))
    for line in again["lines"]:
        wanted = stored[line["solver"], line["grid"]]
        for key in ("rmse", "distance"):
            if line[key] is not None:
                np.testing.assert_allclose(line[key], [wanted[key][i] for i in places], rtol=2e-3)
    assert json.loads(analytic.to_json(again)) == again


def test_the_readmes_solver_table_is_the_registry():
    text = solver_table.markdown()
    assert block(figures.SOLVERS) == text
    for name, info in fd.list_solvers().items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert info.source in row and all(f"`{alias}`" in row for alias in info.aliases)
        assert f"| {info.order or '-'}" in row and f"| {info.nfe_per_step} |" in row
    assert f"| {len(fd.list_solvers())} solvers," in (ROOT / "README.md").read_text()


def test_the_readmes_guide_is_what_the_records_say():
    assert block(figures.GUIDE) == figures.guide(RECORDS)


def test_the_guide_names_the_best_of_a_budget():
    lines = [line for line in RECORD["lines"] if line["rmse"] is not None]
    for n in budgets.GUIDE_BUDGETS:
        i = analytic.BUDGETS.index(n)
        best = min(lines, key=lambda line, i=i: line["rmse"][i])
        (row,) = [r for r in budgets.analytic(RECORD).splitlines() if r.startswith(f"| {n} |")]
        assert row.startswith(f"| {n} | `{best['solver']} · {best['grid']}` | {best['rmse'][i]:.3f} |")


def test_the_shipped_guide_leaves_learned_plans_out_and_counts_ties():
    def cell(solver, nfe, rmse=None, kid=0.02, line=None):
        found = {"solver": solver, "grid": "karras", "line": line or f"{solver} · karras", "nfe": nfe, "kid_clf": kid}
        return found if rmse is None else {**found, "rmse": rmse, "rmse_lo": 0.9 * rmse, "rmse_hi": 1.1 * rmse}

    odes = [cell("tuned", 5, 0.01, line="tuned"), cell("a", 5, 0.2), cell("b", 5, 0.21), cell("c", 5, 0.5), cell("a", 50, 0.1)]
    cells = [*odes, cell("s", 5, kid=0.05), cell("r", 5, kid=0.04)]
    text = budgets.shipped({"cells": cells, "setup": {"n": 7}, "converged": {"kid_clf": 0.01}})
    (row,) = [r for r in text.splitlines() if r.startswith("| 5")]
    assert row == "| 5 | `a · karras` | 0.200 (0.180 to 0.220) | 20.0 | `b · karras` | 0.210 | 2 | `r · karras` | 40.0 |"
    assert "| 50 |" not in text


@pytest.mark.slow
def test_the_record_is_what_the_command_makes():
    again = analytic.measure()
    for line, stored in zip(again["lines"], RECORD["lines"], strict=True):
        np.testing.assert_allclose(line["distance"], stored["distance"], rtol=2e-3)
        if line["rmse"]:
            np.testing.assert_allclose(line["rmse"], stored["rmse"], rtol=2e-3)
