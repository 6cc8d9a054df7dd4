"""A text-to-image folder of diffusers (Stable Diffusion, SDXL, SD3, Flux, PixArt): prompts, guidance, latents decoded."""

import sys

import torch

import fastdiff as fd


def main(path: str, prompts: tuple[str, ...] = ("a cat", "a dog")) -> torch.Tensor:
    den = fd.load(path)
    guided = fd.guide.cfg(den, scale=5.0, cond=den.encode(prompts), negative=den.encode([""]))
    plan = fd.plan("dpmpp-2m", den, nfe=10, grid="karras" if den.schedule.name != "flow" else "uniform_t")
    return den.images(fd.sample(guided, plan, seeds=range(len(prompts))))


if __name__ == "__main__":
    print(main(sys.argv[1]).shape)
