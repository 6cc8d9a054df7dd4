"""Dropout whose masks belong to samples, so that a run does not depend on which process holds which part of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

APART = 1_000_003  # between the seeds of two layers: more than any batch has samples
MASK = 0xFFFFFFFF  # torch's generator on the CPU reads 32 bits of a seed


class Dropout(nn.Dropout):
    """nn.Dropout; after `seed_dropout`, sample i of a batch gets the mask of seeds[i] in this layer, however often it is asked
    for (activations that are computed again see the same mask)."""

    seeds: Sequence[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or self.seeds is None:
            return super().forward(x)
        assert len(self.seeds) == len(x), "one seed a sample"
        keep, generator = torch.empty_like(x), torch.Generator(x.device)
        for row, seed in zip(keep, self.seeds, strict=True):
            row.bernoulli_(1 - self.p, generator=generator.manual_seed(seed))
        return x * keep.div_(1 - self.p) if self.p < 1.0 else x * 0.0


def seed_dropout(network: nn.Module, seeds: Sequence[int]) -> None:
    """The masks of the next batches: sample i's in every layer follow from seeds[i] and the layer's place alone."""
    layers = [layer for layer in network.modules() if isinstance(layer, Dropout)]
    for place, layer in enumerate(layers):
        layer.seeds = [(seed + place * APART) & MASK for seed in seeds]
