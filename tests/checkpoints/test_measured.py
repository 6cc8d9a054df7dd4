"""What the README says of loading, and of diffusers' checkpoints, is in the records under benches/results."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDS, README = ROOT / "benches" / "results", (ROOT / "README.md").read_text()


def test_memory_of_loading():
    record = json.loads((RECORDS / "loading.json").read_text())
    ratios = {loader: [r["peak"] / r["weights"] for r in record["rows"] if r["loader"] == loader]
              for loader in ("fastdiff", "copying control")}  # fmt: skip
    assert max(ratios["fastdiff"]) <= 1.05 <= record["bar"] <= 1.2 and len(ratios["fastdiff"]) == 6
    assert min(ratios["copying control"]) >= record["at_least_by_the_control"] >= 1.9
    assert "at most 1.05 times the weights' own size" in README and "a loader that copies 2.0" in README


def test_calls_for_the_quality_of_diffusers_ddim():
    path = RECORDS / "diffusers_quality.json"
    block = README.split("<!-- diffusers -->\n")[1].split("<!-- end of diffusers -->")[0]
    if not path.exists():
        assert "no run is stored yet" in block
        pytest.skip("benches/diffusers_quality.py was not run yet")
    record = json.loads(path.read_text())
    assert block == record["sentence"] + "\n" and record["cpu_seconds"] < 15 * 60
    assert all(str(nfe) in block for nfe in record["nfe_that_reaches_ddim_50"].values() if nfe)
