"""The integrals behind every solver's weights, one routine for every order.

A multistep or Runge-Kutta weight is the integral of a Lagrange polynomial against a known function: 1 for methods in
sigma/alpha (linear multistep), exp for methods in the log-SNR (exponential integrators). Formulas typed per order are how
published solvers diverge, and in float32 they cancel: phi_3 loses 42 % of its value at h = 0.001. Gauss-Legendre quadrature in
float64 has neither fault: 64 nodes integrate all that occurs here to rounding, whatever the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def lagrange_integrals(
    nodes: Sequence[float], a: float, b: float, weight: Callable[[np.ndarray], np.ndarray] | None = None,
    coordinate: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[float]:  # fmt: skip
    """[integral from a to b of weight(x) l_j(c(x)) dx], l_j the Lagrange basis on `nodes`; weight defaults to 1, c to x."""
    points = np.asarray(nodes, np.float64)
    x = (a + b) / 2 + (b - a) / 2 * _NODES
    measure = (b - a) / 2 * _WEIGHTS * (1.0 if weight is None else weight(x))
    x = x if coordinate is None else coordinate(x)
    out = []
    for j, xj in enumerate(points):
        others = np.delete(points, j)
        basis = np.prod((x[:, None] - others) / (xj - others), axis=1)
        out.append(float(measure @ basis))
    return out


def exponential_integrals(lams: Sequence[float], start: float, end: float, eta: float = 0.0) -> list[float]:
    """[integral of k e^(k (lam - end)) l_j(lam) from start to end], k = 1 + eta: times alpha at `end`, the weights on denoised
    predictions at log-SNRs `lams` (Lu et al. 2022, DPM-Solver++, eq. 9; with noise, Xue et al. 2023, SA-Solver, eq. 14).
    They sum to 1 - e^(k (start - end))."""
    k = 1.0 + eta
    return lagrange_integrals(lams, start, end, lambda lam: k * np.exp(k * (lam - end)))


def divided_difference(x: Sequence[float]) -> list[float]:
    """Weights of the divided difference f[x_0, ..., x_n] on the values f(x_j)."""
    points = np.asarray(x, np.float64)
    return [float(1 / np.prod(xj - np.delete(points, j))) for j, xj in enumerate(points)]
