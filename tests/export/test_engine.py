"""An engine's folder: whole or not at all, proven, described, refused when it changed; and the same images everywhere."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import fastdiff as fd
from fastdiff.errors import CheckpointError, FastdiffError

CPU_ONLY = {**os.environ, "PYTHONPATH": ""}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_denoiser):
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "a.safetensors", tiny_denoiser.network)


def make(checkpoint, out, solver="unipc-2", nfe=5, guidance=1.0, names=("round", "square", "T-bar"), **wish):
    from fastdiff.export.folder import Wish, export

    den = fd.load(checkpoint)
    if guidance != 1.0:
        den = fd.guide.cfg(den.bind(class_labels=torch.zeros(1, dtype=torch.long)), guidance)
    export(den, fd.plan(solver, den, nfe), out, Wish(class_names=names, **wish))
    return out


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory):
    return make(checkpoint, tmp_path_factory.mktemp("plain") / "engine")


@pytest.fixture(scope="module")
def guided(checkpoint, tmp_path_factory):
    """Stochastic and with guidance: every input there can be."""
    return make(checkpoint, tmp_path_factory.mktemp("guided") / "engine", "euler-ancestral", 4, 2.0)


def eager(checkpoint, solver, nfe, seeds, labels, guidance=1.0):
    den = fd.load(checkpoint).bind(class_labels=torch.tensor(labels))
    den = fd.guide.cfg(den, guidance) if guidance != 1.0 else den
    return fd.sample(den, fd.plan(solver, den, nfe), seeds=seeds)


def pixels(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("seed*.png"))}


def test_the_manifest_says_everything(plain, guided, checkpoint):
    from fastdiff.export import manifest
    from fastdiff.files import sha256

    assert sorted(p.name for p in plain.iterdir()) == ["manifest.json", "network.onnx", "plan.json", "run.py", "sampler.onnx"]
    found = manifest.read(plain)
    assert found["source"]["sha256"] == sha256(checkpoint) and found["opset"] == 20 and found["verified"] is True
    assert {"torch", "onnx", "onnxruntime"} <= set(found["versions"])
    assert found["files"]["sampler.onnx"]["sha256"] == sha256(plain / "sampler.onnx")
    noise, labels = found["sampler"]["inputs"]
    assert (noise["name"], noise["shape"], noise["dtype"]) == ("noise", ["batch", 1, 8, 8], "float32")
    assert (labels["name"], labels["range"], labels["dtype"]) == ("class_labels", [0, 3], "int64")
    assert [f["batch"] for f in found["parity"]["sampler"]] == [1, 3]
    assert all(0 < f["max"] < 1e-4 for part in ("sampler", "network") for f in found["parity"][part])
    assert fd.Plan.load(plain / "plan.json").nfe == 5
    other = manifest.read(guided)
    assert [i["name"] for i in other["sampler"]["inputs"]] == ["noise", "noises", "class_labels", "guidance_scale"]
    assert other["guidance"]["default"] == 2.0 and other["plan"]["draws"] == 3


def test_each_file_is_little_more_than_its_weights(plain, checkpoint):
    weights = 4 * sum(p.numel() for p in fd.load(checkpoint).network.parameters())
    for name in ("sampler.onnx", "network.onnx"):
        assert (plain / name).stat().st_size < weights + 600_000


@pytest.mark.parametrize("labels", [[0, 1, 2], [2]])
def test_the_runtime_gives_the_eager_samples(labels, plain, guided, checkpoint):
    from fastdiff.export.runtime import Engine

    seeds = [5, 2**63 + 1, 7][: len(labels)]
    engine = Engine(plain, threads=1)
    assert engine.provider == "cpu"
    want = eager(checkpoint, "unipc-2", 5, seeds, labels)
    np.testing.assert_allclose(engine.sample(seeds, labels), want, atol=1e-4)
    engine = Engine(guided, threads=1)
    for scale in (None, 1.0, 3.0):
        want = eager(checkpoint, "euler-ancestral", 4, seeds, labels, 2.0 if scale is None else scale)
        np.testing.assert_allclose(engine.sample(seeds, labels, scale), want, atol=1e-4 * float(want.abs().max()))


def test_what_a_runtime_refuses(plain, tmp_path):
    from fastdiff.export.runtime import Engine

    engine = Engine(plain, threads=1)
    with pytest.raises(FastdiffError, match="exported without guidance"):
        engine.sample([1], [0], 2.0)
    with pytest.raises(FastdiffError, match="one class label a sample"):
        engine.sample([1])
    with pytest.raises(FastdiffError, match="0 to 3 for this engine; given 4"):
        engine.sample([1], [4])
    with pytest.raises(FastdiffError, match=r"auto, tensorrt, cuda, cpu; given 'abacus'"):
        Engine(plain, provider="abacus")
    with pytest.raises(FastdiffError, match=r"not in this onnxruntime; it has .*cpu"):
        Engine(plain, provider="tensorrt")


@pytest.mark.parametrize("name", ["sampler.onnx", "network.onnx", "plan.json", "run.py"])
def test_a_changed_or_missing_file_is_never_run(name, plain, tmp_path):
    from fastdiff.export.runtime import Engine

    copy = shutil.copytree(plain, tmp_path / "copy")
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    for open_it in (Engine, fd.load):
        with pytest.raises(CheckpointError, match=f"{name} has sha256"):
            open_it(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        Engine(copy)


@pytest.mark.parametrize("change, words", [
    (lambda m: m.pop("files"), "not the manifest"), (lambda m: m.update(format=99), "format 99"),
    (lambda m: m["files"].pop("network.onnx"), "not name all parts"),
    (lambda m: m["files"].update({"../plan.json": m["files"]["plan.json"]}), "lacks ../plan.json"),
])  # fmt: skip
def test_a_manifest_that_is_none_is_refused(change, words, plain, tmp_path):
    from fastdiff.export.runtime import Engine

    copy = shutil.copytree(plain, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=words):
        Engine(copy)


def test_a_folder_without_an_engine(tmp_path):
    from fastdiff.export.runtime import Engine

    with pytest.raises(CheckpointError, match="holds no engine"):
        Engine(tmp_path)


@pytest.fixture
def traced_once(monkeypatch, tiny_traced):
    """Exports of the tiny checkpoint take its network as it was traced before, for tests of what comes after."""
    from fastdiff.export import network

    monkeypatch.setattr(network, "trace", lambda denoiser, *_: replace(tiny_traced, denoiser=denoiser))


def test_what_differs_is_not_exported(checkpoint, tmp_path, monkeypatch, traced_once):
    """The gate sees a graph that is a little wrong, and nothing is left of it."""
    from fastdiff.export import sampler

    right = sampler.columns_of

    def wrong(*args):
        found = right(*args)
        return replace(found, values=found.values * np.float32(1.001))

    monkeypatch.setattr(sampler, "columns_of", wrong)
    with pytest.raises(FastdiffError, match="differs from the eager sampler by"):
        make(checkpoint, tmp_path / "engine")
    assert not any(tmp_path.iterdir())


def test_a_folder_in_the_way_is_left_alone(plain, checkpoint):
    before = (plain / "manifest.json").read_bytes()
    with pytest.raises(FastdiffError, match="exists already"):
        make(checkpoint, plain)
    assert (plain / "manifest.json").read_bytes() == before


def test_weights_beyond_a_protobuf_lie_in_a_file_beside_it(checkpoint, tmp_path, monkeypatch, traced_once):
    from fastdiff.export import folder
    from fastdiff.export.runtime import Engine

    monkeypatch.setattr(folder, "LARGEST", 100_000)
    engine = make(checkpoint, tmp_path / "engine")
    assert {"sampler.onnx.data", "network.onnx.data"} <= set(json.loads((engine / "manifest.json").read_text())["files"])
    want = eager(checkpoint, "unipc-2", 5, [3], [1])
    np.testing.assert_allclose(Engine(engine, threads=1).sample([3], [1]), want, atol=1e-4)


def test_half_precision_is_measured_against_torchs_own(checkpoint, tmp_path):
    made = make(checkpoint, tmp_path / "engine", precision="fp16")
    found = json.loads((made / "manifest.json").read_text())
    for figures in (*found["parity"]["sampler"], *found["parity"]["network"]):
        assert 1e-6 < figures["rms"] <= max(1e-4, 2 * figures["torch_fp16_rms"])
    assert (made / "network.onnx").stat().st_size < 0.7 * 4 * sum(p.numel() for p in fd.load(checkpoint).network.parameters())


def test_a_learned_plan_goes_through_the_gate(checkpoint, tmp_path, traced_once):
    from fastdiff.export.folder import export

    den = fd.load(checkpoint)
    plan = fd.plan("ipndm-3", den, 5)
    moved = replace(plan, rows=tuple(replace(r, t=r.t * 0.98) for r in plan.rows))
    assert export(den, moved, tmp_path / "engine")["parity"]["sampler"][1]["max"] < 1e-4


def test_run_py_and_fastdiff_run_and_sample_make_the_same_images(plain, guided, checkpoint, fastdiff):
    """run.py in a fresh interpreter that can import neither torch nor fastdiff."""
    for engine, solver, nfe, scale in ((plain, "unipc-2", 5, []), (guided, "euler-ancestral", 4, ["--guidance", "2"])):
        code = (
            "import runpy, sys; sys.modules.update(torch=None, fastdiff=None); "
            "sys.argv = ['run.py', '--seeds', '0-6', '--out', 'a']; "
            f"runpy.run_path({str(engine / 'run.py')!r}, run_name='__main__')"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=fastdiff.folder, env=CPU_ONLY)
        assert fastdiff("run", engine, "--seeds", "0-6", "--out", "b", "--threads", "1", "--batch", "3")[0] == 0
        assert fastdiff("sample", checkpoint, "--solver", solver, "--nfe", nfe, "--seeds", "0-6", "--out", "c", *scale)[0] == 0
        a, b, c = (pixels(fastdiff.folder / name) for name in "abc")
        assert list(a) == list(b) == list(c) and len(a) == 7
        for name, image in c.items():  # 1e-4 of [0, 1] may turn a rounding: one step of 255, and that rarely
            for other in (a[name], b[name]):
                assert np.abs(other.astype(int) - image).max() <= 1
        assert np.mean(np.stack(list(a.values())) != np.stack(list(c.values()))) < 0.02
        for folder in "abc":
            shutil.rmtree(fastdiff.folder / folder)


def test_run_py_refuses_a_damaged_engine(plain, tmp_path):
    copy = shutil.copytree(plain, tmp_path / "copy")
    (copy / "plan.json").write_text("{}")
    done = subprocess.run([sys.executable, copy / "run.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "plan.json is not the file of the manifest" in done.stderr and not (tmp_path / "out").exists()


def test_an_engine_is_a_checkpoint(plain, checkpoint, fastdiff):
    """load, sample, guidance, single times and per-sample times: as the checkpoint it came from."""
    engine, source = fd.load(plain), fd.load(checkpoint)
    assert engine.hash == source.hash and engine.shape == source.shape and engine.schedule == source.schedule
    labels = torch.tensor([0, 1, 2])
    one, two = (fd.guide.cfg(d.bind(class_labels=labels), 2.0) for d in (engine, source))
    plan = fd.plan("dpmpp-2m", source, 4)
    torch.testing.assert_close(fd.sample(one, plan, seeds=range(3)), fd.sample(two, plan, seeds=range(3)), atol=1e-4, rtol=1e-4)
    x, t = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(one(x, t), two(x.float(), t).double(), atol=1e-4, rtol=1e-4)
    with pytest.raises(CheckpointError, match="asks for class_labels"):
        engine(x, 0.5)
    code, _, err = fastdiff("sample", plain, "--solver", "ddim", "--nfe", 2, "--seeds", "0-2", "--out", "e")
    assert (code, err) == (0, "") and len(pixels(fastdiff.folder / "e")) == 3
    cells = ["--solvers", "ddim", "--grids", "uniform_t", "--nfe", "1,2", "--n", 20]
    code, _, err = fastdiff("bench", plain, *cells, "--out", "f")
    assert (code, err) == (0, ""), err


def test_commands(checkpoint, fastdiff, traced_once):
    code, out, err = fastdiff("export", checkpoint, "--solver", "ddpm", "--nfe", 3, "--guidance", 1.5, "--unroll", "--out", "e")
    assert (code, err) == (0, "") and "ddpm, 3 evaluations, fp32, opset 20: within" in out
    manifest = json.loads((fastdiff.folder / "e" / "manifest.json").read_text())
    assert manifest["form"] == "unrolled" and manifest["source"]["classes"] == ["round", "square", "T-bar"]
    code, out, err = fastdiff("run", "e", "--classes", "square", "--seeds", "3-4", "--out", "o", "--threads", 1)
    assert (code, err) == (0, "") and "on cpu: 2 samples" in out
    assert sorted(pixels(fastdiff.folder / "o")) == ["seed000003_class1-square.png", "seed000004_class1-square.png"]


@pytest.mark.parametrize("args, words", [
    (["--format", "tensorrt"], "--format is onnx; given 'tensorrt'"), (["--precision", "int4"], "fp32 or fp16"),
    (["--target", "abacus"], "onnxruntime or tensorrt"), (["--nfe", "9", "--unroll"], "at most 8, given 9"),
    (["--solver", "ddimm"], "did you mean ddim"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(args, words, checkpoint, fastdiff):
    code, out, err = fastdiff("export", checkpoint, "--out", "e", *args)
    assert code == 2 and len(err.splitlines()) == 1 and words in err and not out
    assert not any(fastdiff.folder.iterdir())


def test_a_runs_mistakes_are_one_line(plain, fastdiff):
    for args, words in ((["nowhere"], "holds no engine"), ([plain, "--guidance", "2"], "without guidance"),
                        ([plain, "--provider", "cuda"], "not in this onnxruntime")):  # fmt: skip
        code, _, err = fastdiff("run", *args, "--out", "o")
        assert code == 2 and len(err.splitlines()) == 1 and words in err and not (fastdiff.folder / "o").exists()


def test_an_engine_has_no_gradients_and_is_tuned_without(fastdiff, checkpoint, plain, tmp_path):
    """Learning is refused in one line, the search for nodes works, and its plan is the checkpoint's."""
    tune = ["tune", plain, "--out", tmp_path / "plan.json", "--cache", tmp_path / "pairs", "--pairs", "6",
            "--validation", "4", "--batch", "3", "--nfe", "3", "--steps", "4"]  # fmt: skip
    code, _, err = fastdiff(*tune)
    assert code == 2 and "--derivative-free" in err and err.strip().count("\n") == 0
    code, _, err = fastdiff(*tune, "--derivative-free", "--start", "dpmpp-2m")
    assert code == 0, err
    found = fd.Plan.load(tmp_path / "plan.json")
    assert found.provenance["method"] == "NodeSearch" and fd.load(checkpoint).why_not(found) is None
