"""guided-diffusion and improved-diffusion files against azula's copy of guided-diffusion's network (frozen numbers)."""

import json

import numpy as np
import peer_networks
import pytest
import torch

import fastdiff as fd
from fastdiff.checkpoints import load_classifier
from fastdiff.errors import CheckpointError, FastdiffError
from fastdiff.files import sha256

CASES = peer_networks.cases()
X, T = peer_networks.image([2, 3, 16, 16]), torch.tensor([3.0, 250.5])


def saved(folder, name, how=torch.save, **changes):
    """The peer's weights under the peer's names, and the flags beside them."""
    case = CASES[name]
    how(peer_networks.weights(case["weights"]), folder / "model.pt")
    (folder / "model.json").write_text(json.dumps({**case["config"], **changes}))
    return folder / "model.pt"


@pytest.mark.parametrize("name", ["guided", "improved", "new-order"])
def test_the_network_is_theirs(name, tmp_path):
    path = saved(tmp_path, f"adm {name}")
    den = fd.load(path)
    cond = {"class_labels": torch.tensor([1, 6])} if name == "guided" else {}
    with torch.no_grad():
        assert peer_networks.error(den.network(X, T, **cond), CASES[f"adm {name}"]) < 1e-5
    assert den.shape == (3, 16, 16) and den.hash == sha256(path) and den.num_classes == (7 if name == "guided" else 0)


def test_schedule_prediction_and_time_are_the_flags(tmp_path):
    guided = fd.load(saved(tmp_path, "adm guided"))
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # Ho et al. 2020
    t = torch.arange(1000, dtype=torch.float64)
    assert (guided.schedule.alpha(t) ** 2 - torch.tensor(a)).abs().max() < 1e-15 and guided.prediction == "eps"
    x, labels = X, {"class_labels": torch.tensor([1, 6])}
    eps = guided.network(x, torch.full((2,), 40.0), **labels)[:, :3]  # the other half is the learned variance
    x0 = (x.double() - (1 - a[40]) ** 0.5 * eps) / a[40] ** 0.5
    assert (guided.bind(**labels)(x, 40.0) - x0).abs().max() < 1e-5 * x0.abs().max()

    improved = fd.load(saved(tmp_path, "adm improved"))
    levels = np.cos((np.arange(4001) / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2
    wanted = np.cumprod(np.maximum(levels[1:] / levels[:-1], 0.001))
    found = improved.schedule.alpha(np.arange(4000.0)) ** 2
    assert np.allclose(found, wanted, rtol=1e-9, atol=0) and improved.time(2000.0) == 500.0  # rescale_timesteps
    assert fd.load(saved(tmp_path, "adm new-order")).prediction == "x0"
    assert (guided.info["variance"], improved.info["variance"]) == ("learned", "large")
    assert fd.load(saved(tmp_path, "adm improved", sigma_small=True)).info["variance"] == "small"


def test_files_before_the_zip_format_and_safetensors(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "old").mkdir()
    zipped = fd.load(saved(tmp_path, "adm improved"))
    old = fd.load(saved(tmp_path / "old", "adm improved", lambda w, p: torch.save(w, p, _use_new_zipfile_serialization=False)))
    assert torch.equal(old(X, 9.0), zipped(X, 9.0)) and old.hash != zipped.hash
    save_file(peer_networks.weights(CASES["adm improved"]["weights"]), tmp_path / "model.safetensors")
    assert torch.equal(fd.load(tmp_path / "model.safetensors")(X, 9.0), zipped(X, 9.0))


def test_the_noisy_classifier_is_theirs(tmp_path):
    path = saved(tmp_path, "classifier")
    classifier = load_classifier(path)
    with torch.no_grad():
        logits = classifier(peer_networks.image([1, 3, 64, 64]), T[:1])
    assert peer_networks.error(logits, CASES["classifier"]) < 1e-5
    with pytest.raises(CheckpointError, match="load_classifier"):
        fd.load(path)
    with pytest.raises(CheckpointError, match="no classifier"):
        load_classifier(saved(tmp_path, "adm improved"))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("guided", {"num_chanels": 3}, "num_chanels"),
        ("guided", {"learn_sigma": False}, "takes 3 channels"),
        ("guided", {"class_cond": False}, r"1 unexpected \(label_emb"),
        ("guided", {"num_channels": "many"}, "num_channels"),
        ("guided", {"num_channels": 64}, "misshapen"),
        ("guided", {"num_res_blocks": 2}, "missing"),
        ("guided", {"noise_schedule": "sqrt"}, "linear or cosine"),
        ("guided", {"resblock_updown": "maybe"}, "maybe"),
        ("guided", {"flags": "--image_size"}, "pairs"),
        ("improved", {"rescale_timesteps": None}, "rescale_timesteps"),
        ("improved", {"image_size": 20, "channel_mult": ""}, "channel_mult"),
        ("improved", {"num_heads": 5}, "num_heads"),
    ],
)
def test_flags_that_are_wrong(name, change, words, tmp_path):
    with pytest.raises(FastdiffError, match=words) as caught:
        fd.load(saved(tmp_path, f"adm {name}", **change))
    assert "\n" not in str(caught.value)


def test_flags_as_an_argument_and_none_at_all(tmp_path):
    path = saved(tmp_path, "adm improved")
    path.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.json"):
        fd.load(path)
    assert fd.load(path, config=CASES["adm improved"]["config"], shape=(3, 32, 32)).shape == (3, 32, 32)
