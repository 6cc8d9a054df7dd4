"""The eager executor: runs a plan's table on a denoiser. It knows nothing of solvers and reads no tensor's value."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import fused
from .brownian import shared_path
from .errors import FastdiffError, NonFiniteError
from .noise import NoiseSource, check_seeds, from_seeds, of_learned_strength
from .plans import Plan
from .program import Program, Step, Terms
from .scalars import Factor, factors, itself

DenoiserLike = Callable[[Tensor, Any], Tensor]
Callback = Callable[[int, Tensor], None]
Predicted = tuple[Tensor | None, Tensor | None]  # the denoised prediction, and the variance output where a row asks for it
POINT = -1  # the register of the point where the next row evaluates


@torch.no_grad()
def sample(
    denoiser: DenoiserLike,
    plan: Plan | None = None,
    noise: Tensor | NoiseSource | None = None,
    *,
    seeds: Sequence[int] | None = None,
    start: Tensor | None = None,
    brownian: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Samples in the model's own data range, (B, *shape), of the state's dtype.

    Args:
        denoiser: a Denoiser, or any callable (x, t) -> x0.
        plan: the table to run; default the one the checkpoint ships with (`denoiser.plan`).
        noise: unit start noise (B, *shape), scaled by the plan's starting sigma; or a NoiseSource for start and draws alike.
        seeds: one whole number a sample, for start and draws; the shape is the denoiser's. May go with `noise` or `start`.
        start: the model's own noisy state at the plan's start level, instead of noise.
        brownian: the draws of an SDE solver are increments of one Brownian path a seed, the same at any number of steps.
        dtype: of the state, whatever the network's.
        callback: called with (row index, the point the next row evaluates) after every row.

    Raises:
        FastdiffError: nothing or too much to start from, a wrong shape, draws without a source.
        NonFiniteError: the network returned NaN or infinity (which row and time).
    """
    denoiser, plan = prepared(denoiser, plan)

    def loop(x: Tensor, source: NoiseSource | None) -> Tensor:
        return run(denoiser, plan, x, source, callback)

    return _sample_by(loop, denoiser, plan, noise, seeds, start, brownian, dtype, device)


def prepared(denoiser: DenoiserLike, plan: Plan | None) -> tuple[DenoiserLike, Plan]:
    """The plan, by default the denoiser's own, and the denoiser as it runs that plan."""
    plan = plan if plan is not None else getattr(denoiser, "plan", None)
    if plan is None:
        raise FastdiffError("no plan given, and the checkpoint ships with none: make one with fd.plan(solver, denoiser, nfe=...)")
    return denoiser.told_of(plan) if hasattr(denoiser, "told_of") else denoiser, plan


