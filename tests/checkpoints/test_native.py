"""Checkpoints: what was saved comes back; nothing damaged, dangerous or contradictory does, and one line says why."""

import json
import pickle

import pytest
import tiny
import torch
from safetensors.torch import save_file

import fastdiff as fd
from fastdiff import shipped
from fastdiff.checkpoints import native
from fastdiff.checkpoints import weights as weights_module
from fastdiff.errors import CheckpointError, FastdiffError
from fastdiff.files import sha256


def refused(path, *words):
    """The checkpoint is refused with one line that holds these words."""
    with pytest.raises(FastdiffError) as caught:
        fd.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_round_trip_keeps_weights_description_and_predictions(tmp_path):
    net = tiny.network()
    den = fd.load(tiny.checkpoint(tmp_path / "a.safetensors", net))
    for name, value in net.state_dict().items():
        assert torch.equal(den.network.state_dict()[name], value), name
    assert (den.shape, den.prediction, den.data_range) == ((1, 8, 8), "v", (-1, 1))
    assert den.schedule == fd.schedule.vp_cosine() and den.hash == sha256(tmp_path / "a.safetensors")
    assert not den.network.training and not any(p.requires_grad for p in den.network.parameters())
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    made = fd.Denoiser(net, fd.schedule.vp_cosine(), "v", time=lambda t: 1000.0 * t).bind(class_labels=labels)
    assert torch.equal(den.bind(class_labels=labels)(x, 0.4), made(x, 0.4))


def test_a_run_folder_is_a_checkpoint(tmp_path):
    tiny.checkpoint(tmp_path / "model.safetensors")
    assert fd.load(tmp_path).hash == fd.load(str(tmp_path / "model.safetensors")).hash


def test_half_precision_weights_load_as_float32(tmp_path):
    native.save(tmp_path / "a.safetensors", tiny.network().half().state_dict(), tiny.description())
    assert fd.load(tmp_path / "a.safetensors").dtype == torch.float32


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.999])
def test_truncated(tmp_path, part):
    path = tiny.checkpoint(tmp_path / "a.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    refused(path, "a.safetensors", "truncated")


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.ckpt", "a.pkl"])
def test_a_pickle_is_refused_without_running_it(tmp_path, name):
    mark = tmp_path / "ran"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
    pickle.loads(pickle.dumps(Bomb(tmp_path / "control")))
    assert (tmp_path / "control").exists(), "the bomb itself must work, or this test proves nothing"
    refused(tmp_path / name, name)
    assert not mark.exists()


def test_missing(tmp_path):
    refused(tmp_path / "none.safetensors", "no checkpoint", "fashion-mnist")
    refused(tmp_path, "no checkpoint")


def test_safetensors_of_someone_else(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "description")


@pytest.mark.parametrize("text", ["not json", "[1, 2]", "{}", json.dumps({"format": 99})])
def test_description_that_is_none(tmp_path, text):
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"fastdiff": text})
    refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"schedule": {"name": "vp_cosinus"}}, "vp_cosinus"),
        ({"schedule": {"name": "vp_cosine", "beta": 1}}, "beta"),
        ({"prediction": "epsilon"}, "epsilon"),
        ({"data_range": [1, -1]}, "data_range"),
        ({"data_range": None}, "disagree"),
        ({"shape": [3, 8, 8]}, "channels"),
        ({"time_scale": "1000"}, "time_scale"),
        ({"network": {**tiny.NETWORK, "depth": 3}}, "depth"),
        ({"network": {**tiny.NETWORK, "model_channels": "32"}}, "model_channels"),
        ({"network": {**tiny.NETWORK, "model_channels": 64}}, "disagree"),
        ({"network": {**tiny.NETWORK, "model_channels": 32_000_000}}, "disagree"),  # refused before it is allocated
        ({"network": [1]}, "disagree"),
    ],
)
def test_wrong_description(tmp_path, change, word):
    native.save(tmp_path / "a.safetensors", tiny.network().state_dict(), tiny.description(**change))
    refused(tmp_path / "a.safetensors", word)


@pytest.mark.parametrize("field", ["network", "schedule", "prediction", "data_range", "shape"])
def test_description_that_lacks_a_field(tmp_path, field):
    described = tiny.description()
    del described[field]
    native.save(tmp_path / "a.safetensors", tiny.network().state_dict(), described)
    refused(tmp_path / "a.safetensors", field)


def test_weights_that_do_not_fit(tmp_path):
    weights = tiny.network().state_dict()
    lacking = {k: v for k, v in weights.items() if k != "out.2.weight"}
    native.save(tmp_path / "a.safetensors", lacking, tiny.description())
    refused(tmp_path / "a.safetensors", "out.2.weight")
    native.save(tmp_path / "b.safetensors", {**weights, "extra": torch.zeros(1)}, tiny.description())
    refused(tmp_path / "b.safetensors", "extra")


def test_the_first_ten_names_of_each_kind_are_told_and_how_many_there_are(tmp_path):
    weights = tiny.network().state_dict()
    names = sorted(weights)
    kept = {k: v for k, v in weights.items() if k not in names[:12]}
    misshapen = names[12:14]
    kept |= {k: torch.zeros(7) for k in misshapen} | {f"extra.{i:02}": torch.zeros(1) for i in range(11)}
    native.save(tmp_path / "a.safetensors", kept, tiny.description())
    with pytest.raises(CheckpointError) as caught:
        fd.load(tmp_path / "a.safetensors")
    message = str(caught.value)
    assert "12 missing (" in message and "11 unexpected (" in message and "2 misshapen (" in message
    assert sum(name in message for name in names[:12]) == 10 and message.count(", ...)") == 2
    assert "extra.09" in message and "extra.10" not in message
    assert all(f"{name} (7,) for {tuple(weights[name].shape)}" in message for name in misshapen)


def test_shipped_models_are_tied_to_their_hash(tmp_path, monkeypatch):
    path = tiny.checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "hashes.json").write_text(json.dumps({"model.safetensors": sha256(path)}))
    monkeypatch.setitem(shipped.SHIPPED, "toy", tmp_path)
    assert fd.load("toy").hash == sha256(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # one bit of one weight: still a readable file
    path.write_bytes(data)
    fd.load(path)
    with pytest.raises(CheckpointError, match="damaged or was changed"):
        fd.load("toy")
    (tmp_path / "hashes.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*hashes\.json"):
        fd.load("toy")
    path.unlink()
    with pytest.raises(CheckpointError, match="reinstall"):
        fd.load("toy")


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tiny.checkpoint(tmp_path / "a.safetensors")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        native.save(path, tiny.network().state_dict(), {"network": object()})

    def full(weights, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module, "save_file", full)
    with pytest.raises(FastdiffError, match="No space left"):
        native.save(path, tiny.network().state_dict(), tiny.description())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_shipped_model_loads():
    """Needs the shipped model."""
    den = fd.load("fashion-mnist")
    assert den.shape == (1, 28, 28) and den.network.null_label == 10
