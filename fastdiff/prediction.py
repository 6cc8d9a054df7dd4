"""What a network predicts, as four scalars: D = c_skip*x + c_out*F(c_in*x, c_noise) with x = alpha*x0 + sigma*eps.

Every prediction type enters here and nowhere else; solvers see the denoised prediction D alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args
from typing import Literal as L

from .errors import FastdiffError
from .schedule import namespace

Prediction = L["eps", "x0", "v", "flow", "score", "edm", "both"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)
Level = Any  # float, or a tensor that broadcasts against x


class Coefficients(NamedTuple):
    c_in: Level
    c_skip: Level
    c_out: Level


def check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise FastdiffError(f"unknown prediction {prediction!r}; allowed: {', '.join(PREDICTIONS)}")


def coefficients(prediction: str, alpha: Level, sigma: Level, sigma_data: float = 0.5) -> Coefficients:
    """The scalars that turn the network's output F into D.

    eps and score divide by alpha and are undefined at alpha = 0; all others stay finite there and at sigma = 0.
    v: Salimans and Ho 2022, appendix D; edm: Karras et al. 2022, table 1, for any (alpha, sigma) through sigma/alpha.
    both: an x0 and an eps, twice the channels, of which `joined` makes a v.
    """
    if prediction == "eps":
        return Coefficients(1.0, 1 / alpha, -sigma / alpha)
    if prediction == "score":
        return Coefficients(1.0, 1 / alpha, sigma**2 / alpha)
    if prediction in ("v", "both"):
        norm = alpha**2 + sigma**2  # 1 for a variance-preserving schedule
        return Coefficients(1.0, alpha / norm, -sigma / norm)
    if prediction == "flow":
        return Coefficients(1.0, 1 / (alpha + sigma), -sigma / (alpha + sigma))
    if prediction == "edm":
        norm = sigma**2 + (alpha * sigma_data) ** 2
        root = namespace(norm).sqrt(norm)
        return Coefficients(1 / root, alpha * sigma_data**2 / norm, sigma * sigma_data / root)
    check_prediction(prediction)
    return Coefficients(1.0, 0.0, 1.0)  # x0


def target(prediction: str, x0: Level, eps: Level, alpha: Level, sigma: Level, sigma_data: float = 0.5) -> Level:
    """The output F for which D = x0 exactly: what the network is trained to return; of "both" what `joined` makes of it."""
    if prediction == "eps":
        return eps
    if prediction == "score":
        return -eps / sigma
    if prediction in ("v", "both"):
        return alpha * eps - sigma * x0
    if prediction == "flow":
        return eps - x0
    if prediction == "edm":
        c = coefficients("edm", alpha, sigma, sigma_data)
        return (x0 - c.c_skip * (alpha * x0 + sigma * eps)) / c.c_out
    check_prediction(prediction)
    return x0


def joined(x0: Level, eps: Level, c: Coefficients) -> Level:
    """The v = alpha eps - sigma x0 of a network that predicts both (Salimans and Ho 2022, section 4), `c` being its coefficients:
    c_skip = alpha/n and c_out = -sigma/n with n = alpha^2 + sigma^2 give alpha and sigma back.

    D is then the paper's (sigma^2 x0 + alpha^2 (x - sigma eps)/alpha)/n: x0 counts where there is noise, eps where there is
    little, and nothing is divided by alpha.
    """
    return (eps * c.c_skip + x0 * c.c_out) / (c.c_skip**2 + c.c_out**2)
