"""A class-conditional diffusers folder (DiT): guidance against its null class."""

import sys

import torch

import fastdiff as fd


def main(path: str) -> torch.Tensor:
    den = fd.load(path).bind(class_labels=torch.tensor([0, 1, 2]))
    guided = fd.guide.cfg(den, scale=4.0)  # the null class of the checkpoint is the negative
    return den.images(fd.sample(guided, fd.plan("dpmpp-2m", den, nfe=8), seeds=range(3)))


if __name__ == "__main__":
    print(main(sys.argv[1]).shape)
