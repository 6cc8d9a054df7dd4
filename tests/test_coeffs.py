"""The quadrature weights against closed forms in exact rational and extended arithmetic."""

from fractions import Fraction
from math import factorial

import numpy as np
import pytest

from fastdiff.coeffs import exponential_integrals, lagrange_integrals

STEPS = (1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 10.0)


def exp_fraction(x):
    """e^x as a fraction, to 1e-40 relative: the series at x/16, raised to the 16th power."""
    small, term, total = x / 16, Fraction(1), Fraction(1)
    for k in range(1, 60):
        term = term * small / k
        total += term
        if abs(term) < Fraction(1, 10**48):
            break
    return total.limit_denominator(10**60) ** 16


def moments(h, count):
    """[integral of s^k e^(s - h) over [0, h]] for k < count, exactly: I_k = h^k - k I_(k-1)."""
    out = [1 - exp_fraction(-h)]
    for k in range(1, count):
        out.append(h**k - k * out[-1])
    return out


def basis(nodes, j):
    """Coefficients of the Lagrange polynomial of node j, constant term first, as fractions."""
    poly = [Fraction(1)]
    for m, node in enumerate(nodes):
        if m != j:
            scale = nodes[j] - node
            shifted = [Fraction(0), *poly]
            poly = [(a - node * b) / scale for a, b in zip(shifted, [*poly, Fraction(0)], strict=True)]
    return poly


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.7])
def test_exponential_weights_are_exact(order, h, ratio):
    step = Fraction(h)
    nodes = [-k * step * Fraction(ratio) for k in range(order)]  # behind the step, unequal to it
    power = moments(step, order)
    exact = [sum(c * m for c, m in zip(basis(nodes, j), power, strict=True)) for j in range(order)]
    found = exponential_integrals([float(n) for n in nodes], 0.0, h)
    # the nodes themselves are rounded to float64, once each; nothing else may cost digits
    np.testing.assert_allclose(found, [float(v) for v in exact], rtol=2e-13)


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_corrector_nodes_that_hold_the_end(order, h):
    step = Fraction(h)
    nodes = [step, *(-k * step for k in range(order - 1))]
    power = moments(step, order)
    exact = [sum(c * m for c, m in zip(basis(nodes, j), power, strict=True)) for j in range(order)]
    found = exponential_integrals([float(n) for n in nodes], 0.0, h)
    np.testing.assert_allclose(found, [float(v) for v in exact], rtol=2e-13)


@pytest.mark.parametrize("h", STEPS)
def test_phi_functions(h):
    """On nodes 0 and h the weights are h phi_2 and h (phi_1 - phi_2) of -h."""
    step = Fraction(h)
    e = exp_fraction(-step)
    phi1 = (1 - e) / step
    phi2 = (1 - phi1) / step  # integral of s e^(s-h) over [0, h], over h^2
    at_end, at_start = exponential_integrals([h, 0.0], 0.0, h)
    assert at_end == pytest.approx(float(step * phi2), rel=1e-13)
    assert at_start == pytest.approx(float(step * (phi1 - phi2)), rel=1e-13)


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_sum_to_the_whole(order, h):
    nodes = [-h * (k + 0.1 * k * k) for k in range(order)]
    weights = exponential_integrals(nodes, 0.0, h)
    assert sum(weights) == pytest.approx(-np.expm1(-h), abs=1e-14 * sum(map(abs, weights)))
    weights = lagrange_integrals(nodes, 0.0, h)
    assert sum(weights) == pytest.approx(h, abs=1e-14 * sum(map(abs, weights)))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_plain_weights_integrate_polynomials(order):
    rng = np.random.default_rng(order)
    nodes, (a, b) = np.sort(rng.uniform(-2, 3, order)), (0.3, 1.7)
    weights = np.array(lagrange_integrals(nodes, a, b))
    for degree in range(order):
        exact = (b ** (degree + 1) - a ** (degree + 1)) / (degree + 1)
        assert weights @ nodes**degree == pytest.approx(exact, abs=1e-11)


def test_equal_steps_give_adams_bashforth_and_moulton():
    published = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    for order, weights in published.items():
        np.testing.assert_allclose(lagrange_integrals([-k for k in range(order)], 0, 1), weights, rtol=1e-13)
    np.testing.assert_allclose(lagrange_integrals([1, 0, -1], 0, 1), [5 / 12, 8 / 12, -1 / 12], rtol=1e-13)


def test_direction_and_place_do_not_matter():
    there, back = lagrange_integrals([2.0, 3.0], 1.0, 4.0), lagrange_integrals([2.0, 3.0], 4.0, 1.0)
    np.testing.assert_allclose(there, [-w for w in back], rtol=1e-14)
    np.testing.assert_allclose(
        exponential_integrals([5.0, 4.0, 2.0], 5.0, 6.5), exponential_integrals([0.0, -1.0, -3.0], 0.0, 1.5), rtol=1e-13
    )


def test_exponential_reduces_to_plain_at_small_steps():
    h = 1e-9
    nodes = [0.0, -h, -2 * h]
    np.testing.assert_allclose(exponential_integrals(nodes, 0.0, h), lagrange_integrals(nodes, 0.0, h), rtol=2e-9)
    assert lagrange_integrals(nodes, 0.0, h)[0] == pytest.approx(23 / 12 * h, rel=1e-12)


def test_reference_itself():
    """The rational exponential against numpy's, and the moments against their series."""
    assert float(exp_fraction(Fraction(-3))) == pytest.approx(np.exp(-3), rel=1e-15)
    h = Fraction(1, 100)
    series = sum((-1) ** k * h ** (k + 2) / factorial(k + 2) for k in range(12))  # integral of s e^(s-h)
    assert float(moments(h, 2)[1]) == pytest.approx(float(series), rel=1e-15)
