"""The variational bound of a learned variance, and a network that is trained on it."""

import math

import pytest
import tiny
import torch

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import load_images
from fastdiff.training.trainer import Trainer
from fastdiff.training.variance import bound

SCHEDULE = fd.schedule.vp_cosine()
NETWORK = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "attention": [], "head_channels": 32}


def gaussians(t, steps):
    """Mean weights (on x_t, on x0) and variances of q(x_s | x_t, x_0), by Bayes' rule on numbers, and of the forward step."""
    step = (SCHEDULE.t_max - SCHEDULE.t_min) / steps
    a, s, b, r = (float(f(u)) for u in (t, t - step) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    ratio = a / b
    added = s * s - ratio**2 * r * r
    precision = 1 / (r * r) + ratio**2 / added
    return (ratio / added / precision, b / (r * r) / precision), 1 / precision, added


def normal(mean, width):
    return torch.distributions.Normal(*(torch.tensor(value, dtype=torch.float64) for value in (mean, width)))


@pytest.mark.parametrize("t", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0, 0.4])
def test_the_bound_is_the_divergence_of_two_gaussians(t, v):
    x0, x, d = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (0.3, -0.7, 0.1))
    (on_x, on_x0), var, added = gaussians(t, 20)
    q = normal(on_x * -0.7 + on_x0 * 0.3, math.sqrt(var))
    p = normal(on_x * -0.7 + on_x0 * 0.1, math.exp(((1 + v) * math.log(added) + (1 - v) * math.log(var)) / 4))
    want = float(torch.distributions.kl_divergence(q, p)) / math.log(2)
    got = bound(SCHEDULE, x0, x, d, torch.full_like(x, v), torch.tensor([t], dtype=torch.float64), 20)
    assert float(got) == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_only_the_variance_gets_gradients_and_the_last_step_counts_nothing():
    x0, x = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    d, v = (torch.zeros(2, 1, 2, 2).requires_grad_() for _ in range(2))
    t = torch.tensor([SCHEDULE.t_min, 0.5], dtype=torch.float64)
    found = bound(SCHEDULE, x0, x, d + 0.1, v, t, 50)
    found.sum().backward()
    assert d.grad is None and found[0] == 0.0 and found[1] > 0
    assert float(v.grad[0].abs().max()) == 0.0 and float(v.grad[1].abs().min()) > 0


def test_the_best_variance_is_what_the_posterior_and_the_error_of_the_mean_make_up():
    """KL is least at var = posterior + shift^2, where that lies between the two allowed variances."""
    (_, on_x0), var, added = gaussians(0.3, 20)
    d = 0.5 * math.sqrt(added - var) / on_x0  # an error of the prediction whose best variance lies inside
    best = 2 * (math.log(var + (on_x0 * d) ** 2) - math.log(var)) / (math.log(added) - math.log(var)) - 1
    assert -1 < best < 1
    zero, t = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    values = [float(bound(SCHEDULE, zero, zero, zero + d, zero + best + off, t, 20)) for off in (-0.2, 0.0, 0.2)]
    assert values[1] < min(values[0], values[2])


def test_the_trainer_adds_the_bound_and_its_model_samples(tmp_path):
    images = load_images(tiny.npz(tmp_path / "x.npz"))

    def trainer(vlb, out):
        return Trainer(TrainConfig(steps=12, batch=8, lr=2e-3, network=NETWORK, vlb=vlb, vlb_steps=50), images, tmp_path / out)

    small, one, two = (float(trainer(v, "none").loss(torch.Generator().manual_seed(1)).detach()) for v in (1e-9, 0.1, 0.2))
    assert two - one == pytest.approx(one - small, rel=1e-4) and one - small > 1e-3
    run = trainer(0.02, "run")
    run.run()
    x, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 300.0), torch.tensor([0, 1, 2, 0])
    assert run.network(x, t, labels).shape == (4, 2, 8, 8)
    assert float(run.network(x, t, labels)[:, 1].detach().abs().max()) > 1e-3  # it began at 0
    den = fd.load(tmp_path / "run").bind(class_labels=torch.tensor([0, 1]))
    table = fd.plan("ddpm", den, 5, variance="learned")
    assert table.learned_variance and bool(fd.sample(den, table, seeds=[0, 1]).isfinite().all())


@pytest.mark.slow
def test_a_learned_variance_lowers_the_bound(tmp_path):
    """Fewer bits a dimension, on noise that no step drew and with the same means, than DDPM's two fixed variances (-1 small, 1
    large) and than the one in the middle (0), where training starts."""
    images, steps = load_images(tiny.npz(tmp_path / "x.npz")), 20
    settings = {"batch": 16, "lr": 4e-3, "warmup": 10, "ema": 0.9, "label_dropout": 0.0}
    Trainer(TrainConfig(steps=120, vlb=0.02, vlb_steps=steps, network=NETWORK, **settings), images, tmp_path / "run").run()
    den = fd.load(tmp_path / "run").bind(class_labels=images.y)
    x0 = images.x.float() / 127.5 - 1
    fixed, generator = (-1.0, 0.0, 1.0), torch.Generator().manual_seed(11)
    learned, others = 0.0, torch.zeros(len(fixed))
    with torch.no_grad():
        for t in torch.linspace(0.06, SCHEDULE.t_max, 2 * steps, dtype=torch.float64):
            noise = torch.randn(x0.shape, generator=generator)
            x = float(SCHEDULE.alpha(t)) * x0 + float(SCHEDULE.sigma(t)) * noise
            d, v = den.with_variance(x, float(t))
            learned += float(bound(SCHEDULE, x0, x, d, v, t.expand(len(x)), steps).mean())
            for i, value in enumerate(fixed):
                others[i] += bound(SCHEDULE, x0, x, d, torch.full_like(v, value), t.expand(len(x)), steps).mean()
    assert learned < 0.95 * float(others.min()), (learned, others)


def test_a_learned_variance_without_its_loss_is_refused(tmp_path):
    images = load_images(tiny.npz(tmp_path / "x.npz"))
    for wanted, vlb, said in ((True, 0.0, "without learned"), (False, 0.001, "with learned")):
        network = {"learned_variance": wanted}
        with pytest.raises(FastdiffError, match=said):
            Trainer(TrainConfig(steps=1, vlb=vlb, network={**NETWORK, **network}), images, tmp_path / "run")
    with pytest.raises(FastdiffError, match="vlb"):
        TrainConfig(steps=1, vlb=-1.0)
