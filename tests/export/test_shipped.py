"""At full size: the shipped model's engine makes the images of `fastdiff sample`, by run.py and by `fastdiff run`."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff as fd
from fastdiff.export.runtime import Engine
from fastdiff.shipped import shipped_path


def test_the_shipped_model(fastdiff):
    code, _, err = fastdiff("export", "fashion-mnist", "--solver", "unipc-2", "--nfe", 8, "--out", "e", "--threads", 1)
    assert (code, err) == (0, ""), err
    manifest = json.loads((fastdiff.folder / "e" / "manifest.json").read_text())
    assert all(f["max"] < 1e-4 for part in ("sampler", "network") for f in manifest["parity"][part])
    weights = 4 * sum(p.numel() for p in fd.load("fashion-mnist").network.parameters())
    assert all(manifest["files"][name]["bytes"] < weights + 600_000 for name in ("sampler.onnx", "network.onnx"))
    subprocess.run([sys.executable, "e/run.py", "--seeds", "0-11", "--out", "a"], check=True, cwd=fastdiff.folder)
    assert fastdiff("run", "e", "--seeds", "0-11", "--out", "b", "--threads", 1)[0] == 0
    assert fastdiff("sample", "--solver", "unipc-2", "--nfe", 8, "--seeds", "0-11", "--out", "c", "--threads", 1)[0] == 0
    names = sorted(p.name for p in (fastdiff.folder / "c").glob("seed*.png"))
    assert len(names) == 12
    for name in names:
        a, b, c = (np.asarray(Image.open(fastdiff.folder / folder / name)).astype(int) for folder in "abc")
        assert c.max() > 100, "an image, not a grey square"
        assert max(np.abs(a - c).max(), np.abs(b - c).max()) <= 1 and np.mean(a != c) < 0.005


@pytest.mark.slow
def test_a_tuned_plan_in_an_engine_is_the_eager_executors(fastdiff):
    """The plan learned for 5 calls, whose times are not those of its levels."""
    plan = shipped_path("fashion-mnist").parent / "plans" / "nfe-05.json"
    code, _, err = fastdiff("export", "fashion-mnist", "--plan", plan, "--out", "e", "--threads", 1)
    assert (code, err) == (0, ""), err
    labels = [0, 3, 7, 9]
    den = fd.load("fashion-mnist").bind(class_labels=torch.tensor(labels))
    want = den.images(fd.sample(den, fd.Plan.load(plan), seeds=range(4))).numpy()
    got = Engine("e", provider="cpu", threads=1).images(range(4), labels)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert want.max() > 0.5, "images, not grey squares"
