"""Stable Diffusion in one file (.safetensors or .ckpt): U-Net and autoencoder; the text conditions come from where you like.

On the command line: `fastdiff sample sd.safetensors --condition text.safetensors --guidance 5`.
"""

import sys

import torch

import fastdiff as fd


def main(path: str, text: torch.Tensor, shape: tuple[int, int, int] | None = None) -> torch.Tensor:
    den = fd.load(path, shape=shape)  # a v2 file has to say what it predicts: config={"prediction": "v"}
    guided = fd.guide.cfg(den, 5.0, cond={"encoder_hidden_states": text}, negative={"encoder_hidden_states": 0 * text})
    return den.images(fd.sample(guided, fd.plan("dpmpp-2m", den, nfe=8), seeds=range(len(text))))


if __name__ == "__main__":
    print(main(sys.argv[1], torch.load(sys.argv[2], weights_only=True)).shape)
