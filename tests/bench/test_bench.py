"""The benchmark: what its figures mean, what it keeps, what it refuses."""

import csv
import json

import numpy as np
import pytest
import tiny
import torch

import fastdiff as fd
from fastdiff.bench import Bench, Cell, Setup, full_cells, pictures, quick_cells, report, results
from fastdiff.bench.cells import cells
from fastdiff.bench.converged import FRACTION, converge
from fastdiff.bench.runner import compare, paired
from fastdiff.bench.scoring import scorer_for
from fastdiff.errors import FastdiffError

SIGMA_DATA = 0.4


def gaussian():
    """A network whose flow is known: data N(0, 0.4^2) on a VP schedule, eps prediction, no parameters."""
    schedule = fd.schedule.vp_cosine()

    def network(x, t):
        a, s = (f(t.double()).float().view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        return x * s / (a**2 * SIGMA_DATA**2 + s**2)

    return fd.Denoiser(network, schedule, "eps", shape=(1, 4, 4))


def exact(den, seeds):
    """Where the flow takes the noise of the seeds: the scale of the clean end over that of the start."""
    schedule = den.schedule
    noise = fd.noise.normal(seeds, 0, 16).view(-1, 1, 4, 4).double()
    t = (schedule.t_max, schedule.t_min)
    start, end = (np.hypot(float(schedule.alpha(v)) * SIGMA_DATA, float(schedule.sigma(v))) for v in t)
    x = noise * float(schedule.sigma(t[0])) * end / start
    alpha, sigma = float(schedule.alpha(t[1])), float(schedule.sigma(t[1]))
    return x * alpha * SIGMA_DATA**2 / (alpha**2 * SIGMA_DATA**2 + sigma**2)  # the last row's denoised prediction


@pytest.fixture
def bench(tmp_path):
    run = Bench(gaussian(), Setup(24, batch=16), tmp_path / "out", None)
    run.run(cells(("ddim", "unipc-2", "euler-ancestral"), None, (5, 10)))
    return run


def test_the_paired_error_is_the_distance_to_the_exact_solution(bench):
    want = exact(bench.denoiser, range(24))
    for record in bench.records:
        if record["stochastic"]:
            assert "rmse" not in record
            continue
        table = fd.plan(record["solver"], bench.denoiser, record["nfe"], grid=record["grid"])
        x = fd.sample(bench.denoiser, table, seeds=range(24)).double()
        true = float((x - want).square().mean().sqrt())
        assert record["rmse"] == pytest.approx(true, rel=2 * FRACTION)
        assert record["rmse_lo"] <= record["rmse"] <= record["rmse_hi"]


def test_the_reference_is_converged_and_says_so(bench):
    assert bench.converged["ok"]
    assert bench.converged["movement"] <= FRACTION * min(r["rmse"] for r in bench.records if "rmse" in r)


def test_higher_order_beats_ddim_outside_its_interval(bench):
    row = next(r for r in bench.records if r["solver"] == "unipc-2" and r["nfe"] == 10)
    assert row["mse_minus_ddim_hi"] < 0


def test_converge_doubles_until_it_is_fine_enough():
    asked = []

    def endpoints(steps, n):
        asked.append((steps, n))
        return torch.full((n, 1), 1 / steps)

    found = converge(endpoints, 64, [torch.full((64, 1), 0.05)])
    assert asked == [(40, 32), (80, 32), (160, 32), (320, 32), (160, 64), (320, 64)] and found.steps == 320
    assert found.movement == pytest.approx(1 / 160 - 1 / 320)
    assert found.ok_for(0.0469) and not found.ok_for(0.031)


def test_a_reference_that_never_converges_is_flagged():
    flip = iter(range(1000))
    found = converge(lambda steps, n: torch.full((n, 1), float(next(flip) % 2)), 4, [torch.zeros(4, 1)])
    assert found.steps == 640 and not found.ok_for(0.1)


def test_paired_intervals_cover_and_compare_uses_the_same_nfe():
    rng = np.random.default_rng(0)
    error = rng.exponential(size=200)
    found = paired(error)
    assert found["rmse"] == pytest.approx(np.sqrt(error.mean()))
    records = [{"line": "ddim · uniform_t", "nfe": 5}, {"line": "a", "nfe": 5}, {"line": "a", "nfe": 8}]
    errors = {("ddim · uniform_t", 5): error, ("a", 5): error / 2, ("a", 8): error / 2}
    compare(records, errors)
    assert records[1]["mse_minus_ddim"] == pytest.approx(-error.mean() / 2)
    assert "mse_minus_ddim" not in records[0] and "mse_minus_ddim" not in records[2]


def test_finished_cells_are_not_run_again_and_depend_on_all_that_matters(bench, tmp_path):
    calls = 0

    def counting(network):
        def wrapped(x, t):
            nonlocal calls
            calls += 1
            return network(x, t)

        return wrapped

    den = gaussian()
    den.network = counting(den.network)
    again = Bench(den, Setup(24, batch=16), tmp_path / "out", None)
    calls = 0
    again.run(cells(("ddim", "unipc-2", "euler-ancestral"), None, (5, 10)))
    assert calls == 0
    strip = {"ms_per_image"}
    assert [{k: v for k, v in r.items() if k not in strip} for r in again.records] == [
        {k: v for k, v in r.items() if k not in strip} for r in bench.records
    ]
    for other in (Setup(24, first_seed=1, batch=16), Setup(23, batch=16)):
        calls = 0
        Bench(den, other, tmp_path / "out", None).run([Cell("ddim", "uniform_t", 5)])
        assert calls > 0


def test_a_changed_network_has_another_fingerprint(tmp_path):
    den = gaussian()
    first = Bench(den, Setup(4), tmp_path, None).fingerprint
    network = den.network
    den.network = lambda x, t: network(x, t) * 1.001
    assert Bench(den, Setup(4), tmp_path, None).fingerprint != first


def test_a_compiled_network_gives_the_same_cells(tmp_path):
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t):
            return self.scale * x * t.view(-1, 1, 1, 1).cos()

    den = fd.Denoiser(Linear().requires_grad_(False), fd.schedule.vp_cosine(), "v", shape=(1, 4, 4))
    plain, compiled = (Bench(den, Setup(8, batch=4), tmp_path / name, None, compile=name == "b") for name in ("a", "b"))
    chosen = cells(("unipc-2",), None, (5,))
    for run in (plain, compiled):
        run.run(chosen)
    assert compiled.records[0]["rmse"] == pytest.approx(plain.records[0]["rmse"], abs=1e-5)
    assert results.collect(compiled)["setup"]["compiled"] and "compiled" not in results.collect(plain)["setup"]
    assert {p.name for p in (tmp_path / "a" / "cells").iterdir()} == {p.name for p in (tmp_path / "b" / "cells").iterdir()}
    with pytest.raises(FastdiffError, match="only a torch module"):
        Bench(gaussian(), Setup(8), tmp_path / "c", None, compile=True)


