"""A network in a bare `.onnx`: the same formula in torch is the truth, told what no graph says by the JSON beside it."""

import json

import onnx
import onnx.parser
import pytest
import torch
from safetensors.torch import save_file

import fastdiff as fd
from fastdiff.checkpoints.conditions import read_conditions
from fastdiff.errors import FastdiffError

X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 3])
SAID = {"schedule": "vp_linear", "prediction": "eps", "time_scale": 999}
# F = x (1 + label) + t / 1000, every input declared as the case has it
CLASSES = """
    <ir_version: 8, opset_import: ["" : 18]>
    g ({x}[{batch}, 2, 4, 4] sample, {t} timestep, int64[{batch}] class_labels) => ({x}[{batch}, 2, 4, 4] out) {{
        axes = Constant <value_ints = [-1, 1, 1, 1]> ()
        one = Constant <value_float = 1.0> ()
        thousand = Constant <value_float = 1000.0> ()
        tf = Cast <to = 1> (timestep)
        label = Cast <to = 1> (class_labels)
        told = Reshape (tf, axes)
        asked = Reshape (label, axes)
        gain = Add (asked, one)
        small = Div (told, thousand)
        xf = Cast <to = 1> (sample)
        big = Mul (xf, gain)
        sum = Add (big, small)
        out = CastLike (sum, sample)
    }}
"""


PLAIN = CLASSES.replace(", int64[{batch}] class_labels", "").replace("Cast <to = 1> (class_labels)", "Identity (one)")


def network(x, t, class_labels):
    return x * (1 + class_labels.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1) / 1000


def saved(folder, text=CLASSES, said=SAID, x="float", t="float[b]", batch="b"):
    path = folder / "net.onnx"
    onnx.save(onnx.parser.parse_model(text.format(x=x, t=t, batch=batch)), path)
    path.with_suffix(".json").write_text(json.dumps(said))
    return path


