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
    nodes: Sequence[float], a: float, b: float, weight: Callable[[np.ndarray], np.ndarray] | None = None
) -> list[float]:
    """[integral from a to b of weight(x) l_j(x) dx], l_j the Lagrange basis on `nodes`; weight defaults to 1."""
    points = np.asarray(nodes, np.float64)
    x = (a + b) / 2 + (b - a) / 2 * _NODES
    measure = (b - a) / 2 * _WEIGHTS * (1.0 if weight is None else weight(x))
    out = []
    for j, xj in enumerate(points):
        others = np.delete(points, j)
        basis = np.prod((x[:, None] - others) / (xj - others), axis=1)
        out.append(float(measure @ basis))
    return out


def exponential_integrals(lams: Sequence[float], start: float, end: float) -> list[float]:
    """[integral of e^(lam - end) l_j(lam) from start to end]: times alpha at `end`, the weights on denoised predictions at
    log-SNRs `lams` (Lu et al. 2022, DPM-Solver++, eq. 9). They sum to 1 - e^(start - end)."""
    return lagrange_integrals(lams, start, end, lambda lam: np.exp(lam - end))
