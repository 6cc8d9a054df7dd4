"""A network in a bare .onnx file: its graph says shapes, and nothing of noise; that is said here, or in a .json beside it."""

import sys

import torch

import fastdiff as fd


def main(path: str) -> torch.Tensor:
    den = fd.load(path, config={"schedule": "vp_linear", "prediction": "eps", "time_scale": 999, "data_range": [-1, 1]})
    return den.images(fd.sample(den, fd.plan("unipc-2", den, nfe=8), seeds=range(2)))


if __name__ == "__main__":
    print(main(sys.argv[1]).shape)
