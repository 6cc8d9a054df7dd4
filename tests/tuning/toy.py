"""A flow that bends, with pairs from 400 steps: small enough to tune in a test."""

import torch

import fastdiff as fd
from fastdiff.bench.cells import Setup
from fastdiff.tuning import Pairs

SCHEDULE = fd.schedule.vp_cosine()


class Mixture(fd.Denoiser):
    """Two narrow modes in each of 6 dimensions."""

    def __init__(self):
        super().__init__(lambda x, t: x, SCHEDULE, "x0", shape=(6,))

    def __call__(self, x, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        a, s = (f(t).to(x.dtype).view(-1, 1) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
        m, v = 0.8, 0.01
        total = a**2 * v + s**2
        centre = m * torch.tanh(a * m * x / total)
        return centre + a * v / total * (x - a * centre)


class Frozen(Mixture):
    """The same without gradients, as an engine would be."""

    def __call__(self, x, t):
        with torch.no_grad():
            return super().__call__(x, t)


def pairs(den, n, first):
    noise = fd.noise.normal(range(first, first + n), 0, 6)
    return Pairs(noise, fd.sample(den, fd.plan("dpmpp-2m", den, 400, grid="uniform_lambda"), noise=noise), Setup(n, first), den)
