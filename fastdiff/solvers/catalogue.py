"""Every solver: one entry each. `tests/solvers` finds them here and measures what they state."""

from __future__ import annotations

from typing import Any

from .dpmpp import build_2s_ancestral, build_blocks, build_multistep, build_multistep_sde, build_sde, build_singlestep
from .few_step import build_consistency, build_lcm, build_tcd
from .first_order import build_ddim, build_ddpm, build_euler, build_euler_ancestral
from .heun import build_heun
from .info import Counting, Options, entry
from .langevin import annealed_counts, build_annealed_langevin, build_predictor_corrector, correcting_counts
from .linear import (
    build_dpm_singlestep,
    build_exponential,
    build_gradient_estimation,
    build_ipndm,
    build_lms,
    build_plms,
    build_pndm,
)
from .runge_kutta import build_dpm2, build_dpm2_ancestral, build_rk4, fast_counts
from .sde import build_er_sde, build_euler_maruyama, build_restart, restart_counts
from .shared import call_counts
from .unipc import build_sa, build_unipc

# Calls of the first steps with start="rk", by order: a step of order k - 1 where the earlier evaluations are too few for it
RK = {1: (), 2: (), 3: (2,), 4: (3, 3)}
LANGEVIN = "Langevin steps sample a level for as long as they run: their bias depends on their size, not on the grid's"
FEW_STEP = "a distilled model's own process, which changes with the number of steps"


def _fast(
    calls: int | None, steps: int | None, from_zero: bool, to_zero: bool, options: Options
) -> tuple[tuple[int, ...], Options]:
    if calls is None:
        return call_counts(3, None, steps, from_zero, to_zero), options
    return fast_counts(calls, from_zero, to_zero), options


def _evaluated_again(
    calls: int | None, steps: int | None, from_zero: bool, to_zero: bool, options: Options
) -> tuple[tuple[int, ...], Options]:
    """PECE: two calls at every node but the first, which nothing led to."""
    return call_counts(2, calls, steps, True, False), options


def _multistep(k: int, **fields: Any) -> dict[str, Any]:
    return {"bind": {"order": k, **fields}, "full_order": k, "first": RK[k]}


def _two_calls(**fields: Any) -> dict[str, Any]:
    return {"nfe_per_step": 2, "inner_points": True, **fields}


_FAST: Counting = _fast
_PECE: Counting = _evaluated_again

