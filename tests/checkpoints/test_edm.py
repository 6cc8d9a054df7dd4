"""EDM's networks against physicsnemo's, NVIDIA's own later edition of them (frozen numbers)."""

import math

import peer_networks
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

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


def is_wanted(found, wanted):
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("t", [0.01, 0.4, 1.0])
def test_vp_preconditioning_is_edms(t, tmp_path):
    """Karras et al. 2022, table 1, column VP: D = x - sigma F(x / sqrt(1 + sigma^2), 999 t), on x = x0 + sigma eps."""
    den = fd.load(saved(tmp_path, "ddpm++"), config={"class_name": "VPPrecond"})
    sigma = math.sqrt(math.expm1(19.9 * t**2 / 2 + 0.1 * t))
    root = math.hypot(1, sigma)
    is_wanted(den(X / root, t), X - sigma * den.network(X / root, torch.full((2,), 999 * t)))
    assert den.info["format"] == "EDM, DDPM++, VPPrecond" and math.isclose(den.schedule.t_of_lam(-math.log(sigma)), t)


def test_ve_preconditioning_is_edms(tmp_path):
    """Table 1, column VE: D = x + sigma F(x, log(sigma / 2))."""
    path = saved(tmp_path, "ncsn++")
    save_file(load_file(path), path, metadata={"class_name": "VEPrecond"})  # as `fastdiff convert` writes it
    den = fd.load(path)
    assert den.schedule == fd.schedule.ve(0.02, 100.0)
    for sigma in (0.03, 1.0, 90.0):
        is_wanted(den(X, sigma), X + sigma * den.network(X, torch.full((2,), math.log(sigma / 2))))
    is_wanted(den(X, torch.tensor([1.0, 1.0])), den(X, 1.0))


def iddpm(folder, steps=1000):
    """A network of classes that learned its variance, and its levels: those of the cosine betas, noise first."""
    u = [0.0]
    cosine = [math.sin(math.pi / 2 * j / steps / 1.008) ** 2 for j in range(steps + 1)]
    for j in range(steps, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(cosine[j - 1] / cosine[j], 0.001) - 1))
    doubled = {f"model.out_conv.{n}": torch.tensor(peer_networks.draw(n, s), dtype=torch.float32) for n, s in
               (("weight", CASES["edm adm"]["weights"]["out_conv.weight"]), ("bias", [3]))}  # fmt: skip
    doubled = {name: torch.cat([value, value + 1]) for name, value in doubled.items()}
    return saved(folder, "adm", u=torch.tensor(u[::-1]), **doubled), u[::-1]


def test_iddpm_preconditioning_is_edms(tmp_path):
    """Table 1, column iDDPM + DDIM: D = x - sigma F(x / sqrt(1 + sigma^2), M - 1 - j) at level u_j; learned variance dropped.
    Its levels are diffusers'."""
    path, u = iddpm(tmp_path, steps := 1000)
    den = fd.load(path).bind(class_labels=torch.tensor([1, 4]))
    for j in (3, 500, 990):
        sigma = u[j]
        root = math.hypot(1, sigma)
        f = den.network(X / root, torch.full((2,), steps - 1.0 - j), class_labels=torch.tensor([1, 4]))
        assert f.shape[1] == 6
        is_wanted(den(X / root, steps - 1.0 - j), X - sigma * f[:, :3])
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    assert ((den.schedule.alpha(torch.arange(1000.0)) ** 2 - theirs).abs() <= 1e-4 * theirs + 1e-9).all()


def test_it_samples(tmp_path):
    den = fd.load(saved(tmp_path, "ddpm++ of classes")).bind(class_labels=torch.tensor([0, 4]))
    assert fd.sample(den, fd.plan("heun", den, nfe=5), seeds=[0, 1]).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("more", "config", "words"),
    [
        ({"u": torch.zeros(1001)}, {}, "iDDPM"),
        ({}, {"class_name": "EDM2Precond"}, "EDM2Precond"),
        ({}, {"class_name": "iDDPMPrecond"}, "named u is missing"),
        ({}, {"class_name": "VEPrecond", "sigma_min": 200.0}, "sigma_min < sigma_max"),
        ({}, {"class_name": "VPPrecond", "sigma_data": 1.0}, "sigma_data"),
        ({"other": torch.zeros(1)}, {}, "other"),
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
