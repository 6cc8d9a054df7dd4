"""A diffusers folder without text (DDPM, DDIM, LDM): pictures in 8 network calls."""

import sys

import torch

import fastdiff as fd


def main(path: str) -> torch.Tensor:
    den = fd.load(path)  # the model, its schedule and prediction from scheduler_config.json, its autoencoder as decoder
    plan = fd.plan("unipc-2", den, nfe=8)
    return den.images(fd.sample(den, plan, seeds=range(4)))  # (4, C, H, W) in [0, 1]


if __name__ == "__main__":
    print(main(sys.argv[1]).shape)
