"""The names that users of diffusers, k-diffusion, ComfyUI and A1111 know, resolved to a solver, a grid and options."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import FastdiffError
from .catalogue import SOLVERS
from .info import SolverInfo


@dataclass(frozen=True)
class Preset:
    """What a name stands for: the solver's own options, and a grid with its options where the name says one."""

    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    grid: str | None = None
    grid_options: dict[str, Any] = field(default_factory=dict)


# What a name of elsewhere means beyond a solver's own aliases. Where one name means different things, diffusers' class names and
# A1111's menu win over ComfyUI's.
PRESETS = {
    "DPMSolverMultistepScheduler": Preset("dpmpp-2m"), "DPMSolverMultistepInverseScheduler": Preset("dpmpp-2m"),
    "UniPCMultistepScheduler": Preset("unipc-2"),
    "DEISMultistepScheduler": Preset("deis-log-rho-2"), "LMSDiscreteScheduler": Preset("lms-4"),
    "IPNDMScheduler": Preset("ipndm-4"), "PNDMScheduler": Preset("pndm"),
    "FlowMatchEulerDiscreteScheduler": Preset("euler", grid="uniform_t"),
    "FlowMatchHeunDiscreteScheduler": Preset("heun", grid="uniform_t"),
    "FlowMatchLCMScheduler": Preset("lcm"),
    "EDMEulerScheduler": Preset("euler", grid="karras"), "EDMDPMSolverMultistepScheduler": Preset("dpmpp-2m", grid="karras"),
    "CosineDPMSolverMultistepScheduler": Preset("dpmpp-2m-sde", grid="exponential"),
    "Euler a": Preset("euler-ancestral"), "DPM2 a": Preset("dpm-2-ancestral"), "DPM++ 2S a": Preset("dpmpp-2s-ancestral"),
    "DPM++ 2M SDE Heun": Preset("dpmpp-2m-sde", {"second": "exact"}),
    "dpmpp_2m_sde_heun": Preset("dpmpp-2m-sde", {"second": "exact"}),
    "dpmpp_2m_sde_heun_gpu": Preset("dpmpp-2m-sde", {"second": "exact"}), "dpmpp_2m_sde_gpu": Preset("dpmpp-2m-sde"),
    "dpmpp_3m_sde_gpu": Preset("dpmpp-3m-sde"), "dpmpp_sde_gpu": Preset("dpmpp-sde"),
    "uni_pc": Preset("unipc-3", {"variant": "bh1"}), "uni_pc_bh2": Preset("unipc-3"),
    "ipndm_v": Preset("lms-4"), "iPNDM-v": Preset("lms-4"),
    "dpm_solver_fast": Preset("dpm-fast"), "sample_dpm_2": Preset("dpm-2"), "k_dpm_2": Preset("dpm-2"), "k_lms": Preset("lms-4"),
}  # fmt: skip

# Grids as the ends of names, without separators: what ComfyUI, A1111 and diffusers call them.
GRID_SUFFIXES: dict[str, tuple[str, dict[str, Any]]] = {
    "karras": ("karras", {}), "exponential": ("exponential", {}), "polyexponential": ("polyexponential", {}),
    "sgmuniform": ("sgm_uniform", {}), "simple": ("simple", {}), "beta": ("beta", {}),
    "normal": ("uniform_t", {"spacing": "linspace"}),
    "ddimuniform": ("uniform_t", {"spacing": "leading"}), "linearquadratic": ("linear_quadratic", {}),
    "kloptimal": ("kl_optimal", {}), "cosine": ("cosine", {}), "alignyoursteps": ("ays", {}), "ays": ("ays", {}),
    "uniform": ("uniform_t", {}), "trailing": ("uniform_t", {"spacing": "trailing"}),
}  # fmt: skip


def _plain(name: str) -> str:
    """Letters, digits and nothing else: "DPM++ 2M", "dpmpp_2m" and "dpmpp-2m" are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


_BY_NAME = {info.name: info for info in SOLVERS}
_EXACT = {name.lower(): Preset(info.name) for info in SOLVERS for name in (info.name, *info.aliases)}
_EXACT |= {name.lower(): preset for name, preset in PRESETS.items()}
_PLAIN = {_plain(name): preset for name, preset in reversed(_EXACT.items())}  # the first entry of a form wins: solvers' own


def resolve(name: str) -> tuple[SolverInfo, Preset]:
    """The solver of a name, and what else the name says.

    Raises:
        FastdiffError: an unknown name; the nearest ones are offered.
    """
    preset = _EXACT.get(name.lower()) or _PLAIN.get(_plain(name)) or _with_grid(_plain(name))
    if preset is None:
        near = difflib.get_close_matches(_plain(name), _PLAIN, n=6, cutoff=0.5)
        meant = list(dict.fromkeys(_PLAIN[n].solver for n in near))[:4]
        hint = f"did you mean {', '.join(meant)}?" if meant else f"known: {', '.join(_BY_NAME)}"
        raise FastdiffError(f"unknown solver {name!r}; {hint} (`fastdiff solvers` lists all)")
    return _BY_NAME[preset.solver], preset


def _with_grid(plain: str) -> Preset | None:
    for suffix in sorted(GRID_SUFFIXES, key=len, reverse=True):
        base = _PLAIN.get(plain.removesuffix(suffix)) if plain.endswith(suffix) else None
        if base is not None:
            grid, options = GRID_SUFFIXES[suffix]
            return Preset(base.solver, base.options, grid, options)
    return None
