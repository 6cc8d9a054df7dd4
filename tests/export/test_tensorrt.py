"""TensorRT: real engines from real exports where tensorrt-rtx is installed; every name the code uses against the wheels of both
families; who may run an engine. Nothing here runs an engine: that needs an NVIDIA GPU."""

import ast
import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from making import make

from fastdiff.errors import CheckpointError, FastdiffError
from fastdiff.export import tensorrt
from fastdiff.export.tensorrt import FLAVOURS, Settings, engine_key, misfit

SOURCES = [Path(tensorrt.__file__).with_name(name) for name in ("tensorrt.py", "native.py")]
# the variables that hold TensorRT's objects in those files
OBJECTS = {"trt", "builder", "network", "parser", "config", "profile", "cache", "runtime", "engine", "context", "refitter",
           "level"}  # fmt: skip
RTX_ALONE = {"set_compute_capability", "num_compute_capabilities", "ComputeCapability", "CudaGraphStrategy",
             "cuda_graph_strategy", "WHOLE_GRAPH_CAPTURE", "create_runtime_config"}  # fmt: skip


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (the extra `rtx`)")


def names_used():
    """Every attribute that the code reads from TensorRT's objects, and from theirs."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            chain, inner = [], node
            while isinstance(inner, ast.Attribute):
                chain, inner = [inner.attr, *chain], inner.value
            if isinstance(inner, ast.Attribute | ast.Name) and chain:
                root = inner.id
                if root == "self" and chain[0] in OBJECTS:
                    found.update(chain[1:])
                elif root in OBJECTS:
                    found.update(chain)
    return found - {"__version__", "split"}


def test_the_walk_finds_the_names():
    names = names_used()
    assert {"create_network", "STRONGLY_TYPED", "execute_async_v3", "refit_cuda_engine", "WHOLE_GRAPH_CAPTURE"} <= names
    assert names >= RTX_ALONE and len(names) > 40


def test_every_name_is_in_tensorrts_bindings():
    """The wheel tensorrt-cu13-bindings, whose library cannot be loaded without TensorRT's own: its names are strings in it."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None or spec.origin is None:
        pytest.skip("tensorrt-cu13-bindings is not installed")
    (library,) = Path(spec.origin).parent.glob("tensorrt*.so")
    data = library.read_bytes()

    def known(name):  # perhaps as the end of a longer string, where the linker merged them
        return name.encode() + b"\0" in data

    assert not known("EXPLICIT_BATCH") and not known("set_compute_capability"), "TensorRT 11 lacks these"
    assert sorted(name for name in names_used() - RTX_ALONE if not known(name)) == []


def test_every_name_is_in_tensorrt_for_rtx(rtx):
    known = set(dir(rtx))
    for value in vars(rtx).values():
        known |= set(dir(value)) | set(getattr(value, "__members__", ()))
    assert sorted(names_used() - known) == []
    assert set(FLAVOURS[-1].capabilities) <= set(rtx.ComputeCapability.__members__)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Everything at once: the U-Net, a Loop over a stochastic plan, guidance, fp16."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (the extra `rtx`)")
    out = tmp_path_factory.mktemp("rtx") / "engine"
    checkpoint = tiny.checkpoint(out.with_name("a.safetensors"))
    build = Settings({"batch": (1, 2, 4)}, capabilities=("SM86", "SM120"))
    return make(checkpoint, out, "euler-ancestral", 4, 2.0, form="tensorrt-rtx", precision="fp16", build=build)


def test_real_engines_from_a_real_export(half, rtx):
    manifest = json.loads((half / "manifest.json").read_text())
    record = manifest["tensorrt"]
    assert record["built"] and record["flavour"] == "TensorRT for RTX" and record["version"] == rtx.__version__
    assert record["capabilities"] == ["SM86", "SM120"] and manifest["opset"] == 21 and manifest["verified"]
    assert not record["executed"] and "not run" in record["why"]
    for part in ("sampler", "network"):
        assert (half / f"{part}.engine").read_bytes()[:4] == b"vtrt"
        assert manifest["files"][f"{part}.engine"]["bytes"] > 100_000 and len(record["keys"][part]) == 64


def test_an_engine_that_cannot_run_is_said_and_not_run(half, fastdiff):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, out, err = fastdiff("run", half, "--seeds", "0-1", "--out", "o", "--threads", 1)
    assert (code, err) == (0, "") and "needs an NVIDIA GPU" in out and "on cpu" in out
    code, out, err = fastdiff("run", half, "--provider", "engine", "--out", "p")
    assert code == 2 and len(err.splitlines()) == 1 and "needs an NVIDIA GPU" in err and not (fastdiff.folder / "p").exists()


