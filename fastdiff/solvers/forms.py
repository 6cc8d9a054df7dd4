"""What a family of solvers interpolates between its evaluations, in which coordinate, and against which measure.

A form turns evaluations at some nodes into the weights of a step from a to b: x_b = w x_a + sum_j w_j entry_j + noise. All
families are the same two loops (one-step and multistep) over a form, and all weights are integrals of Lagrange polynomials
(`coeffs`): no formula is typed per order. With one node every form is the exact step for a constant prediction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..coeffs import divided_difference, exponential_integrals, lagrange_integrals
from ..grid import Node, node_at, node_at_lam
from ..plans import X0_ENTRY
from ..schedule import NoiseSchedule
from .shared import carry, eps_entry, gain

Stored = tuple[tuple[float, float], ...]

# Adams-Bashforth for equal steps, by order (Liu et al. 2022, PNDM, eq. 12; Zhang and Chen 2022, DEIS, appendix B)
ADAMS_BASHFORTH = {
    1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}  # fmt: skip


class Form(ABC):
    """The base of all forms: denoised predictions, no noise."""

    to_clean = False  # whether a step to sigma = 0 may interpolate: not where the coordinate is infinite there

    def store(self, node: Node) -> Stored:
        """What an evaluation at `node` keeps."""
        return X0_ENTRY

    @abstractmethod
    def weights(self, nodes: Sequence[Node], a: Node, b: Node) -> tuple[float, list[float]]:
        """Weight on the base at a, and on the entries kept at `nodes`, newest first."""

    def noise(self, a: Node, b: Node) -> float:
        """Standard deviation of the fresh noise of a step from a to b."""
        return 0.0

    def inner(self, schedule: NoiseSchedule, a: Node, b: Node, r: float) -> Node:
        """The node a fraction r of the way from a to b in the form's coordinate."""
        return node_at_lam(schedule, a.lam + r * (b.lam - a.lam))

    def middle(self, schedule: NoiseSchedule, a: Node, b: Node) -> Node:
        """The node halfway in the coordinate whose measure is uniform, where classical Runge-Kutta methods apply: alpha/sigma."""
        return node_at_lam(schedule, math.log((math.exp(a.lam) + math.exp(b.lam)) / 2))


@dataclass(frozen=True)
class Denoised(Form):
    """D in the log-SNR: exponential integrators (DPM-Solver++), with the noise of SDE-DPM-Solver++ and SA-Solver for eta > 0.

    `second` "midpoint" is the papers' second-order step, the slope of D with gain*h/2 in place of its exact integral, and
    "linear" SA-Solver's and UniPC-bh1's with alpha (1 + eta) h^2/2 (all differ by O(h^3)). `published` is the third-order step
    as published, with half the weight on the second difference: it measures order 2.
    """

    eta: float = 0.0
    second: str = "exact"
    published: bool = False

    def weights(self, nodes: Sequence[Node], a: Node, b: Node) -> tuple[float, list[float]]:
        ratio = a.alpha * b.sigma / (a.sigma * b.alpha)  # e^-h
        kept = carry(a, b) * ratio**self.eta if self.eta else carry(a, b)
        total = b.alpha * (1 - ratio ** (1 + self.eta)) if self.eta else gain(a, b)
        if len(nodes) == 1 or b.sigma == 0.0:
            return kept, [total]
        h = b.lam - a.lam
        if len(nodes) == 2 and self.second != "exact" and a in nodes:
            part = h / (nodes[0].lam - nodes[1].lam) if math.isfinite(h) else 1.0  # from alpha = 0: halves of both
            size = total if self.second == "midpoint" or math.isinf(h) else b.alpha * (1 + self.eta) * h
            slope = size * part / 2
            newer, older = (total, 0.0) if nodes[0] == a else (0.0, total)
            return kept, [newer + slope, older - slope]
        lams = [n.lam for n in nodes]
        exact = [b.alpha * w for w in exponential_integrals(lams, a.lam, b.lam, self.eta)]
        if len(nodes) == 3 and self.published:
            # integral of (lam - a.lam)^2: Lagrange through (0, h, 2h) holds polynomials up to degree 2 exactly
            at = exponential_integrals([0.0, h, 2 * h], 0.0, h, self.eta)
            half = b.alpha * sum(w * x * x for w, x in zip(at, (0.0, h, 2 * h), strict=True)) / 2
            return kept, [w - half * d for w, d in zip(exact, divided_difference(lams), strict=True)]
        return kept, exact

    def noise(self, a: Node, b: Node) -> float:
        ratio = a.alpha * b.sigma / (a.sigma * b.alpha)
        return b.sigma * math.sqrt(max(1 - ratio ** (2 * self.eta), 0.0)) if self.eta else 0.0


