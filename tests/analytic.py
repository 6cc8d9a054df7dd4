"""Closed-form problems, and the table of a plan read literally: the independent references of the engine's tests.

Everything is float64 numpy unless a name says torch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp

from fastdiff import reference


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians in one dimension, elementwise; one component is Gaussian data."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def denoise(self, y, alpha, sigma):
        """E[x0 | y] at the level (alpha, sigma), in numpy."""
        flat = np.asarray(y, np.float64).reshape(1, -1)
        w, m, s = (np.array(v)[:, None] for v in (self.weights, self.means, self.stds))
        var = alpha**2 * s**2 + sigma**2
        log_r = np.log(w) - 0.5 * np.log(var) - 0.5 * (flat - alpha * m) ** 2 / var
        r = np.exp(log_r - log_r.max(0))
        return ((r / r.sum(0)) * (m + alpha * s**2 / var * (flat - alpha * m))).sum(0).reshape(np.shape(y))

    def denoise_torch(self, y, alpha, sigma):
        """The same in torch: alpha and sigma floats, or tensors that broadcast against y."""
        total, top = 0.0, 0.0
        logs, means = [], []
        for w, m, s in zip(self.weights, self.means, self.stds, strict=True):
            var = torch.as_tensor(alpha**2 * s**2 + sigma**2, dtype=y.dtype)
            logs.append(math.log(w) - 0.5 * var.log() - 0.5 * (y - alpha * m) ** 2 / var)
            means.append(m + alpha * s**2 / var * (y - alpha * m))
        peak = logs[0]
        for log in logs[1:]:
            peak = torch.maximum(peak, log)
        for log, mean in zip(logs, means, strict=True):
            r = (log - peak).exp()
            total, top = total + r, top + r * mean
        return top / total

    def network(self, schedule):
        """(x, t) -> x0 in torch, t a float or a (B,) tensor: a denoiser, or a network of prediction "x0"."""

        def call(x, t, **_):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            if isinstance(t, torch.Tensor):
                ones = (1,) * (x.ndim - 1)
                alpha, sigma = (torch.as_tensor(v).to(x.dtype).view(-1, *ones) for v in (alpha, sigma))
            return self.denoise_torch(x, alpha, sigma)

        return call

    def std(self, alpha, sigma):
        """Standard deviation of the noisy data (one component only)."""
        (s,) = self.stds
        return math.sqrt(alpha**2 * s**2 + sigma**2)

    def flow(self, start, level, end):
        """The probability-flow ODE from `level` to `end`: closed for one component, DOP853 to about 1e-13 for more."""
        if len(self.means) == 1:
            scale = self.std(*end) / self.std(*level)
            return end[0] * self.means[0] + scale * (np.asarray(start) - level[0] * self.means[0])

        def slope(phi, y):  # in the angle of the variance-preserving form
            a, s = math.cos(phi), math.sin(phi)
            x0 = self.denoise(y, a, s)
            return a * (y - a * x0) / s - s * x0

        span = [math.atan2(sigma, alpha) for alpha, sigma in (level, end)]
        y = np.asarray(start) / math.hypot(*level)
        return solve_ivp(slope, span, y, method="DOP853", rtol=3e-14, atol=1e-15).y[:, -1] * math.hypot(*end)


GAUSSIAN = Mixture((1.0,), (0.4,), (0.6,))
BIMODAL = Mixture((0.35, 0.65), (-1.0, 0.8), (0.3, 0.5))


def interpret(plan, denoise, start, noises=()):
    """Every point that a row evaluates, and the result: the reference executor, its denoiser called as `(y, alpha, sigma)`."""
    return reference.run(plan, lambda y, row: denoise(y, row.alpha, row.sigma), start, noises)


def result(plan, denoise, start, noises=()):
    """The last point of `interpret`."""
    return interpret(plan, denoise, start, noises)[-1]
