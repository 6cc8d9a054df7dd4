"""fastdiff's own checkpoints: a .safetensors, a run's folder, an exported engine, or the shipped model by its name."""

import sys

import torch

import fastdiff as fd


def main(path: str = "fashion-mnist") -> torch.Tensor:
    den = fd.load(path)
    den = den.bind(class_labels=torch.arange(4) % den.num_classes)
    guided = fd.guide.cfg(den, scale=2.0)  # against the class "none", which label dropout has trained
    return den.images(fd.sample(guided, fd.plan("auto", guided, nfe=8), seeds=range(4)))  # a tuned plan where there is one


if __name__ == "__main__":
    print(main(*sys.argv[1:]).shape)
