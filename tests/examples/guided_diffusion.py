"""A .pt of guided-diffusion or improved-diffusion, with the flags that its repository's README gives for it."""

import sys

import torch

import fastdiff as fd


def main(path: str, flags: str) -> torch.Tensor:
    den = fd.load(path, config={"flags": flags})  # or the same flags in a .json beside the file
    if den.num_classes:
        den = den.bind(class_labels=torch.arange(2) % den.num_classes)
    return den.images(fd.sample(den, fd.plan("unipc-2", den, nfe=8), seeds=range(2)))


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2]).shape)
