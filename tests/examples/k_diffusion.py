"""A model of k-diffusion's train.py (.pth) or convert_for_inference.py (.safetensors); needs `pip install k-diffusion`."""

import sys

import torch

import fastdiff as fd


def main(path: str) -> torch.Tensor:
    den = fd.load(path)  # configuration, averaged weights and sigma_data are in the file
    if den.num_classes:
        den = den.bind(class_labels=torch.arange(2) % den.num_classes)
    return den.images(fd.sample(den, fd.plan("dpmpp-2m", den, nfe=8, grid="karras"), seeds=range(2)))


if __name__ == "__main__":
    print(main(sys.argv[1]).shape)
