"""Any callable with its schedule: here one of flow matching whose time runs backwards, whose images lie in [0, 1], and which
returns a dictionary and wants an argument more."""

import torch

import fastdiff as fd


def velocity(x: torch.Tensor, t: torch.Tensor, brightness: torch.Tensor) -> dict[str, torch.Tensor]:
    """A perfect network for data that are one flat grey: it knows the noise in x. Its t is 1 at the data."""
    sigma = (1 - t).view(-1, 1, 1, 1).clamp_min(1e-6)
    noise = (x - (1 - sigma) * brightness) / sigma
    return {"velocity": brightness - noise, "other": x}


def main() -> torch.Tensor:
    den = fd.Denoiser(
        velocity, fd.schedule.flow(), prediction="flow", shape=(1, 4, 4), data_range=(0.0, 1.0), time=lambda t: 1 - t,
        output=lambda out: -out["velocity"],  # from noise to data there, from data to noise here
    ).bind(brightness=torch.full((2, 1, 1, 1), 0.7))  # fmt: skip
    return den.images(fd.sample(den, fd.plan("dpmpp-2m", den, nfe=5), seeds=[0, 1]))


if __name__ == "__main__":
    print(main())