@dataclass(frozen=True)
class Noise(Form):
    """eps against d(sigma/alpha), interpolated in sigma/alpha ("u": linear multistep, rhoAB), in the log-SNR ("lam": DEIS's
    log-rho, DPM-Solver) or in the schedule's own time ("t": DEIS's tAB); or with the weights of equal steps ("equal": PNDM).

    `second` "midpoint" is DPM-Solver's own second-order step, as in `Denoised`.
    """

    schedule: NoiseSchedule
    coordinate: str
    second: str = "exact"

    @property
    def to_clean(self) -> bool:  # type: ignore[override]
        return self.coordinate in ("u", "equal")

    def store(self, node: Node) -> Stored:
        return eps_entry(node)

    def weights(self, nodes: Sequence[Node], a: Node, b: Node) -> tuple[float, list[float]]:
        if a.alpha == 0.0:  # eps holds no prediction there: the step for a constant D
            return carry(a, b), [gain(a, b)]
        step = b.sigma - b.alpha * a.u
        return b.alpha / a.alpha, [step * s for s in self._shares(nodes, a, b)]

    def _shares(self, nodes: Sequence[Node], a: Node, b: Node) -> Sequence[float]:
        """Weights on eps as parts of u_b - u_a; they sum to 1."""
        if len(nodes) == 1:
            return [1.0]
        if self.coordinate == "equal":
            return ADAMS_BASHFORTH[len(nodes)]
        if self.coordinate == "u":
            return [w / (b.u - a.u) for w in lagrange_integrals([n.u for n in nodes], a.u, b.u)]
        if len(nodes) == 2 and self.second == "midpoint" and nodes[0] == a:
            slope = (b.lam - a.lam) / 2 / (nodes[0].lam - nodes[1].lam)
            return [1 + slope, -slope]
        size = -math.expm1(a.lam - b.lam)

        def measure(lam: np.ndarray) -> Any:  # du as a part of u_b - u_a
            return np.exp(a.lam - lam) / size

        if self.coordinate == "lam":
            return lagrange_integrals([n.lam for n in nodes], a.lam, b.lam, measure)
        times = [n.t for n in nodes]
        return lagrange_integrals(times, a.lam, b.lam, measure, lambda lam: np.asarray(self.schedule.t_of_lam(lam)))

    def inner(self, schedule: NoiseSchedule, a: Node, b: Node, r: float) -> Node:
        if self.coordinate == "lam":
            return super().inner(schedule, a, b, r)
        if self.coordinate == "t":
            return node_at(schedule, a.t + r * (b.t - a.t))
        return node_at_lam(schedule, -math.log(a.u + r * (b.u - a.u)))

    def middle(self, schedule: NoiseSchedule, a: Node, b: Node) -> Node:
        return node_at_lam(schedule, -math.log((a.u + b.u) / 2))


@dataclass(frozen=True)
class ExtendedReverse(Form):
    """D in sigma/alpha for the extended reverse-time SDE (Cui et al. 2023, ER-SDE-Solver, eq. 21-23), with the noise function
    phi(u) = u (e^(u^0.3) + 10) that they recommend.

    x_b/alpha_b = r x_a/alpha_a + integral of D d(phi_b/phi(u)) + noise, r = phi_b/phi_a. `published` takes the backward
    difference for the derivative in the third-order step, which leaves out half of what the second difference says.
    """

    published: bool = False

    def weights(self, nodes: Sequence[Node], a: Node, b: Node) -> tuple[float, list[float]]:
        kept = carry(a, b) * _damping(a, b)
        total = b.alpha - kept * a.alpha
        if len(nodes) == 1 or b.sigma == 0.0:
            return kept, [total]
        us = [n.u for n in nodes]
        exact = self._integrals(us, a, b)
        if len(nodes) == 3 and self.published:
            moment = -self._integrals(us[:2], a, b)[1] * (us[0] - us[1])  # the integral of u - u_a
            missing = (us[0] - us[1]) * moment
            exact = [w - missing * d for w, d in zip(exact, divided_difference(us), strict=True)]
        return kept, exact

    def _integrals(self, us: Sequence[float], a: Node, b: Node) -> list[float]:
        """alpha_b times the integrals of the Lagrange basis on `us` against d(phi_b/phi), in log u, where phi is tame."""

        def measure(v: np.ndarray) -> Any:
            p = np.exp(0.3 * v)
            slope = 1 + 0.3 * p / (1 + 10 * np.exp(-p))  # d log phi/d log u
            grown = (1 + 10 * math.exp(-(b.u**0.3))) / (1 + 10 * np.exp(-p)) * np.exp(b.u**0.3 - p)
            return -b.alpha * slope * grown * np.exp(math.log(b.u) - v)

        return lagrange_integrals(us, math.log(a.u), math.log(b.u), measure, np.exp)

    def noise(self, a: Node, b: Node) -> float:
        return b.sigma * math.sqrt(max(1 - _damping(a, b) ** 2, 0.0))


def _damping(a: Node, b: Node) -> float:
    """phi_b u_a/(phi_a u_b) = (e^(u_b^0.3) + 10)/(e^(u_a^0.3) + 10): 0 from alpha = 0."""
    pa, pb = a.u**0.3, b.u**0.3
    return 0.0 if math.isinf(pa) else math.exp(pb - pa) * (1 + 10 * math.exp(-pb)) / (1 + 10 * math.exp(-pa))
