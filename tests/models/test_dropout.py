"""Dropout masks that belong to samples."""

import pytest
import torch
from torch import nn

from fastdiff.models.dropout import Dropout, seed_dropout

X = torch.ones(4, 3, 64, 64)


def masks(seeds, p=0.3, x=None):
    """Of two layers, (B, C, H, W) each: 0 where dropped, 1/(1 - p) where kept."""
    layers = nn.ModuleList([Dropout(p), Dropout(p)]).train()
    seed_dropout(layers, seeds)
    x = X[: len(seeds)] if x is None else x
    return [layer(x) for layer in layers]


def test_a_mask_belongs_to_its_seed_and_its_layer():
    first, second = masks([5, 6, 7, 8])
    assert torch.equal(first, masks([5, 6, 7, 8])[0]), "activations that are computed again see the same mask"
    alone = masks([7])
    assert torch.equal(first[2:3], alone[0]) and torch.equal(second[2:3], alone[1])
    assert torch.equal(torch.cat([m[0] for m in (masks([8]), masks([6]))]), first[[3, 1]])
    different = [*first, *second]
    for i, a in enumerate(different):
        for b in different[i + 1 :]:
            share = float(((a > 0) == (b > 0)).float().mean())
            assert abs(share - (0.7**2 + 0.3**2)) < 0.02, "masks of different seeds or layers are independent"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    first, _ = masks([0, 1, 2, 3], p)
    assert set(first.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - p))}
    assert abs(float((first == 0).float().mean()) - p) < 0.01
    assert abs(float(first.mean()) - 1) < 0.05 * p / (1 - p) + 0.01


def test_extremes_evaluation_and_no_seeds():
    layer = Dropout(1.0).train()
    seed_dropout(layer, [0, 1, 2, 3])
    assert not layer(X).any()
    layer = Dropout(0.5)
    seed_dropout(layer, [1])
    assert layer.eval()(X) is X, "evaluation keeps everything, whatever the batch"
    torch.manual_seed(0)
    plain = nn.Dropout(0.5).train()(X)
    torch.manual_seed(0)
    assert torch.equal(Dropout(0.5).train()(X), plain), "without seeds it is torch's own"
