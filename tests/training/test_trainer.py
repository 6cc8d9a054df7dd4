"""The trainer: what it optimises falls, what it resumes is bit-identical, and what cannot train is said at once."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.prediction import PREDICTIONS
from fastdiff.schedule import FAMILIES
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import batch_indices, load_images
from fastdiff.training.losses import sample_times, weights
from fastdiff.training.trainer import Trainer

NETWORK = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "attention": [], "head_channels": 32}
SCHEDULES = {
    **{name: {"name": name} for name in FAMILIES},
    "vp_from_alphas_cumprod": {"name": "vp_from_alphas_cumprod", "alphas_cumprod": [0.99, 0.9, 0.6, 0.2, 0.01]},
    "shifted": {"name": "shifted", "base": {"name": "flow"}, "shift": 3.0},
    "zero_terminal_snr": {"name": "zero_terminal_snr", "base": {"name": "vp_linear"}},
}


@pytest.fixture
def data(tmp_path):
    return load_images(tiny.npz(tmp_path / "data.npz"))


def config(**changes):
    fields = {"steps": 30, "batch": 8, "lr": 2e-3, "warmup": 5, "network": NETWORK, "ema": 0.9, **changes}
    return TrainConfig(**fields)


def trained(path):
    """Everything that a finished run left, as one dictionary of tensors."""
    state = torch.load(path / "state.pt", weights_only=True)
    moments = {f"{i}.{k}": v for i, s in state["optimiser"]["state"].items() for k, v in s.items()}
    return {
        **{f"net.{k}": v for k, v in state["network"].items()},
        **{f"ema.{k}": v for k, v in state["ema"].items()},
        **moments,
        "losses": state["losses"],
    }


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    """SIGKILL a real `fastdiff train`, run the command again, and compare with a run that was left alone."""
    tiny.npz(tmp_path / "data.npz")
    steps = 100
    command = [
        sys.executable, "-c", "from fastdiff.cli import main; main()", "train", "--data", str(tmp_path / "data.npz"),
        "--out", str(tmp_path / "killed"), "--steps", str(steps), "--batch", "8", "--warmup", "5", "--threads", "1",
        "--network", json.dumps({**NETWORK, "dropout": 0.1}),
    ]  # fmt: skip
    state = tmp_path / "killed" / "state.pt"
    with subprocess.Popen([*command, "--save-every", "0"], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    reached = torch.load(state, weights_only=True)["step"]
    assert process.returncode == -signal.SIGKILL and 0 < reached < steps, f"killed at {reached}: no interruption"
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"at step {reached} of {steps}" in again.stdout
    network = {**NETWORK, "dropout": 0.1}
    alone = TrainConfig(steps=steps, batch=8, warmup=5, network=network)
    Trainer(alone, load_images(tmp_path / "data.npz"), tmp_path / "alone").run()
    a, b = trained(tmp_path / "killed"), trained(tmp_path / "alone")
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    assert fd.load(tmp_path / "killed").hash == fd.load(tmp_path / "alone").hash  # the file itself


def test_ctrl_c_saves_whole_steps(tmp_path, data):
    def stop(progress):
        if progress.step == 7:
            raise KeyboardInterrupt

    short = config(steps=12)
    with pytest.raises(KeyboardInterrupt):
        Trainer(short, data, tmp_path / "a").run(stop)
    resumed = Trainer(short, data, tmp_path / "a")
    assert resumed.step == 7
    resumed.run()
    Trainer(short, data, tmp_path / "b").run()
    a, b = trained(tmp_path / "a"), trained(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize(
    "change",
    [{"lr": 1e-3}, {"seed": 1}, {"prediction": "eps"}, {"schedule": {"name": "flow"}}, {"batch": 4}, {"ema": 0.5}],
)
def test_a_run_with_other_settings_is_not_resumed(tmp_path, data, change):
    Trainer(config(steps=2), data, tmp_path / "a").run()
    with pytest.raises(FastdiffError, match=f"other settings: {next(iter(change))}"):
        Trainer(config(steps=2, **change), data, tmp_path / "a")


def test_a_run_with_other_images_or_a_damaged_state_is_not_resumed(tmp_path, data):
    Trainer(config(steps=2), data, tmp_path / "a").run()
    x, _ = tiny.images()
    other = load_images(tiny.npz(tmp_path / "other.npz", x=255 - x))
    with pytest.raises(FastdiffError, match="data_sha256"):
        Trainer(config(steps=2), other, tmp_path / "a")
    path = tmp_path / "a" / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FastdiffError, match=r"state\.pt is damaged"):
        Trainer(config(steps=2), data, tmp_path / "a")


@pytest.mark.parametrize("weighting", ["simple", "edm", "min_snr"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow", "edm", pytest.param("both", marks=pytest.mark.slow)])
def test_the_loss_falls(tmp_path, data, prediction, weighting):
    """On one fixed set of times and noises, so that the draws of single steps do not decide."""
    trainer = Trainer(config(prediction=prediction, weighting=weighting, lr=4e-3), data, tmp_path)

    @torch.no_grad()
    def loss():
        return sum(float(trainer.loss(torch.Generator().manual_seed(i))) for i in range(3))

    before = loss()
    for _ in range(30):
        trainer.train_step()
    assert loss() < 0.8 * before, f"{before} -> {loss()}"
    assert not trainer.skipped


def test_a_network_of_both_has_twice_the_channels_and_the_loss_of_the_v_they_make(tmp_path, data):
    trainer = Trainer(config(prediction="both"), data, tmp_path)
    assert trainer.network.config.out_channels == 2
    material = trainer._material(torch.Generator().manual_seed(0))
    trainer.shared = lambda x, t, **cond: torch.cat([material.x0, material.eps], 1)  # the truth
    assert float(trainer.loss(torch.Generator().manual_seed(0))) < 1e-12
    trainer.shared = lambda x, t, **cond: torch.cat([material.x0 + 1, material.eps], 1)  # v is off by sigma
    expected = material.sigma.square().mean()
    torch.testing.assert_close(trainer.loss(torch.Generator().manual_seed(0)), expected)
    with pytest.raises(FastdiffError, match="leave out vlb"):
        config(prediction="both", vlb=0.001)


def test_a_trained_network_denoises(tmp_path, data):
    """Not only the loss: at low noise the prediction of the saved EMA is nearer the image than its input is."""
    Trainer(config(steps=80, lr=4e-3), data, tmp_path).run()
    den = fd.load(tmp_path).bind(class_labels=data.y)
    x0 = data.x / 127.5 - 1.0
    t = float(den.schedule.t_of_lam(0.0))
    x = float(den.schedule.alpha(t)) * x0 + float(den.schedule.sigma(t)) * torch.randn(x0.shape)
    assert (den(x, t) - x0).square().mean() < 0.1 * (x / float(den.schedule.alpha(t)) - x0).square().mean()


@pytest.mark.parametrize("times", ["uniform", "lognormal", "logit_normal"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_trains(tmp_path, data, name, times):
    trainer = Trainer(config(schedule=SCHEDULES[name], times=times, weighting="min_snr"), data, tmp_path)
    losses = [trainer.train_step() for _ in range(3)]
    assert all(np.isfinite(losses)) and not trainer.skipped
    assert all(p.isfinite().all() for p in trainer.network.parameters())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_every_prediction_alike(prediction):
    """Whatever the network predicts, min_snr and edm weigh the same error of x0 the same: w / c_out^2 agrees."""
    from fastdiff.prediction import coefficients

    alpha = torch.tensor([0.99, 0.7, 0.1], dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    for weighting in ("min_snr", "edm"):
        on_x0 = weights(weighting, "x0", alpha, sigma)
        c_out = torch.as_tensor(coefficients(prediction, alpha, sigma).c_out)
        torch.testing.assert_close(weights(weighting, prediction, alpha, sigma) / c_out**2, on_x0)
    snr = (alpha / sigma) ** 2
    torch.testing.assert_close(weights("min_snr", "x0", alpha, sigma), torch.minimum(snr, torch.tensor(5.0).double()))


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_are_stratified(name):
    schedule = fd.schedule.from_config(SCHEDULES[name])
    t = sample_times(schedule, 64, "uniform", torch.Generator().manual_seed(0))
    assert t.dtype == torch.float64 and t.min() >= schedule.t_min and t.max() <= schedule.t_max
    if name == "vp_from_alphas_cumprod":
        counts = torch.bincount(t.long(), minlength=5)
        assert torch.equal(t, t.round()) and counts.min() > 0
        return
    edges = schedule.time_of_uniform(torch.linspace(0, 1, 65, dtype=torch.float64)).clamp(
        schedule.t_min, schedule.t_max
    )
    assert bool(((edges[:-1] <= t) & (t <= edges[1:])).all()), "one draw in each 64th of the range"
    assert not torch.equal(t, sample_times(schedule, 64, "uniform", torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (5, 12), (24, 1)])
def test_batches_cover_every_image_once_an_epoch(n, batch):
    steps = 3 * n  # whole epochs, whatever the batch
    drawn = torch.cat([batch_indices(n, batch, step, seed=3) for step in range(steps)]).view(-1, n)
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(n).expand(len(drawn), n))
    if n > 5:
        assert not torch.equal(drawn[0], drawn[1]), "each epoch has its own order"
    assert not torch.equal(drawn, torch.cat([batch_indices(n, batch, s, seed=4) for s in range(steps)]).view(-1, n))


def test_the_average_follows_its_recurrence(tmp_path, data):
    trainer = Trainer(config(ema=0.3), data, tmp_path)
    want = [p.detach().clone() for p in trainer.network.parameters()]
    for step in range(4):
        trainer.train_step()
        decay = min(0.3, (1 + step) / (10 + step))
        want = [decay * a + (1 - decay) * p.detach() for a, p in zip(want, trainer.network.parameters(), strict=True)]
    for a, b in zip(trainer.ema.parameters(), want, strict=True):
        torch.testing.assert_close(a, b)


def test_steps_with_nan_gradients_change_nothing_and_ten_stop_the_run(tmp_path, data):
    trainer = Trainer(config(), data, tmp_path)
    trainer.train_step()
    before = [p.detach().clone() for p in (*trainer.network.parameters(), *trainer.ema.parameters())]
    trainer.loss = lambda generator: sum(p.sum() for p in trainer.network.parameters()) * float("nan")
    for i in range(9):
        trainer.train_step()
        assert trainer.skipped == i + 1
    after = (*trainer.network.parameters(), *trainer.ema.parameters())
    assert trainer.step == 10 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(FastdiffError, match="10 steps had a non-finite gradient"):
        trainer.train_step()


def test_label_dropout(tmp_path, data):
    trainer = Trainer(config(label_dropout=0.25), data, tmp_path)
    index = torch.arange(24).repeat(100)
    labels = trainer._labels(index, torch.Generator().manual_seed(0))
    null = labels == 3
    assert abs(float(null.float().mean()) - 0.25) < 0.03
    assert torch.equal(labels[~null], data.y[index][~null])


def test_a_folder_of_images(tmp_path):
    for label, name in enumerate(("ants", "bees")):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (10 + 4 * i, 12), (40 * label, 50, 60)).save(tmp_path / name / f"{i}.png")
    images = load_images(tmp_path, size=8)
    assert images.x.shape == (4, 3, 8, 8) and images.x.dtype == torch.uint8
    assert images.y.tolist() == [0, 0, 1, 1] and images.names == ("ants", "bees")
    assert images.x[3, :, 4, 4].tolist() == [40, 50, 60]
    assert load_images(tmp_path / "ants").x.shape == (2, 3, 10, 10), "the first image's shorter side is everyone's size"
    Image.new("RGB", (12, 12)).save(tmp_path / "bees" / "1.png")
    assert load_images(tmp_path, size=8).digest != images.digest
    (tmp_path / "bees" / "0.png").write_bytes(b"no picture")
    with pytest.raises(FastdiffError, match=r"bees/0\.png is no readable image"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"x": np.zeros((4, 8, 8), np.float32)}, "uint8"),
        ({"x": np.zeros((0, 8, 8), np.uint8), "y": np.zeros(0, np.int64)}, "uint8"),
        ({"x": np.zeros((4, 8), np.uint8)}, "uint8"),
        ({"y": np.zeros(3, np.int64)}, "one integer an image"),
        ({"y": np.full(24, -1)}, "labels count from 0"),
        ({"y": np.zeros(24, np.float64)}, "one integer an image"),
        ({"x": np.array([{"code": 1}], dtype=object)}, "plain arrays"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, word):
    with pytest.raises(FastdiffError, match=word):
        load_images(tiny.npz(tmp_path / "a.npz", **arrays))


def test_files_that_are_no_data(tmp_path):
    path = tiny.npz(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FastdiffError, match="cannot read"):
        load_images(path)
    np.save(tmp_path / "b.npy", np.zeros(3))
    os.rename(tmp_path / "b.npy", tmp_path / "b.npz")
    for name in ("b.npz", "none.npz", "none.txt"):
        with pytest.raises(FastdiffError, match=name):
            load_images(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastdiffError, match="no images"):
        load_images(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weighting": "snr"}, "min_snr"),
        ({"times": "normal"}, "lognormal"),
        ({"prediction": "epsilon"}, "eps"),
        ({"schedule": {"name": "cosine"}}, "vp_cosine"),
        ({"schedule": {"name": "vp_linear", "beta_min": "low"}}, "vp_linear"),
        ({"schedule": {"name": "shifted"}}, "shifted"),
        ({"schedule": {"name": "ve", "sigma_min": 90.0}}, "sigma_min"),
        ({"network": {**NETWORK, "width": 3}}, "width"),
        ({"network": {**NETWORK, "channel_mult": 3}}, "type"),
        ({"network": [1]}, "mapping"),
        ({"network": {**NETWORK, "channel_mult": [1, 1, 1, 1, 1]}}, "divisible by 16"),
        ({"network": {**NETWORK, "in_channels": 3}}, "1 channels"),
        ({"network": {**NETWORK, "learned_variance": True}}, "learned variance"),
        ({"network": {**NETWORK, "num_classes": 3}}, "3 classes"),
        ({"network": {**NETWORK, "null_class": False}}, "null class"),
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"clip": 0.0}, "clip"),
        ({"label_dropout": 1.5}, "label_dropout"),
        ({"time_scale": float("inf")}, "time_scale"),
    ],
)
def test_settings_that_cannot_train_are_refused_before_anything_is_written(tmp_path, data, change, word):
    with pytest.raises(FastdiffError, match=word) as caught:
        Trainer(config(**change), data, tmp_path / "run").run()
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_no_null_class_and_no_dropout_trains(tmp_path, data):
    trainer = Trainer(config(label_dropout=0.0, network={**NETWORK, "null_class": False}), data, tmp_path)
    trainer.train_step()
    assert trainer.network.null_label is None


@pytest.mark.slow
def test_the_compiled_network_learns_alike(tmp_path, data):
    losses = []
    for compiled in (False, True):
        trainer = Trainer(config(), data, tmp_path / str(compiled))
        if compiled:
            trainer.compile()
            assert trainer.step == 0 and all(p.grad is None for p in trainer.network.parameters())
        losses.append([trainer.train_step() for _ in range(5)])
        trainer.save()
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert fd.load(tmp_path / "True").info["network"] == fd.load(tmp_path / "False").info["network"]


def test_what_cannot_be_compiled_is_one_line(tmp_path, data, monkeypatch):
    with pytest.raises(FastdiffError, match="dropout anew in every step: leave out --compile"):
        Trainer(config(network={**NETWORK, "dropout": 0.1}), data, tmp_path).compile()
    monkeypatch.setattr(torch, "compile", lambda module: lambda *inputs, **cond: 1 / 0)
    with pytest.raises(FastdiffError, match=r"torch.compile failed \(division by zero\): leave out --compile"):
        Trainer(config(), data, tmp_path).compile()
