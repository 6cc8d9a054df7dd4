"""Five steps of SGD by the trainer: one process of `test_parallel.py`, or all of it; its arguments: data, folder."""

import sys
from pathlib import Path

import torch

from fastdiff.training.config import TrainConfig
from fastdiff.training.data import load_images
from fastdiff.training.trainer import Trainer

NETWORK = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "attention": [], "head_channels": 32}


def flat(tensors):
    return torch.cat([v.detach().flatten() for v in tensors])


def train(data, out):
    """The weights before and after, the first gradient and the losses; no clipping, so that the gradient is seen as it is."""
    config = TrainConfig(steps=10, batch=8, lr=0.03, warmup=0, clip=1e9, network={**NETWORK, "dropout": 0.2}, label_dropout=0.4)
    trainer = Trainer(config, load_images(data), Path(out))
    weights = list(trainer.network.parameters())
    trainer.optimiser = torch.optim.SGD(weights, lr=config.lr)
    found = {"start": flat(weights)}
    for step in range(5):
        trainer.train_step()
        if step == 0:
            found["gradient"] = flat(p.grad for p in weights)
    trainer.save()
    found |= {"weights": flat(weights), "average": flat(trainer.ema.parameters()), "losses": torch.tensor(trainer.losses)}
    if trainer.world.first:
        torch.save(found, Path(out) / "found.pt")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(*sys.argv[1:])