FIRST_ORDER = [
    entry("ddim", build_ddim, 1, "Song et al. 2020", grid="uniform_t",
          aliases=("DDIMScheduler", "dpmpp-1m", "dpmpp-1s", "dpm-solver-1")),
    entry("ddpm", build_ddpm, 1, "Ho et al. 2020", grid="uniform_t", stochastic=True, aliases=("DDPMScheduler",)),
    entry("euler", build_euler, 1, "Karras et al. 2022, alg. 2", aliases=("EulerDiscreteScheduler",)),
    entry("euler-ancestral", build_euler_ancestral, 1, "k-diffusion", stochastic=True,
          aliases=("euler_a", "EulerAncestralDiscreteScheduler")),
]  # fmt: skip
ONE_STEP = [
    entry("heun", build_heun, 2, "Karras et al. 2022, alg. 1", nfe_per_step=2, aliases=("edm", "HeunDiscreteScheduler")),
    entry("dpm-2", build_dpm2, 2, "Lu et al. 2022a; k-diffusion", **_two_calls(grid="uniform_t"),
          aliases=("dpm_2", "dpm2", "midpoint", "dpm-solver-2s", "KDPM2DiscreteScheduler")),
    entry("rk4", build_rk4, 4, "Kutta 1901", nfe_per_step=4, inner_points=True),
    entry("dpm-solver-3s", build_dpm_singlestep, 3, "Lu et al. 2022a", bind={"order": 3, "name": "dpm-solver-3s"},
          nfe_per_step=3, inner_points=True, grid="beta"),
    entry("dpm-fast", build_dpm_singlestep, 3, "Lu et al. 2022a, sec. 3.4", bind={"order": 3, "name": "dpm-fast"},
          nfe_per_step=3, inner_points=True, grid="beta", counting=_FAST, aliases=("dpm_fast", "dpm-solver-fast")),
    entry("dpmpp-2s", build_singlestep, 2, "Lu et al. 2022b", bind={"order": 2}, **_two_calls(grid="uniform_lambda"),
          aliases=("dpm++2s", "dpmpp_2s")),
    entry("dpmpp-3s", build_singlestep, 3, "Lu et al. 2022b", bind={"order": 3}, nfe_per_step=3, inner_points=True,
          grid="uniform_lambda", aliases=("dpm++3s", "dpmpp_3s")),
]  # fmt: skip
MULTISTEP = [
    *(entry(f"dpmpp-{k}s-grid", build_blocks, 2, "Lu et al. 2022b; diffusers", bind={"order": k}, grid="uniform_t",
            aliases=("DPMSolverSinglestepScheduler",) if k == 2 else ()) for k in (2, 3)),
    entry("dpmpp-2m", build_multistep, 2, "Lu et al. 2022b", **_multistep(2, second="midpoint", published=False, name="dpmpp"),
          grid="uniform_lambda", aliases=("dpm++2m", "dpmpp_2m")),
    entry("dpmpp-3m", build_multistep, 2, "Lu et al. 2022b, corrected",
          **_multistep(3, second="midpoint", published=False, name="dpmpp"), grid="uniform_t", aliases=("dpm++3m", "dpmpp_3m")),
    entry("dpmpp-3m-compat", build_multistep, 2, "Lu et al. 2022b, as published", grid="uniform_t",
          **_multistep(3, second="midpoint", published=True, name="dpmpp") | {"full_order": 2}),
    *(entry(f"unipc-{k}", build_unipc, min(k + 1, 3), "Zhao et al. 2023", bind={"order": k}, grid="uniform_t", full_order=k + 1,
            first={3: (3,), 4: (4, 4)}.get(k, ()), aliases=("unipc",) if k == 2 else ())
      for k in (1, 2, 3, 4)),
    *(entry(f"res-{k}m", build_multistep, 2, "Zhang et al. 2023, RES", grid="uniform_lambda",
            **_multistep(k, second="exact", published=False, name="res"), aliases=("res_multistep",) if k == 2 else ())
      for k in (2, 3)),
    *(entry(f"lms-{k}", build_lms, min(k, 2), "k-diffusion", **_multistep(k), grid="beta", aliases=("lms",) if k == 4 else ())
      for k in (1, 2, 3, 4)),
    *(entry(f"ipndm-{k}", build_ipndm, min(k, 2), "Zhang and Chen 2022", **_multistep(k) | {"full_order": min(k, 2)}, grid="beta",
            aliases=("ipndm",) if k == 4 else ()) for k in (1, 2, 3, 4)),
    entry("plms", build_plms, 2, "Liu et al. 2022", first=(2,), starts_so=True, full_order=2),
    entry("pndm", build_pndm, 2, "Liu et al. 2022, alg. 2", first=(4, 4, 4), starts_so=True, full_order=2),
    *(entry(f"deis-tab-{k}", build_exponential, min(k, 2), "Zhang and Chen 2022", grid="uniform_t",
            **_multistep(k, coordinate="t", second="exact", name="deis-tab-{}"), aliases=("deis-tab",) if k == 3 else ())
      for k in (1, 2, 3, 4)),
    *(entry(f"deis-log-rho-{k}", build_exponential, min(k, 2), "Zhang and Chen 2022", grid="uniform_t",
            **_multistep(k, coordinate="lam", second="exact", name="deis-log-rho-{}"), aliases=("deis",) if k == 3 else ())
      for k in (1, 2, 3)),
    *(entry(f"dpm-solver-{k}m", build_exponential, 2, "Lu et al. 2022a", grid="uniform_lambda",
            **_multistep(k, coordinate="lam", second="midpoint", name="dpm-solver-{}m")) for k in (2, 3)),
    entry("gradient-estimation", build_gradient_estimation, 1, "Permenter and Yuan 2024", grid="beta",
          aliases=("gradient_estimation",)),
]  # fmt: skip
STOCHASTIC = [
    entry("dpm-2-ancestral", build_dpm2_ancestral, 2, "k-diffusion", **_two_calls(stochastic=True),
          aliases=("dpm_2_ancestral", "dpm2_a", "KDPM2AncestralDiscreteScheduler")),
    entry("dpmpp-2s-ancestral", build_2s_ancestral, 2, "k-diffusion", **_two_calls(stochastic=True),
          aliases=("dpmpp_2s_ancestral", "dpm++2s_a")),
    entry("dpmpp-sde", build_sde, 2, "k-diffusion", **_two_calls(stochastic=True),
          aliases=("dpmpp_sde", "DPMSolverSDEScheduler")),
    *(entry(f"dpmpp-{k}m-sde", build_multistep_sde, 2, "Lu et al. 2022b; k-diffusion", stochastic=True,
            bind={"order": k, "published": False} | ({"second": "exact"} if k == 3 else {}), aliases=(f"dpmpp_{k}m_sde",))
      for k in (2, 3)),
    entry("dpmpp-3m-sde-compat", build_multistep_sde, 2, "k-diffusion, as published", stochastic=True,
          bind={"order": 3, "published": True, "second": "exact"}),
    entry("sa-solver", build_sa, 2, "Xue et al. 2023", stochastic=True, bind={"name": "sa-solver"}, grid="uniform_t",
          aliases=("sa_solver", "SASolverScheduler")),
    entry("sa-solver-pece", build_sa, 2, "Xue et al. 2023", stochastic=True, bind={"name": "sa-solver-pece"}, nfe_per_step=2,
          grid="uniform_t", counting=_PECE, aliases=("sa_solver_pece",)),
    *(entry(f"er-sde-{k}", build_er_sde, min(k, 2), "Cui et al. 2023", stochastic=True, bind={"order": k, "published": False},
            aliases=("er_sde",) if k == 3 else ()) for k in (1, 2, 3)),
    entry("er-sde-3-compat", build_er_sde, 2, "Cui et al. 2023, as published", stochastic=True,
          bind={"order": 3, "published": True}),
    entry("euler-maruyama", build_euler_maruyama, 1, "Song et al. 2021", stochastic=True, grid="uniform_t"),
    entry("restart", build_restart, 2, "Xu et al. 2023", stochastic=True, nfe_per_step=2, counting=restart_counts),
    entry("predictor-corrector", build_predictor_corrector, 0, "Song et al. 2021, alg. 2-5", stochastic=True, nfe_per_step=2,
          grid="uniform_t", counting=correcting_counts, why_no_order=LANGEVIN, aliases=("pc",)),
    entry("annealed-langevin", build_annealed_langevin, 0, "Song and Ermon 2019", stochastic=True, nfe_per_step=3,
          counting=annealed_counts, why_no_order=LANGEVIN, aliases=("ncsn", "ald")),
]  # fmt: skip
DISTILLED = [
    entry("lcm", build_lcm, 0, "Luo et al. 2023", stochastic=True, grid="uniform_t", why_no_order=FEW_STEP,
          aliases=("LCMScheduler",)),
    entry("tcd", build_tcd, 0, "Zheng et al. 2024", stochastic=True, grid="uniform_t", why_no_order=FEW_STEP,
          aliases=("TCDScheduler",)),
    entry("consistency", build_consistency, 0, "Song et al. 2023", stochastic=True, why_no_order=FEW_STEP,
          aliases=("CMStochasticIterativeScheduler",)),
]  # fmt: skip
SOLVERS = [*FIRST_ORDER, *ONE_STEP, *MULTISTEP, *STOCHASTIC, *DISTILLED]
