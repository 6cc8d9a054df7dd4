"""EDM's networks. NVIDIA's pickles first: fastdiff convert edm-cifar10-32x32-uncond-vp.pkl --trust-pickle"""

import sys

import torch

import fastdiff as fd


def main(path: str) -> torch.Tensor:
    den = fd.load(path)
    if den.num_classes:
        den = den.bind(class_labels=torch.arange(2) % den.num_classes)
    return den.images(fd.sample(den, fd.plan("heun", den, nfe=9, grid="karras"), seeds=range(2)))


if __name__ == "__main__":
    print(main(sys.argv[1]).shape)