class Executor(ABC):
    """A denoiser and a plan made ready for many runs: called as `sample`, without the two."""

    device: torch.device | None = None  # where the states are made; None: as `sample` does

    def __init__(self, denoiser: DenoiserLike, plan: Plan | None = None) -> None:
        self.denoiser, self.plan = prepared(denoiser, plan)

    @torch.no_grad()
    def __call__(
        self, noise: Tensor | NoiseSource | None = None, *, seeds: Sequence[int] | None = None, start: Tensor | None = None,
        brownian: bool = False, dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # fmt: skip
        """Samples (B, *shape); arguments and errors as for `sample`."""
        return _sample_by(self._loop, self.denoiser, self.plan, noise, seeds, start, brownian, dtype, self.device)

    def _loop(self, x: Tensor, source: NoiseSource | None) -> Tensor:
        noises = x.new_empty((self.plan.draws, *x.shape))
        for k in range(self.plan.draws):
            assert source is not None
            noises[k] = source(1 + k, x.shape, x.device)
        return self.execute(x, noises)

    @abstractmethod
    def execute(self, x: Tensor, noises: Tensor) -> Tensor:
        """The sample, from the start state x (B, *shape) and all draws of the plan, (draws, B, *shape)."""


def _sample_by(
    loop: Callable[[Tensor, NoiseSource | None], Tensor], denoiser: DenoiserLike, plan: Plan,
    noise: Tensor | NoiseSource | None, seeds: Sequence[int] | None, start: Tensor | None, brownian: bool,
    dtype: torch.dtype, device: torch.device | str | None,
) -> Tensor:  # fmt: skip
    """What every executor does before and after its loop."""
    state, source = begin(denoiser, plan, noise, seeds, start, dtype, device)
    if brownian:
        if seeds is None:
            raise FastdiffError("a Brownian path belongs to a seed: give seeds= with brownian=True")
        source = shared_path(seeds, plan)
    with naming_conditions(denoiser, len(state)):
        result = loop(state, source)
    # the one host sync, after the loop; the sum is 30 us cheaper than looking at each value, which a non-finite one then gets
    if not math.isfinite(result.sum()) and not bool(result.isfinite().all()):
        _explain(denoiser, plan, state, source)
    return result


@contextmanager
def naming_conditions(denoiser: DenoiserLike, batch: int) -> Iterator[None]:
    """Where a network fails whose conditions are neither one a sample nor one for all, the error names them."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, FastdiffError) as e:
        bound = denoiser.bound() if hasattr(denoiser, "bound") else ()
        counts = {name: len(v) for name, v in bound if isinstance(v, Tensor) and v.ndim and len(v) not in (1, batch)}
        if not counts:
            raise
        given = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise FastdiffError(f"{given} for a batch of {batch}: give one a sample, or one for all") from e


def begin(
    denoiser: DenoiserLike, plan: Plan, noise: Tensor | NoiseSource | None, seeds: Sequence[int] | None,
    start: Tensor | None, dtype: torch.dtype, device: torch.device | str | None,
) -> tuple[Tensor, NoiseSource | None]:  # fmt: skip
    """The starting state and the source of the plan's draws, from what the caller gave."""
    seeds = None if seeds is None else check_seeds(seeds)
    tensor, given_source = (noise, None) if isinstance(noise, Tensor) else (None, noise)
    if given_source is not None and seeds is not None:
        raise FastdiffError("give seeds= or a noise source, not both")
    if start is not None and tensor is not None:
        raise FastdiffError("give noise= (unit) or start= (the model's own noisy state), not both")
    source = from_seeds(seeds) if seeds is not None else given_source
    shape = getattr(denoiser, "shape", None)
    if start is None and tensor is None:
        if source is None:
            raise FastdiffError("nothing to start from: give seeds=, noise= or start=")
        if shape is None or seeds is None:
            raise FastdiffError("the shape of a sample is not known: give noise= or start=, or make the Denoiser with shape=")
        where = torch.device(device) if device is not None else getattr(denoiser, "device", torch.device("cpu"))
        tensor = source(0, (len(seeds), *shape), where)
    given = start if start is not None else tensor
    assert given is not None
    if shape is not None and tuple(given.shape[1:]) != tuple(shape):
        raise FastdiffError(f"a batch of shape (B, {', '.join(map(str, shape))}) is wanted; given {tuple(given.shape)}")
    if seeds is not None and len(seeds) != len(given):
        raise FastdiffError(f"{len(seeds)} seeds for a batch of {len(given)}: give one seed a sample")
    if not given.is_floating_point():
        raise FastdiffError(f"noise and start must be floating point; given {given.dtype}")
    given = given.to(device=device, dtype=dtype)
    if plan.learned_variance and not hasattr(denoiser, "with_variance"):
        raise FastdiffError(f"plan {plan.name} needs learned variance: give an fd.Denoiser of a network that has it")
    if plan.draws and source is None:
        raise FastdiffError(f"plan {plan.name} draws {plan.draws} noises: give seeds= (one a sample) or a noise source")
    return (given if start is not None else given * plan.start[1]), source


def run(
    denoiser: DenoiserLike, plan: Plan | Program, x: Tensor, source: NoiseSource | None = None, callback: Callback | None = None
) -> Tensor:
    """The loop: x is the state at the plan's start level. No host sync, no arithmetic on weights, dead history dropped. On a GPU
    a row is one op (fastdiff.fused), where the state is float32.

    Instead of a plan its program will do, for who traces the loop.
    """
    if isinstance(plan, Plan) and by_rows(x):
        return fused.run(denoiser, plan, x, source, callback)
    program = plan.program if isinstance(plan, Plan) else plan
    registers: dict[int, Any] = {0: x, POINT: x}
    shape, device, dtype = x.shape, x.device, x.dtype
    factor = factors(x) if isinstance(plan, Plan) else itself
    del x  # the state is gone as soon as no row needs it: only the registers hold it
    drawn = 0

    def draw() -> Tensor:
        nonlocal drawn
        drawn += 1
        assert source is not None
        return source(drawn, shape, device).to(dtype)

    if program.opening is not None:
        advance(registers, program.opening, (None, None), draw, factor)
    for i, step in enumerate(program.steps):
        advance(registers, step, _predict(denoiser, registers[POINT], step), draw, factor)
        if callback is not None:
            callback(i, registers[POINT])
    return registers[POINT]


def by_rows(x: Tensor) -> bool:
    """Whether a row of a state x is one op."""
    return x.is_cuda and x.dtype == torch.float32


def _predict(denoiser: DenoiserLike, y: Tensor, step: Step) -> Predicted:
    """What a row's call of the denoiser gives."""
    if step.var is not None:
        return denoiser.with_variance(y, step.t)  # type: ignore[attr-defined]
    return denoiser(y, step.t) if step.call else None, None


def advance(
    registers: dict[int, Any], step: Step, predicted: Predicted, draw: Callable[[], Tensor], factor: Factor = itself
) -> Tensor:  # fmt: skip
    """One row of a program: from the point, register POINT, and what was predicted there to the next point, put there too."""
    d, v = predicted
    del predicted
    y = registers.pop(POINT)
    for register in step.keeps:
        registers[register] = d
    for register, p, q in step.stores:
        registers[register] = _pair(y, p, d, q, factor)
    del d, y  # what no later row reads is gone before anything new is made
    if step.draw is not None:
        registers[step.draw] = draw() if v is None or step.var is None else of_learned_strength(draw(), v, *step.var)
    del v
    if step.onto:
        registers[0] = _base(registers, step, factor)
    point = registers[POINT] = _sum(registers, step.next, factor)
    if step.base is None:
        registers[0] = point
    elif step.base and not step.onto:
        registers[0] = _base(registers, step, factor)
    for r in step.free:
        del registers[r]
    return point


def _base(registers: dict[int, Any], step: Step, factor: Factor) -> Tensor:
    """The next base; in place where the last one is the executor's own, and made in the mode that this row runs in."""
    terms = step.base
    assert terms
    if step.own and registers[0].is_inference() == torch.is_inference_mode_enabled():
        return _plus(registers[0], registers, terms[1:])
    return _sum(registers, terms, factor)


def _sum(registers: dict[int, Any], terms: Terms, factor: Factor) -> Tensor:
    r, w = terms[0]
    return _plus(registers[r] * factor(w), registers, terms[1:])


def _plus(total: Tensor, registers: dict[int, Any], terms: Iterable[tuple[int, float]]) -> Tensor:
    for r, w in terms:
        total.add_(registers[r], alpha=w)
    return total


def _pair(y: Tensor, p: float | None, d: Tensor | None, q: float | None, factor: Factor) -> Tensor:
    if d is None or q is None:
        return y * factor(p)
    return d * factor(q) if p is None else (y * factor(p)).add_(d, alpha=q)


def _explain(denoiser: DenoiserLike, plan: Plan, state: Tensor, source: NoiseSource | None) -> None:
    """Runs again, looking at every prediction, to say where the first NaN or infinity came from."""
    if not bool(state.isfinite().all()):
        raise NonFiniteError("the start holds NaN or infinity")
    overflow = f"plan {plan.name} overflowed {state.dtype}, every prediction being finite: use a wider dtype="
    watched = _Watched(denoiser, len(plan.rows))

    def after(i: int, y: Tensor) -> None:
        watched.row = i + 1
        if not bool(y.isfinite().all()):
            raise NonFiniteError(overflow)

    run(watched, plan, state, source, after)
    raise NonFiniteError(overflow)


class _Watched:
    """A denoiser whose every output is looked at."""

    def __init__(self, denoiser: DenoiserLike, rows: int) -> None:
        self.denoiser, self.rows, self.row = denoiser, rows, 0

    def __call__(self, y: Tensor, t: float) -> Tensor:
        return self._checked(self.denoiser(y, t), t)

    def with_variance(self, y: Tensor, t: float) -> tuple[Tensor, Tensor]:
        d, v = self.denoiser.with_variance(y, t)  # type: ignore[attr-defined]
        return self._checked(d, t), self._checked(v, t)

    def _checked(self, d: Tensor, t: float) -> Tensor:
        bad = ~d.isfinite().flatten(1).all(dim=1)
        if bool(bad.any()):
            raise NonFiniteError(
                f"the network returned NaN or infinity at row {self.row} of {self.rows} (t = {t:g}) for {int(bad.sum())} of "
                f"{len(bad)} samples, from a finite input; check its precision and its conditioning"
            )
        return d
