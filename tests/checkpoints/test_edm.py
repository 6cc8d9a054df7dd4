"""EDM's networks against physicsnemo's, NVIDIA's own later edition of them (frozen numbers)."""

import math

import peer_networks
import pytest
import torch
from safetensors.torch import save_file

import fastdiff as fd
from fastdiff.errors import CheckpointError, FastdiffError

CASES = peer_networks.cases()
X, NOISE = peer_networks.image([2, 3, 8, 8]), torch.tensor([-0.7, 0.9])
FORMS = {"ddpm++": "DDPM++", "ddpm++ of classes": "DDPM++", "ncsn++": "NCSN++", "adm": "ADM"}


def saved(folder, name, **more):
    weights = {f"model.{k}": v for k, v in peer_networks.weights(CASES[f"edm {name}"]["weights"]).items()}
    save_file({**weights, **more}, folder / "edm.safetensors")
    return folder / "edm.safetensors"


@pytest.mark.parametrize("name", FORMS)
def test_the_network_is_theirs(name, tmp_path):
    den = fd.load(saved(tmp_path, name))
    labels = {"class_labels": torch.tensor([1, 4])} if den.num_classes else {}
    with torch.no_grad():
        assert peer_networks.error(den.network(X, NOISE, **labels), CASES[f"edm {name}"]) < 1e-5
    assert den.shape == (3, 8, 8) and den.info["format"].endswith(FORMS[name]) and den.num_classes in (0, 5)


def test_preconditioning_is_edms(tmp_path):
    """Karras et al. 2022, table 1, with the file's own sigma_data."""
    den = fd.load(saved(tmp_path, "ncsn++"), config={"sigma_data": 0.7})
    assert den.schedule == fd.schedule.edm(sigma_min=0.002, sigma_max=80.0, sigma_data=0.7)
    for sigma in (0.01, 1.0, 40.0):
        root = math.hypot(sigma, 0.7)
        f = den.network(X / root, torch.full((2,), math.log(sigma) / 4))
        wanted = 0.49 / root**2 * X + sigma * 0.7 / root * f
        assert (den(X, sigma) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_it_samples(tmp_path):
    den = fd.load(saved(tmp_path, "ddpm++ of classes")).bind(class_labels=torch.tensor([0, 4]))
    assert fd.sample(den, fd.plan("heun", den, nfe=5), seeds=[0, 1]).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("more", "config", "words"),
    [
        ({"u": torch.zeros(1001)}, {}, "iDDPM"),
        ({}, {"class_name": "VEPrecond"}, "VEPrecond"),
        ({}, {"sigma_dta": 1.0}, "sigma_dta"),
        ({}, {"sigma_data": "half"}, "numbers"),
        ({"model.enc.8x8_blok0.weight": torch.zeros(1)}, {}, "8x8_blok0"),
        ({"model.other.weight": torch.zeros(1)}, {}, "1 unexpected"),
    ],
)
def test_what_is_no_edm_network_is_said(more, config, words, tmp_path):
    with pytest.raises(FastdiffError, match=words) as caught:
        fd.load(saved(tmp_path, "ncsn++", **more), config=config)
    assert "\n" not in str(caught.value)


def test_nvidias_own_pickles_are_refused(tmp_path):
    (tmp_path / "edm-cifar10.pkl").write_bytes(b"\x80\x03}q\x00.")
    with pytest.raises(CheckpointError, match="trust-pickle"):
        fd.load(tmp_path / "edm-cifar10.pkl")
