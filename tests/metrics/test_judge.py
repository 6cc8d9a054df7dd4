"""The shipped judge and its reference, the rows they give, and FID's InceptionV3 against pytorch-fid."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from fastdiff.errors import CheckpointError, FastdiffError
from fastdiff.metrics import floors, load_inception, load_judge, load_reference, require_same_n, score
from fastdiff.metrics.distances import frechet_distance, kid, sliced_wasserstein
from fastdiff.metrics.inception import Inception, InceptionNet, _Mixed
from fastdiff.metrics.train_judge import _augment, _balanced_order, train_judge
from fastdiff.shipped import FASHION_MNIST, read_verified, write_hashed


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def reference():
    return load_reference()


def _images(pixels):
    return torch.from_numpy(pixels).float().unsqueeze(1) / 127.5 - 1.0


def test_shipped_judge_knows_the_shipped_test_images(judge, reference):
    assert len(reference.test_images) == 2048
    right = judge.logits(_images(reference.test_images)).argmax(1).numpy() == reference.test_labels[:2048]
    assert right.mean() >= 0.90
    assert abs(right.mean() - float(judge.info["accuracy"])) < 0.03  # the stated figure is of all 10,000
    assert set(np.unique(reference.test_labels)) == set(range(10))


@pytest.mark.parametrize("half", ["train", "test"])
def test_shipped_features_are_those_of_the_shipped_images(judge, reference, half):
    images, features = getattr(reference, f"{half}_images"), getattr(reference, f"{half}_features")
    assert features.shape == (10_000, 48)
    found = judge.features(_images(images[:512])).numpy()
    # half a unit in the last place of float16, and the float32 rounding of another machine's convolutions
    np.testing.assert_allclose(features[:512].astype(np.float32), found, rtol=2**-10, atol=1e-5)


def test_judge_is_independent_of_batching_and_gives_no_gradient(judge, reference):
    images = _images(reference.test_images[:70])
    one = judge(images, batch=70)
    np.testing.assert_allclose(judge(images, batch=9).features, one.features, atol=2e-5)
    images.requires_grad_(True)
    assert not judge.logits(images).requires_grad
    assert torch.equal(judge.logits(images * 1.0 + 0.0), one.logits)
    beyond = torch.where(images.detach() == -1.0, -1.2, images.detach())
    assert torch.equal(judge.logits(beyond), one.logits)  # overshoot is clamped, as a viewer does


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(4, 3, 28, 28),
        torch.zeros(0, 1, 28, 28),
        torch.zeros(4, 1, 28, 28, dtype=torch.uint8),
        torch.full((4, 1, 28, 28), 200.0),
        torch.full((4, 1, 28, 28), float("nan")),
    ],
)
def test_judge_refuses_other_images(judge, bad):
    with pytest.raises(FastdiffError, match="allow"):
        judge(bad)


def _copy(folder, *names):
    for name in names:
        shutil.copy(FASHION_MNIST / name, folder)


@pytest.mark.parametrize(("load", "name"), [(load_judge, "judge.safetensors"), (load_reference, "reference.npz")])
def test_a_tampered_asset_is_refused(tmp_path, load, name):
    _copy(tmp_path, name, "hashes.json")
    load(tmp_path / name)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1000] ^= 1  # one bit of one weight
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        load(tmp_path / name)
    (tmp_path / name).write_bytes(bytes(data[:5000]))
    with pytest.raises(CheckpointError, match="sha256"):
        load(tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        load(tmp_path / name)
    (tmp_path / "hashes.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no entry"):
        load(tmp_path / name)
    (tmp_path / "hashes.json").write_text("nonsense")
    with pytest.raises(CheckpointError, match=r"hashes\.json"):
        load(tmp_path / name)


def test_a_file_with_a_true_hash_and_wrong_content_is_refused(tmp_path):
    for name, load in (("judge.safetensors", load_judge), ("reference.npz", load_reference)):
        data = safetensors.torch.save({"weight": torch.zeros(3)})
        (tmp_path / name).write_bytes(data)
        (tmp_path / "hashes.json").write_text(json.dumps({name: hashlib.sha256(data).hexdigest()}))
        with pytest.raises(CheckpointError, match="does not hold"):
            load(tmp_path / name)


def test_score_of_real_images_is_the_floor_and_of_damaged_ones_is_worse(judge, reference):
    n = 1000
    images, labels = _images(reference.test_images[:n]), reference.test_labels[:n]
    row, anchor = score(images, torch.from_numpy(labels), judge, reference), floors(reference, n)
    assert require_same_n([row, anchor]) == n
    assert row.fd_clf is None  # too few images for it
    assert row.class_accuracy > 0.88
    assert abs(row.kid_clf - anchor.kid_clf) < 4 * row.kid_error
    assert abs(row.precision - anchor.precision) < 0.05
    assert abs(row.recall - anchor.recall) < 0.05
    # one class only, and noise: each seen by the figures that should see it
    shirts = reference.test_labels[: len(reference.test_images)] == 6
    one_class = score(_images(reference.test_images[shirts]), None, judge, reference)
    assert one_class.class_accuracy is None
    assert one_class.class_entropy < 1.5 < 3.2 < row.class_entropy
    assert one_class.recall < row.recall - 0.3
    noisy = score(images + 0.3 * torch.randn(images.shape, generator=torch.manual_seed(0)), labels, judge, reference)
    assert noisy.kid_clf > row.kid_clf + 10 * row.kid_error
    assert noisy.precision < row.precision - 0.1
    assert noisy.sliced_wasserstein > row.sliced_wasserstein


def test_score_of_2048_images_is_made_of_the_plain_distances(judge, reference):
    images = _images(reference.test_images)
    row, anchor = score(images, reference.test_labels[:2048], judge, reference), floors(reference, 2048)
    real, fake = reference.train_features[:2048], judge.features(images).numpy()
    assert row.fd_clf == pytest.approx(frechet_distance(real, fake))
    labels = {"strata_a": reference.train_labels[:2048], "strata_b": reference.test_labels[:2048]}
    assert (row.kid_clf, row.kid_error) == pytest.approx(tuple(kid(real, fake, **labels)))
    assert abs(anchor.kid_clf) < 4 * anchor.kid_error < 0.002  # both halves follow one law: unbiased means zero
    pixels = [half.reshape(2048, 784) / 127.5 - 1 for half in (reference.train_images, reference.test_images)]
    assert row.sliced_wasserstein == pytest.approx(sliced_wasserstein(*pixels), rel=1e-5)
    assert row.sliced_wasserstein == pytest.approx(anchor.sliced_wasserstein, rel=1e-5)
    assert row.fd_clf == pytest.approx(anchor.fd_clf, rel=0.25)  # the anchor is the mean over 4 blocks


def test_rows_of_different_n_and_bad_input_are_refused(judge, reference):
    images = _images(reference.test_images[:24])
    row = score(images, None, judge, reference)
    with pytest.raises(FastdiffError, match=r"\[9, 24\]"):
        require_same_n([row, dataclasses.replace(row, n=9)])
    with pytest.raises(FastdiffError, match="one n"):
        require_same_n([])
    for bad, labels, words in (
        (images[:3], None, "n = 3"),
        ((images + 1) / 2, None, r"\[0, 1\]"),
        (images, [0] * 23, "labels"),
        (images, [10] * 24, "labels"),
    ):
        with pytest.raises(FastdiffError, match=words):
            score(bad, labels, judge, reference)
    with pytest.raises(FastdiffError, match="10001"):
        floors(reference, 10_001)


def test_training_refuses_data_it_cannot_use(tmp_path):
    few = {f"x_{half}": np.zeros((20, 28, 28), np.uint8) for half in ("train", "test")}
    np.savez(tmp_path / "few.npz", **few, y_train=np.zeros(20, np.uint8), y_test=np.zeros(20, np.uint8))
    for name, epochs, words in (("few.npz", 1, "10000"), ("none.npz", 1, "cannot read"), ("few.npz", 0, "epochs")):
        with pytest.raises(FastdiffError, match=words):
            train_judge(tmp_path / name, tmp_path / "out", epochs=epochs)
    assert not (tmp_path / "out").exists()


def test_reference_order_is_a_permutation_with_the_classes_in_turn(reference):
    labels = np.repeat(np.arange(10), 30)  # sorted, as the files are
    order = _balanced_order(labels, np.random.default_rng(0))
    assert sorted(order) == list(range(300))
    assert all(sorted(run) == list(range(10)) for run in labels[order].reshape(-1, 10))
    for half in (reference.train_labels, reference.test_labels):
        assert all(np.ptp(np.bincount(half[:n], minlength=10)) <= 1 for n in (100, 777, 2048, 10_000))


def test_augmentation_only_flips_and_shifts():
    image = torch.full((400, 1, 28, 28), -1.0)
    image[:, 0, 10, 5] = 1.0
    found = _augment(image, torch.Generator().manual_seed(0))
    places = {tuple(place) for place in (found[:, 0] == 1.0).nonzero()[:, 1:].tolist()}
    assert (found == 1.0).sum() == 400 and (found == -1.0).sum() == 400 * 783
    assert places == {(row, column + off) for row in range(8, 13) for column in (5, 22) for off in range(-2, 3)}


def test_writing_an_asset_keeps_the_other_hashes_and_leaves_no_scraps(tmp_path):
    write_hashed(tmp_path / "one.bin", b"1")
    write_hashed(tmp_path / "two.bin", b"2")
    write_hashed(tmp_path / "one.bin", b"3")
    assert (read_verified(tmp_path / "one.bin"), read_verified(tmp_path / "two.bin")) == (b"3", b"2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hashes.json", "one.bin", "two.bin"]


def _pattern(shapes):
    """Weights by formula, so that two programs can hold the same ones without a 95 MB file."""
    state = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        steps = torch.arange(int(np.prod(shape)), dtype=torch.float64)
        wave = torch.cos(steps**2 * (0.1 + 0.001 * index)).reshape(shape)
        if len(shape) == 4:
            wave = wave * 2 / (shape[1] * shape[2] * shape[3]) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            wave = 1 + 0.5 * wave
        state[name] = wave.float() if shape else torch.tensor(0)
    return state


def test_inception_gives_what_pytorch_fid_gives():
    """Frozen from pytorch-fid 0.3.0 / torchvision 0.29.2 with `_pattern` as weights: names, shapes, features."""
    network = InceptionNet()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    digest = hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()
    assert digest == "d1c9a52dc8072dcb7e0b68516f97ca745d703c7a19a5e36e1037e47adfdb0487"
    network.load_state_dict(_pattern(shapes))
    images = ((torch.arange(2 * 3 * 75 * 60) ** 2 * 7 // 5) % 256).to(torch.uint8).reshape(2, 3, 75, 60)
    features = Inception(network)(images)
    assert features.shape == (2, 2048)
    expected = [
        [0.08772116899490356, 0.0, 0.0, 13.068948745727539, 17.491764068603516, 0.02271397039294243, 5.224342346191406,
         31.102027893066406],
        [0.09325700253248215, 0.0, 0.0, 13.016569137573242, 17.715442657470703, 0.022673822939395905,
         5.170512676239014, 30.9305419921875],
    ]  # fmt: skip
    np.testing.assert_allclose(features[:, ::256], expected, rtol=2e-4, atol=2e-4)
    assert features.mean().item() == pytest.approx(14.258336067199707, rel=1e-4)
    assert features.std().item() == pytest.approx(19.81564712524414, rel=1e-4)
    grey = images[:1, :1]
    assert torch.equal(Inception(network)(grey), Inception(network)(grey.repeat(1, 3, 1, 1)))


def test_inception_average_pool_leaves_out_the_padding_and_maximum_differs():
    image = torch.ones(1, 4, 5, 5)
    image[..., 2, 2] = 9.0
    for pool, corner, centre in (("average", 1.0, 17 / 9), ("maximum", 1.0, 9.0)):
        block = _Mixed(4, {"branch_pool": (4, 1, 1)}, pool).eval()
        block.get_submodule("branch_pool.conv").weight.data = torch.eye(4)[:, :, None, None]
        out = block(image) * (1 + 1e-3) ** 0.5  # undo batch norm's epsilon
        assert out[0, 0, 0, 0].item() == pytest.approx(corner, rel=1e-5)
        assert out[0, 0, 2, 2].item() == pytest.approx(centre, rel=1e-5)


def test_inception_loads_a_plain_state_dict_and_refuses_others(tmp_path):
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in InceptionNet().state_dict().items()}
    # a file of broadcast scalars: the right names and shapes in a few kB
    good = {name: torch.full((1,) * len(shape), 0.5).expand(shape) for name, shape in shapes.items()}
    good = {name: value for name, value in good.items() if "num_batches" not in name}  # as in files of old torch
    path = tmp_path / "inception.pth"
    torch.save(good, path)
    loaded = load_inception(path)
    assert not loaded.published  # not the file whose digest the published name carries
    assert torch.equal(loaded.network.fc.weight, torch.full((1008, 2048), 0.5))
    for change, words in (
        ({"fc.weight": torch.zeros(1).expand(1000, 2048)}, "another shape.*fc.weight"),
        ({"AuxLogits.fc.bias": torch.zeros(1000)}, "unknown.*AuxLogits"),
    ):
        torch.save(good | change, path)
        with pytest.raises(CheckpointError, match=words):
            load_inception(path)
    torch.save({name: value for name, value in good.items() if "Mixed_7c" not in name}, path)
    with pytest.raises(CheckpointError, match=r"missing.*Mixed_7c"):
        load_inception(path)
    torch.save([torch.zeros(3)], path)
    with pytest.raises(CheckpointError, match="not a map"):
        load_inception(path)
    torch.save({"run": print}, path)  # code, which weights_only refuses
    with pytest.raises(CheckpointError, match="cannot read"):
        load_inception(path)
    for name in ("none.pth", "none.safetensors"):
        with pytest.raises(CheckpointError, match="cannot read"):
            load_inception(tmp_path / name)


def test_inception_refuses_floats_and_odd_shapes():
    with torch.device("meta"):
        network = Inception(InceptionNet())
    for bad in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8).byte()):
        with pytest.raises(FastdiffError, match="uint8"):
            network(bad)