def test_an_interrupt_keeps_finished_cells(tmp_path):
    run = Bench(gaussian(), Setup(8), tmp_path, None)

    def stop(what, evaluations):
        if what.startswith("unipc"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(cells(("ddim", "unipc-2"), None, (5,)), stop)
    assert len(list((tmp_path / "cells").iterdir())) == 1  # the finished one, and no half-written file


def test_guidance_counts_both_calls_and_labels_go_in_turn(tmp_path):
    den = fd.load(tiny.checkpoint(tmp_path / "m.safetensors"))
    assert Setup(7).labels(den).tolist() == [0, 1, 2, 0, 1, 2, 0]
    run = Bench(den, Setup(4, guidance=2.0), tmp_path / "out", None)
    run.run([Cell("ddim", "uniform_t", 3)])
    assert run.records[0]["network_calls"] == 6 and run.records[0]["nfe"] == 3


def test_the_frontier_has_the_best_sde_line_too():
    rows = [("ddim", 5, 3.0, False), ("sa-solver", 10, 2.0, True), ("ddpm", 20, 2.5, True), ("sa-solver", 20, 4.0, True)]
    cells = [{"line": line, "nfe": nfe, "kid_clf": kid, "stochastic": sde} for line, nfe, kid, sde in rows]
    assert pictures.best_sde_line(cells, "kid_clf") == ["sa-solver"]
    assert pictures.best_sde_line(cells, "fid") == pictures.best_sde_line(cells[:1], "kid_clf") == []


def test_records_pictures_and_report_are_written(bench, tmp_path):
    record = results.collect(bench)
    out = tmp_path / "out"
    results.write(record, out)
    pictures.frontier(record, out / "frontier.png")
    pictures.samples(record, bench.pictures, out / "samples.png")
    report.write(record, out)
    assert json.loads((out / "results.json").read_text())["setup"]["n"] == 24
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {(r["solver"], r["nfe"]) for r in rows} == {(c["solver"], str(c["nfe"])) for c in bench.records}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "src=\"http" not in page
    for record_row in bench.records:
        assert record_row["line"] in page


def test_presets_hold_what_they_promise():
    quick, full = quick_cells(), full_cells()
    assert len({c.solver for c in quick}) == 5 and {c.nfe for c in quick} == {5, 8, 10, 20, 50}
    assert {c.solver for c in full} == set(fd.list_solvers())
    assert len(set(full)) == len(full) and len({c.grid for c in full}) >= 6


def test_a_saved_plan_is_a_cell_of_its_own(tmp_path):
    den = gaussian()
    table = fd.plan("ddim", den, 4)
    run = Bench(den, Setup(4), tmp_path, None)
    run.run([Cell("mine", "plan", 4, table), Cell("ddim", "uniform_t", 4)])
    assert [r["line"] for r in run.records] == ["mine", "ddim · uniform_t"]
    assert run.records[0]["rmse"] == run.records[1]["rmse"]


def test_no_judge_for_a_model_of_other_data():
    assert scorer_for(gaussian()) is None


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--preset", "huge"], "quick or full"),
        (["--solvers", "dpmp-2m"], "dpmpp-2m"),
        (["--solvers", "ddim", "--grids", "karas"], "unknown grid"),
        (["--solvers", "ddim", "--nfe", "five"], "whole numbers"),
        (["--solvers", "ddim", "--nfe", "0"], "at least 1"),
        (["--n", "1"], "at least 2"),
        (["--inception", "weights.pth"], "--data"),
        (["--plan", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_line(fastdiff, tmp_path, arguments, said):
    checkpoint = tiny.checkpoint(tmp_path / "m.safetensors")
    code, _, err = fastdiff("bench", checkpoint, "--out", tmp_path / "out", *arguments)
    assert code == 2 and said in err and err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_a_used_folder_unless_told_to_resume(fastdiff, tmp_path):
    checkpoint = tiny.checkpoint(tmp_path / "m.safetensors")
    command = ("bench", checkpoint, "--out", tmp_path / "out", "--n", "2", "--solvers", "ddim", "--nfe", "2")
    assert fastdiff(*command)[0] == 0
    code, _, said = fastdiff(*command)
    assert code == 2 and "--resume" in said
    assert fastdiff(*command, "--resume")[0] == 0


def test_setup_refuses_nonsense():
    for bad in ({"n": 1}, {"n": 8, "batch": 0}, {"n": 8, "first_seed": -1}):
        with pytest.raises(FastdiffError):
            Setup(**bad)