@pytest.mark.parametrize(
    ("how", "whole"),
    [
        ({}, False),
        ({"t": "float"}, False),  # one time for all
        ({"t": "double[1]"}, False),
        ({"t": "int64[b]"}, True),
        ({"batch": "1", "t": "float[1]"}, False),  # a graph of one sample: called for each
        ({"x": "float16"}, False),
    ],
)
def test_it_predicts_what_the_formula_does(how, whole, tmp_path):
    den = fd.load(saved(tmp_path, said={**SAID, "num_classes": 4}, **how)).bind(class_labels=LABELS)
    assert den.shape == (2, 4, 4) and den.num_classes == 4 and len(den.hash) == 64
    same = fd.Denoiser(
        network, fd.schedule.vp_linear(), "eps", time=lambda t: round(999 * t) if whole else 999 * t
    ).bind(class_labels=LABELS)  # fmt: skip
    tolerance = 2e-3 if how.get("x") == "float16" else 1e-5
    for t in (0.1, 0.5004, 1.0):
        wanted = same(X, t)
        assert (den(X, t) - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_inputs_that_have_other_names(tmp_path):
    """Two whole numbers a sample: the first would be taken for the time, but the JSON knows better."""
    swapped = CLASSES.replace("timestep, int64[{batch}] class_labels)", "y, int64[{batch}] when)")
    swapped = swapped.replace("(timestep)", "(when)").replace("(class_labels)", "(y)")
    said = {**SAID, "inputs": {"t": "when", "class_labels": "y"}, "num_classes": 5, "null_class": True}
    den = fd.load(saved(tmp_path, swapped, said, t="int64[b]")).bind(class_labels=LABELS)
    wanted = fd.Denoiser(network, fd.schedule.vp_linear(), "eps", time=lambda t: round(999 * t)).bind(class_labels=LABELS)
    assert (den(X, 0.3) - wanted(X, 0.3)).abs().max() < 1e-5
    guided = fd.guide.cfg(den, 2.0)(X, 0.3)  # the last class is "none"
    none = wanted.bind(class_labels=torch.tensor([4, 4, 4]))(X, 0.3)
    assert (guided - (2 * wanted(X, 0.3) - none)).abs().max() < 1e-4 and den.num_classes == 4


def test_conditions_from_a_file(tmp_path):
    """Its inputs beside sample and time, by their names: whole numbers here."""
    den = fd.load(saved(tmp_path))
    save_file({"class_labels": LABELS.float()}, tmp_path / "c.safetensors")
    bound = read_conditions(tmp_path / "c.safetensors", den, 3).bound(den, range(3))
    assert torch.equal(bound(X, 0.5), den.bind(class_labels=LABELS)(X, 0.5))
    save_file({"labels": LABELS.float()}, tmp_path / "c.safetensors")
    with pytest.raises(FastdiffError, match="class_labels is missing; labels is not known here"):
        read_conditions(tmp_path / "c.safetensors", den, 3)


def test_every_command_runs_it(fastdiff, tmp_path, monkeypatch):
    from fastdiff.bench import converged

    monkeypatch.setattr(converged, "FIRST_STEPS", 4)
    monkeypatch.setattr(converged, "MOST_STEPS", 8)
    path = saved(tmp_path, PLAIN.replace(", 2, 4, 4]", ", 1, h, w]"), {**SAID, "shape": [1, 4, 4]})
    code, out, err = fastdiff("info", path, "--json")
    assert code == 0, err
    info = json.loads(out)["checkpoint"]
    assert info["format"] == "ONNX" and info["shape"] == [1, 4, 4] and info["schedule"]["name"] == "vp_linear"
    for command in (("sample", path, "--nfe", 2, "--seeds", "0-1", "--out", "o"),
                    ("bench", path, "--solvers", "ddim", "--nfe", "2", "--n", 2, "--out", "b")):  # fmt: skip
        code, _, err = fastdiff(*command)
        assert code == 0, err
    code, _, err = fastdiff("train", "--data", path, "--from", path, "--out", tmp_path / "run")
    assert code == 2 and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("how", "said", "words"),
    [
        ({}, {}, "schedule and prediction"),
        ({}, {"schedule": "vp_linear"}, "does not say its prediction"),
        ({}, {**SAID, "schedule": "vp_lineal"}, "vp_lineal"),
        ({}, {**SAID, "schedule": ["vp_linear"]}, "disagree"),
        ({}, {**SAID, "prediction": "epsilon"}, "epsilon"),
        ({}, {**SAID, "time_scale": "999"}, "time_scale"),
        ({}, {**SAID, "speed": 9}, "speed"),
        ({}, {**SAID, "shape": [2, 8, 8]}, "takes samples of 2, 4, 4"),
        ({}, {**SAID, "shape": [2, 4]}, "asked for shape 2, 4"),
        ({}, {**SAID, "shape": "2x4x4"}, "in numbers"),
        ({}, {**SAID, "inputs": {"t": "time"}}, "no input time"),
        ({}, {**SAID, "inputs": ["sample"]}, "disagree"),
        ({}, {**SAID, "num_classes": "all"}, "num_classes"),
        ({"x": "bfloat16"}, SAID, "bfloat16"),
        ({"t": "float[b, 1]"}, {**SAID, "inputs": {"class_labels": "class_labels"}}, "cannot be told"),
    ],
)
def test_what_is_wrong_is_one_line(how, said, words, tmp_path):
    with pytest.raises(FastdiffError, match=words) as caught:
        fd.load(saved(tmp_path, said=said, **how))
    assert "\n" not in str(caught.value) and "net.onnx" in str(caught.value)


def test_calls_that_are_wrong_are_one_line(tmp_path):
    den = fd.load(saved(tmp_path))
    for cond, words in (({}, "class_labels"), ({"class_labels": LABELS, "y": LABELS}, "y"),
                        ({"class_labels": torch.zeros(3, 2)}, "does not run")):  # fmt: skip
        with pytest.raises(FastdiffError, match=words):
            den.bind(**cond)(X, 0.5)
    with pytest.raises(FastdiffError, match="batches of 2"):
        fd.load(saved(tmp_path, batch="2", t="float[2]")).bind(class_labels=LABELS)(X, 0.5)


@pytest.mark.parametrize("damage", [b"", b"no graph at all", None])
def test_files_that_are_no_graph(damage, tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    with pytest.raises(FastdiffError, match=r"net\.onnx") as caught:
        fd.load(path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_folder_are_refused(tmp_path):
    """A graph may keep its weights in files beside it; one that points elsewhere is not opened."""
    (tmp_path / "secret").write_bytes(b"\0" * 4)
    (tmp_path / "m").mkdir()
    path = saved(tmp_path / "m")
    model = onnx.load(path)
    one = next(node for node in model.graph.node if node.output[0] == "one")
    model.graph.node.remove(one)
    weight = onnx.TensorProto(name="one", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../secret")
    model.graph.initializer.append(weight)
    onnx.save(model, path)
    with pytest.raises(FastdiffError, match=r"net\.onnx"):
        fd.load(path)