def test_a_corrupted_engine_is_never_loaded(half, tmp_path):
    from fastdiff.export.runtime import Engine

    copy = shutil.copytree(half, tmp_path / "copy")
    data = bytearray((copy / "sampler.engine").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "sampler.engine").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"sampler\.engine has sha256"):
        Engine(copy)


def test_an_engine_of_another_gpu_or_version_is_one_line(half, tmp_path, monkeypatch):
    from fastdiff.export import native
    from fastdiff.export.runtime import Engine

    monkeypatch.setattr(native, "gpu", lambda: H200)
    with pytest.raises(FastdiffError, match=r"cannot run here: it was built for SM86, SM120, here is NVIDIA H200 \(SM90\)"):
        Engine(half, provider="engine")
    copy = shutil.copytree(half, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tensorrt"]["version"] = "1.6.0.1"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(native, "gpu", lambda: A10)
    with pytest.raises(FastdiffError, match=r"built with TensorRT for RTX 1\.6\.0\.1, here is .*: export it again"):
        Engine(copy, provider="engine")


@pytest.mark.slow
@pytest.mark.parametrize("solver, guidance, wish", [
    ("unipc-2", 1.0, {}), ("dpmpp-2m", 2.0, {"unroll": True}),
    ("unipc-2", 1.0, {"build": Settings({"batch": (2, 2, 2)}, level=1)}),
])  # fmt: skip
def test_more_real_engines(solver, guidance, wish, rtx, checkpoint, tmp_path):
    made = make(checkpoint, tmp_path / "e", solver, 4, guidance, form="tensorrt-rtx", **wish)
    assert json.loads((made / "manifest.json").read_text())["tensorrt"]["built"]


def test_what_tensorrt_refuses_is_its_own_reason_in_one_line(rtx, tmp_path):
    from onnx import save_model

    from fastdiff.export.graph import FLOAT, Graph, value

    g = Graph()
    g.add("Det", "x", into=["y"])  # ONNX knows determinants, TensorRT does not
    save_model(g.model("m", [value("x", FLOAT, ("batch", 3, 3))], [value("y", FLOAT, ("batch",))], 20), tmp_path / "m.onnx")
    with pytest.raises(FastdiffError, match=r"TensorRT for RTX cannot read m\.onnx: .*Det") as found:
        tensorrt.build(tmp_path / "m.onnx", Settings(capabilities=("SM86",)), FLAVOURS[-1], rtx)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("settings, words", [
    (Settings(version_compatible=True), "takes no --version-compatible"), (Settings(hardware="ampere"), "no --hardware"),
    (Settings(capabilities=("SM90",)), "has capabilities SM75, .*; given SM90"),
])  # fmt: skip
def test_settings_that_tensorrt_for_rtx_lacks(settings, words):
    with pytest.raises(FastdiffError, match=words):
        settings.check(FLAVOURS[-1])


def test_without_tensorrt_the_folder_holds_the_onnx_and_the_settings(checkpoint, traced_once, fastdiff, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    args = ["--format", "tensorrt", "--solver", "ddim", "--nfe", 2, "--profile", "1,2,8", "--hardware", "ampere", "--refit"]
    code, out, err = fastdiff("export", checkpoint, "--out", "e", *args)
    assert (code, err) == (0, "") and "tensorrt is not installed: pip install 'tensorrt>=11'" in out
    record = json.loads((fastdiff.folder / "e" / "manifest.json").read_text())["tensorrt"]
    ranges = {**tensorrt.RANGES, "batch": (1, 2, 8)}
    assert Settings.read(record["settings"]) == Settings(ranges, "ampere", refit=True) and not record["built"]
    code, out, err = fastdiff("run", "e", "--seeds", "0-1", "--out", "o")
    assert (code, err) == (0, "") and "on cpu" in out
    code, _, err = fastdiff("run", "e", "--provider", "engine", "--out", "p")
    assert code == 2 and len(err.splitlines()) == 1 and "pip install 'tensorrt>=11'" in err


def test_an_onnx_folder_has_no_engine(checkpoint, traced_once, tmp_path):
    from fastdiff.export.runtime import Engine

    with pytest.raises(FastdiffError, match="holds no TensorRT engine: export with --format tensorrt"):
        Engine(make(checkpoint, tmp_path / "e", nfe=2), provider="engine")


H200 = {"name": "NVIDIA H200", "capability": [9, 0]}
H100 = {"name": "NVIDIA H100", "capability": [9, 0]}
A10 = {"name": "NVIDIA A10", "capability": [8, 6]}
T4 = {"name": "Tesla T4", "capability": [7, 5]}


@pytest.mark.parametrize("settings, capabilities, version, here, words", [
    (Settings(), [], "11.4.0.106", H200, None),
    (Settings(), [], "11.4.0.106", None, "needs an NVIDIA GPU"),
    (Settings(), [], "11.3.0.99", H200, r"built with TensorRT 11 11\.4\.0\.106, here is 11\.3\.0\.99: export it again"),
    (Settings(), [], "11.5.0.1", H200, r"here is 11\.5"),
    (Settings(), [], "11.4.0.106", H100, r"built for NVIDIA H200, here is NVIDIA H100 \(SM90\)"),
    (Settings(hardware="capability"), [], "11.4.0.106", H100, None),
    (Settings(hardware="capability"), [], "11.4.0.106", A10, r"here is NVIDIA A10 \(SM86\)"),
    (Settings(hardware="ampere"), [], "11.4.0.106", A10, None),
    (Settings(hardware="ampere"), [], "11.4.0.106", T4, "built for Ampere and later"),
    (Settings(version_compatible=True), [], "12.0.0.1", H200, None),
    (Settings(version_compatible=True), [], "10.16.1.11", H200, r"here is 10\.16"),
    (Settings(), ["SM86", "SM120"], "11.4.0.106", A10, None),
    (Settings(), ["SM86", "SM120"], "11.4.0.106", H200, r"built for SM86, SM120, here is NVIDIA H200 \(SM90\)"),
])  # fmt: skip
def test_who_may_run_an_engine(settings, capabilities, version, here, words):
    from dataclasses import asdict

    made = {"flavour": "TensorRT 11", "version": "11.4.0.106", "gpu": H200, "settings": json.loads(json.dumps(asdict(settings))),
            "capabilities": capabilities}  # fmt: skip
    why = misfit(made, version, here)
    assert why is None if words is None else why is not None and re.search(words, why), why


def test_an_engines_key_holds_all_it_depends_on():
    base = ("0" * 64, "fp16", Settings(), FLAVOURS[1], "11.4.0.106", H200)
    changes = {0: "1" * 64, 1: "fp32", 2: Settings({"batch": (1, 4, 8)}), 3: FLAVOURS[0], 4: "11.4.1.1", 5: H100}
    keys = {engine_key(*base), *(engine_key(*base[:i], v, *base[i + 1 :]) for i, v in changes.items())}
    assert len(keys) == 7 and engine_key(*base) == engine_key(*base[:2], replace(Settings()), *base[3:])


@pytest.mark.parametrize("args, words", [
    (["--format", "tensorrt", "--profile", "4,1,16"], "smallest,usual,largest, such as 1,4,16; given 4,1,16"),
    (["--format", "tensorrt", "--profile", "many"], "given 'many'"), (["--refit"], "--refit only acts with --format tensorrt"),
    (["--format", "tensorrt", "--hardware", "abacus"], "own, capability, ampere; given 'abacus'"),
])  # fmt: skip
def test_mistakes(args, words, checkpoint, fastdiff):
    code, out, err = fastdiff("export", checkpoint, "--out", "e", *args)
    assert code == 2 and len(err.splitlines()) == 1 and words in err and not out
    assert not any(fastdiff.folder.iterdir())


def test_a_batch_outside_the_profile_is_one_line():
    """Without a GPU the engine's answer cannot be had; what is said then is."""
    from fastdiff.export.native import Native

    engine = object.__new__(Native)
    engine.names = engine.feeds = ["noise"]
    engine.dtypes = {"noise": torch.float32}

    class Answers:
        def set_input_shape(self, name, shape):
            return shape[0] <= 4

        def get_tensor_profile_shape(self, name, profile):
            return (1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 8, 8)

    engine.context = engine.engine = Answers()
    with pytest.raises(FastdiffError, match=r"noise has shape \(5, 1, 8, 8\); this engine takes \(1, 1, 8, 8\) to \(4,"):
        engine.call({"noise": torch.zeros(5, 1, 8, 8)})
