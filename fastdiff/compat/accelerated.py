"""`fd.accelerate`: a diffusers pipeline with a fast solver in its scheduler's seat, and a report that can undo it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import ops, patching
from ..errors import FastdiffError
from ..plans import Plan
from ..solvers.registry import FEW, FEW_CALLS, MANY_CALLS
from .need import need_diffusers

DISTILLED = ("LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler", "FlowMatchLCMScheduler")  # no ODE to solve
NETWORKS = ("unet", "transformer", "prior")  # what the network of a diffusion pipeline is called


@dataclass
class Report:
    """What `accelerate` did to `pipe`. `steps` is the num_inference_steps to call it with."""

    pipe: Any
    before: Any
    steps: int
    lines: tuple[str, ...]
    patches: tuple[patching.Report, ...] = ()

    def undo(self) -> None:
        """Puts the pipeline's own scheduler back, the very object, and undoes the patches."""
        self.pipe.scheduler = self.before
        for patched in self.patches:
            patched.undo()

    def __str__(self) -> str:
        return "\n".join(self.lines)


def accelerate(
    pipe: Any, nfe: int = 8, *, solver: str | None = None, grid: str | None = None, plan: Plan | None = None,
    guidance: float | None = None, quiet: bool = False,
) -> Report:  # fmt: skip
    """Puts a solver for `nfe` network evaluations into a diffusers pipeline's scheduler seat, fused kernels into its network and
    autoencoder where they run (`fd.patch`), and prints what it did.

    Args:
        pipe: a pipeline with a scheduler and a denoising network.
        nfe: evaluations of an image; one with classifier-free guidance is one, though it holds two samples.
        solver, grid: instead of the choice made here: up to 10 calls iPNDM-3 on a beta grid, else UniPC-2 uniform in time
            (benches/results/full, on the shipped pixel model); karras where the model's time is sigma; for a flow model UniPC-2
            on the pipeline's own shifted times; where the pipeline's scheduler is for distilled networks, that.
        plan: a table tuned for this pipeline's network, instead.
        guidance: the scale that the pipeline will be called with, 1 where it has none: a plan in `plans/` of the folder that the
            pipeline was loaded from is then taken, where it was tuned for these weights, this budget and this scale.
        quiet: prints nothing.

    Raises:
        FastdiffError: no diffusion pipeline, a scheduler that tells no schedule, a plan for another schedule or budget.
    """
    need_diffusers()
    from .diffusers_scheduler import DiffusersScheduler

    before = getattr(pipe, "scheduler", None)
    network = next((n for n in NETWORKS if getattr(pipe, n, None) is not None), None)
    if before is None or network is None or not hasattr(before, "config"):
        name = type(pipe).__name__
        raise FastdiffError(f"{name} is no diffusion pipeline: it needs a scheduler and one of {', '.join(NETWORKS)}")
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
        raise FastdiffError(f"nfe must be a whole number of at least 1; given {nfe!r}")
    if plan is None and guidance is not None and (solver, grid) == (None, None):
        plan = _tuned(pipe, nfe, guidance)
    if plan is not None:
        seat = DiffusersScheduler.from_config(before.config, plan=plan)
        nfe, chosen = plan.nfe, f"plan {plan.name}"
    else:
        base = DiffusersScheduler.from_config(before.config, solver="ddim").seat
        solver, grid = _choice(base.config["_class_name"], base.schedule(0.0).name, nfe, solver, grid)
        seat = DiffusersScheduler.from_config(before.config, solver=solver, grid=grid)
        chosen = f"solver {solver}, {f'grid {grid}' if grid else 'on the times that the pipeline or the solver asks for'}"
    seat.set_timesteps(nfe, mu=0.0 if before.config.get("use_dynamic_shifting") else None)  # whether it can be made at all
    if (calls := len(seat.timesteps)) != nfe:
        raise FastdiffError(f"{solver} takes {calls} calls in {nfe} steps: give a solver of one call a step")
    pipe.scheduler = seat
    patches, kernels = _patched(pipe, network)
    report = Report(pipe, before, nfe, (
        f"scheduler: {type(before).__name__} -> {chosen}",
        f"network: {network}, predicts {seat.seat.prediction}",
        f"kernels: {kernels}",
        f"call the pipeline with num_inference_steps={nfe}: {nfe} evaluations an image; undo() restores",
    ), patches)  # fmt: skip
    if not quiet:
        print(report)
    return report


def _patched(pipe: Any, network: str) -> tuple[tuple[patching.Report, ...], str]:
    """The patches of a pipeline's networks and what to say of them; none where the kernels do not run."""
    parts = {name: getattr(pipe, name, None) for name in (network, "vae")}
    if why := ops.why_torch(torch.device(pipe.device)):
        return (), f"torch's ({why})"
    made = {name: patching.patch(part) for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    said = [f"{len(r.sites)} sites of {name} fused, {len(r.left)} left" for name, r in made.items()]
    return tuple(made.values()), ", ".join(said)


def _tuned(pipe: Any, nfe: int, guidance: float) -> Plan | None:
    """The plan beside the pipeline's files that was tuned for its weights, this budget and guidance."""
    from ..checkpoints import PLANS, load

    folder = Path(str(pipe.config.get("_name_or_path") or ""))
    if not (folder / PLANS).is_dir():
        return None
    return load(folder).tuned_plan(nfe, guidance)


def _choice(own: str, kind: str, nfe: int, solver: str | None, grid: str | None) -> tuple[str, str | None]:
    """Solver and grid for a pipeline's scheduler class, its schedule's family and a budget, where they are not given."""
    if solver is None and own in DISTILLED:
        return own, grid
    if solver is not None or kind == "flow":
        return solver or MANY_CALLS, grid
    best = FEW_CALLS if nfe <= FEW else MANY_CALLS
    return best, grid or ("karras" if kind == "edm" else "beta" if best == FEW_CALLS else "uniform_t")
