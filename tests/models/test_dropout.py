"""Dropout masks that belong to samples."""

import pytest
import torch
from torch import nn

from fastdiff.models import UNet, UNetConfig
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


def test_recomputed_activations_see_the_same_masks():
    """Gradients with activations computed again in the backward pass are those without."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(1, 1, 32, (1,), 1, (), 32, dropout=0.4)).train()
    for p in net.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.05)
    x, t, found = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 500.0]), []
    seed_dropout(net, [3, 9])
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(x, t).square().mean().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
