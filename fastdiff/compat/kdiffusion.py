"""The k-diffusion seat: every solver as `sample_xxx(model, x, sigmas, extra_args, callback, disable)`; its models as Denoisers.

    from fastdiff.compat.kdiffusion import sample_unipc_2       # any name of fd.list_solvers(), or an alias
    x = sample_unipc_2(model, x, sigmas, extra_args={"cond": c})

This is what ComfyUI and A1111 call a sampler function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..grid import Grid, Node
from ..plans import Plan
from ..sampling import run
from ..schedule import NoiseSchedule, flow, ve
from ..solvers import plan as make_plan
from ..solvers.names import resolve

Model = Callable[..., Tensor]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Report = Callable[[dict[str, Any]], None]


def __getattr__(name: str) -> Any:
    """`sample_<solver>`, with the solver's name or alias as k-diffusion would spell it."""
    if name.startswith("sample_"):
        try:
            return sampler(name.removeprefix("sample_"))
        except FastdiffError as e:
            raise AttributeError(str(e)) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def sampler(solver: str, **options: Any) -> Callable[..., Tensor]:
    """The sampler function of a solver with its options bound.

    Raises:
        FastdiffError: an unknown solver or option.
    """
    info, preset = resolve(solver)
    bound = {**preset.options, **options}
    if unknown := set(bound) - set(info.options):
        raise FastdiffError(f"solver {info.name} has no option {', '.join(sorted(unknown))}; it takes "
                            f"{', '.join(info.options) or 'none'}")  # fmt: skip

    def sample(
        model: Model, x: Tensor, sigmas: Sequence[float] | Tensor, extra_args: dict[str, Any] | None = None,
        callback: Report | None = None, disable: bool | None = None, noise_sampler: NoiseSampler | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        """k-diffusion's arguments: x (B, ...) at sigmas[0]; sigmas falling, the last 0 or a level to stop at; `more`: the
        solver's options. Returns the sample, in x's dtype."""
        return _sample(info.name, {**bound, **more}, model, x, sigmas, extra_args or {}, callback, disable, noise_sampler)

    sample.__name__ = sample.__qualname__ = "sample_" + info.name.replace("-", "_")
    return sample


@torch.no_grad()
def _sample(
    solver: str, options: dict[str, Any], model: Model, x: Tensor, sigmas: Sequence[float] | Tensor, extra_args: dict[str, Any],
    callback: Report | None, disable: bool | None, noise_sampler: NoiseSampler | None,
) -> Tensor:  # fmt: skip
    levels = [float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    if len(levels) < 2:
        return x  # nothing to do, as k-diffusion's loops have it
    plan = plan_of(solver, levels, is_flow(model), **options)
    state = x if x.dtype == torch.float64 else x.float()
    call = itertools.count()
    own = _own_calls(plan, levels)
    intervals = [row.draw if isinstance(row.draw, tuple) else (row.t, row.t) for row in plan.rows if row.draw is not None]
    intervals = [(levels[0], levels[0])] * len(plan.first.z) + intervals

    with _progress(len(levels) - 1, disable) as advance:

        def denoiser(y: Tensor, sigma: float) -> Tensor:
            d = model(y.to(x.dtype), y.new_full((len(y),), sigma, dtype=x.dtype), **extra_args)
            i = own.get(next(call))
            if i is not None:
                advance()
                if callback is not None:
                    level = y.new_tensor(sigma)
                    callback({"x": y.to(x.dtype), "i": i, "sigma": level, "sigma_hat": level, "denoised": d})
            return d.to(state.dtype)

        def noise(draw: int, shape: Sequence[int], device: torch.device) -> Tensor:
            if noise_sampler is None:
                return torch.randn(tuple(shape), device=device, dtype=x.dtype)
            high, low = intervals[draw - 1]
            return noise_sampler(x.new_tensor(high), x.new_tensor(low))

        return run(denoiser, plan, state, noise).to(x.dtype)


def _own_calls(plan: Plan, sigmas: Sequence[float]) -> dict[int, int]:
    """Which calls begin a step, and which step: the last at each given level. Inner points and corrections report nothing."""
    last = {row.t: k for k, row in enumerate(row for row in plan.rows if row.calls)}
    return {last[s]: i for i, s in enumerate(sigmas[:-1]) if s in last}


def plan_of(solver: str, sigmas: Sequence[float], rectified: bool = False, **options: Any) -> Plan:
    """A solver's table on the levels x0 + sigma*eps, or (1 - sigma)*x0 + sigma*eps of a rectified flow."""
    schedule: NoiseSchedule
    if rectified:
        schedule = flow()
    else:
        low = min((s for s in sigmas if s > 0), default=0.0)
        schedule = ve(low / 2, 2 * max(sigmas)) if low else ve()  # inner points lie between, churn above
    nodes = [Node(0.0, 1.0, 0.0) if s == 0 else Node(s, 1.0 - s if rectified else 1.0, s) for s in sigmas]
    grid = Grid(tuple(nodes), "sigmas")
    return make_plan(solver, schedule, steps=grid.steps, grid=grid, end="zero" if grid.ends_clean else "sigma_min", **options)


def is_flow(model: Any) -> bool:
    """Whether a ComfyUI model is a rectified flow: its `model_sampling`, somewhere below, is of their class CONST."""
    while model is not None:
        kind = getattr(model, "model_sampling", None)
        if kind is not None:
            return any(c.__name__ == "CONST" for c in type(kind).__mro__)
        model = getattr(model, "inner_model", None)
    return False


def denoiser(
    model: Model, shape: Sequence[int] | None = None, sigma_min: float | None = None, sigma_max: float | None = None,
) -> Denoiser:  # fmt: skip
    """A k-diffusion model, `model(x, sigma, **extra_args) -> denoised` with x = x0 + sigma*eps, as a Denoiser. Its extra
    arguments are bound: `.bind(cond=...)`.

    sigma_min and sigma_max default to the model's own.

    Raises:
        FastdiffError: a model that does not tell its range.
    """
    low = sigma_min if sigma_min is not None else getattr(model, "sigma_min", None)
    high = sigma_max if sigma_max is not None else getattr(model, "sigma_max", None)
    if low is None or high is None:
        raise FastdiffError(f"{type(model).__name__} does not tell its sigma_min and sigma_max: give them")
    if is_flow(model):
        return Denoiser(model, flow(), prediction="x0", shape=shape)
    return Denoiser(model, ve(float(low), float(high)), prediction="x0", shape=shape)


@contextmanager
def _progress(total: int, disable: bool | None) -> Iterator[Callable[[], None]]:
    """A progress bar for `disable` None or False, as k-diffusion has it; the body calls what it gets once a step."""
    if disable:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda: bar.advance(task)
