"""The scheduler seat of diffusers pipelines; imports diffusers, so `fastdiff.compat` loads this file when it is asked for.

    pipe.scheduler = fd.compat.DiffusersScheduler.from_config(pipe.scheduler.config, solver="unipc-2")
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import BaseOutput
from torch import Tensor

from ..errors import FastdiffError
from ..guide.limits import dynamic_threshold
from ..noise import from_torch
from ..plans import Plan
from ..solvers.names import resolve
from .diffusers_classes import CLASSES, class_of
from .diffusers_refused import why_not
from .diffusers_run import Run
from .diffusers_seat import Seat

OWN = "fastdiff"  # the key of our own entries in a saved config
DEFAULTS = "_use_default_values"  # where diffusers notes which entries nobody set; it leaves that out of files


@dataclass
class SchedulerOutput(BaseOutput):
    """`prev_sample`: the point that the next call evaluates; `pred_original_sample`: this call's denoised prediction."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class DiffusersScheduler(SchedulerMixin, ConfigMixin):
    """A plan in the scheduler's place of a diffusers pipeline; every call of the network is one `step`.

    Latents are the model's own noisy state alpha*x0 + sigma*eps. State belongs to the thread and to the run that
    `set_timesteps` begins, and follows the sample's device.
    """

    def __init__(self, seat: Seat, config: Mapping[str, Any]) -> None:
        self.seat = seat
        self._local = threading.local()
        self._internal_dict: Any = FrozenDict(config)

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, *, solver: str | None = None,
        grid: str | Sequence[float] | None = None, plan: Plan | None = None, grid_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """The seat for a pipeline whose scheduler has this config.

        Args:
            config: `pipe.scheduler.config`, of any class that tells a noise schedule; or one that this class saved.
            solver: a name of `fd.list_solvers()` or an alias; a scheduler class of diffusers without `grid` reproduces that
                class, spacing and all. Default: the config's own class.
            grid, grid_options: as in `fd.plan`, for a solver's name; default the solver's recommended grid.
            plan: a finished table instead; the pipeline is then called with num_inference_steps=plan.nfe.
            options: the solver's own (eta, ...), or entries of the config to change (use_karras_sigmas, ...).

        Raises:
            FastdiffError: a config that describes no diffusion model, an unknown name or option, a plan and a solver at once.
        """
        base = dict(config) if isinstance(config, Mapping) else {}
        saved = base.pop(OWN, None)
        base["_class_name"] = class_of(base)
        if saved:
            base["_class_name"], base[DEFAULTS] = saved["base"], saved["defaults"]
            if solver is None and plan is None and grid is None:
                solver, grid, grid_options = saved["solver"], saved["grid"], saved["grid_options"]
                options = {**saved["options"], **options}
                plan = Plan.from_json(saved["plan"]) if saved["plan"] else None
        if plan is not None and (solver, grid, options) != (None, None, {}):
            raise FastdiffError("give plan= alone, or solver= with grid= and options")
        solver = solver if solver is not None or plan is not None else base["_class_name"]
        if solver is not None and grid is None and solver.endswith("Scheduler") and solver not in CLASSES:
            raise FastdiffError(why_not(solver))
        changed, own = _split(base, solver, options)
        # what a config holds by default only gives way to the defaults of another class; what is given here does not
        base |= {**changed, DEFAULTS: [k for k in base.get(DEFAULTS, ()) if k not in changed]}
        seat = Seat(base, solver, grid, dict(grid_options or {}), own, plan)
        seat.schedule(0.0 if base.get("use_dynamic_shifting") else None)  # says at once where there is none
        kept = {
            "base": base["_class_name"], "defaults": base[DEFAULTS], "solver": solver, "options": own,
            "grid": grid if grid is None or isinstance(grid, str) else list(grid), "grid_options": seat.grid_options,
            "plan": plan.to_json() if plan is not None else None,
        }  # fmt: skip
        made = cls(seat, {**base, OWN: kept, "_class_name": cls.__name__})
        return (made, {}) if return_unused_kwargs else made

    def __deepcopy__(self, memo: dict[int, Any]) -> DiffusersScheduler:
        return type(self).from_config(self.config)

    def __reduce__(self) -> Any:
        return type(self).from_config, (dict(self.config),)

    # ------------------------------------------------------------------ a run

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None, mu: float | None = None,
    ) -> None:  # fmt: skip
        """Begins a run of this thread: a number of grid intervals, or custom timesteps or sigmas; `mu` is a dynamic shift."""
        self._local.run = Run(self.seat.prepare(num_inference_steps, timesteps, sigmas, mu), self.seat, device)

    @property
    def run(self) -> Run:
        run = getattr(self._local, "run", None)
        if run is None:
            raise FastdiffError("call set_timesteps first, in the thread that samples")
        return run

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts the run at entry `begin_index` of `timesteps` (image-to-image): the solver starts afresh there.

        Raises:
            FastdiffError: no step is left, or no step of the solver begins there.
        """
        self.run.begin(int(begin_index))
        self.run.begin_index = int(begin_index)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network receives: the sample itself, but for EDM's preconditioning."""
        if self.seat.prediction != "edm":
            return sample
        run = self.run
        return sample * run.coefficients[0 if run.stepper.finished else run.index][0]

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None, return_dict: bool = True,
        eta: float | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """One call of the network -> the point that the next one evaluates, in the sample's dtype; without `return_dict` a
        tuple of it and the denoised prediction. `eta` is what pipelines pass on for DDIMScheduler and TCDScheduler."""
        run = self.run
        i = run.expect(timestep)
        if eta != run.eta and i == run.first:
            run.use_eta(eta)
        stepper = run.stepper
        y = stepper.point(sample)
        v = None
        if model_output.shape != sample.shape and model_output.shape[1] == 2 * sample.shape[1]:
            model_output, v = model_output.chunk(2, dim=1)  # learned variance
        elif stepper.plan.learned_variance:
            raise FastdiffError("this plan needs learned variance: a network that returns twice the channels of its input")
        _, skip, out = run.coefficients[i]
        f = model_output if model_output.dtype == y.dtype else model_output.to(y.dtype)
        d = (y * skip).add_(f, alpha=out) if skip else f * out
        x0 = self._limited(d, y, run.values[i])
        if x0 is not d:
            d = x0 + (x0 - d) * run.raw_noise[i] if run.raw_noise else x0

        def draw() -> Tensor:
            return from_torch(generator)(0, y.shape, y.device).to(y.dtype)

        if run.idle_draw[i]:
            draw()
        after = stepper.step(y, (d, None if v is None else v.to(y.dtype)), draw, sample.dtype)
        return SchedulerOutput(prev_sample=after, pred_original_sample=x0.to(sample.dtype)) if return_dict else (after, x0)

    def _limited(self, d: Tensor, y: Tensor, timestep: float) -> Tensor:
        """The prediction inside the limits that the config asks for; and a consistency model's own boundary condition."""
        c = self.seat.settings
        if c.get("thresholding"):
            d = dynamic_threshold(d, c["dynamic_thresholding_ratio"], c["sample_max_value"])
        elif c.get("clip_sample") or c.get("clip_denoised"):
            most = c.get("clip_sample_range", 1.0)
            d = d.clamp(-most, most)
        if c["_class_name"] == "LCMScheduler":
            scaled = (timestep * c["timestep_scaling"]) ** 2  # sigma_data 0.5 (Luo et al. 2023, appendix)
            d = d * math.sqrt(scaled / (scaled + 0.25)) + y * (0.25 / (scaled + 0.25))
        return d

    # ------------------------------------------------------------------ what pipelines read

    @property
    def timesteps(self) -> Tensor:
        """What the network is told at each call of the run; before a run, the class's own list."""
        run = getattr(self._local, "run", None)
        return run.timesteps if run is not None else self.seat.peer.timesteps

    @property
    def sigmas(self) -> Tensor:
        """sigma/alpha at each call and at the end, float32; sigma itself for a flow model, as diffusers counts them."""
        run = self.run
        flow = run.prepared.schedule.name == "flow"
        levels = [*run.levels, run.prepared.plan.end]
        return torch.tensor([s if flow else s / a if a else math.inf for a, s in levels], dtype=torch.float32)

    @property
    def init_noise_sigma(self) -> float:
        """What multiplies unit noise at the start of the run."""
        run = getattr(self._local, "run", None)
        if run is not None:
            return run.prepared.init
        schedule = self.seat.schedule(0.0)
        return float(schedule.sigma(schedule.t_max))

    @property
    def order(self) -> int:
        """Calls of a whole step: entry k of the grid is entry k * order of `timesteps`."""
        run = getattr(self._local, "run", None)
        if run is not None:
            return run.prepared.order
        name = self.seat.solver
        return 1 if not name or name in CLASSES else resolve(name)[0].nfe_per_step

    @property
    def num_inference_steps(self) -> int | None:
        run = getattr(self._local, "run", None)
        return None if run is None else len(run.values)

    @property
    def step_index(self) -> int | None:
        run = getattr(self._local, "run", None)
        return None if run is None or run.stepper.done == 0 else run.index

    @property
    def begin_index(self) -> int | None:
        run = getattr(self._local, "run", None)
        return None if run is None else run.begin_index

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 of a discrete-time model, as its own scheduler class computes it."""
        return self.seat.peer.alphas_cumprod

    def __len__(self) -> int:
        return int(self.seat.settings["num_train_timesteps"])

    # ------------------------------------------------------------------ noise on images

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha*x0 + sigma*noise at timesteps (B,) or (1,): a call's own level where it is one of the run's, else the model's."""
        alpha, sigma = self._levels(timesteps.to(original_samples.device).flatten())
        ones = (1,) * (original_samples.ndim - 1)
        x = original_samples.float() * alpha.view(-1, *ones) + noise.float() * sigma.view(-1, *ones)
        return x.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the order of arguments that flow pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) float32 alpha and sigma; no value is read on the host."""
        t = timesteps.double() / self.seat.time_scale
        run = getattr(self._local, "run", None)
        schedule = run.prepared.schedule if run is not None else self.seat.schedule(0.0)
        t = torch.exp(t) if self.seat.prediction == "edm" else t
        alpha, sigma = (torch.as_tensor(v).expand_as(t).float() for v in (schedule.alpha(t), schedule.sigma(t)))
        if run is None:
            return alpha, sigma
        hit = timesteps[:, None].float() == run.timesteps.to(timesteps.device)[None].float()
        own = torch.tensor(run.levels, device=timesteps.device)[hit.int().argmax(dim=1)]
        found = hit.any(dim=1)
        return torch.where(found, own[:, 0], alpha), torch.where(found, own[:, 1], sigma)


def _split(base: dict[str, Any], solver: str | None, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments: entries of the config that change, and the solver's own options."""
    import inspect

    import diffusers

    names = {base["_class_name"], solver} & set(dir(diffusers))
    known = {p for n in names for p in inspect.signature(getattr(diffusers, n).__init__).parameters} - {"self"}
    changed = {k: v for k, v in options.items() if k in known}
    own = {k: v for k, v in options.items() if k not in known}
    if own:
        takes = resolve(solver)[0].options if solver else {}
        if unknown := set(own) - set(takes):
            raise FastdiffError(f"unknown option {', '.join(sorted(unknown))}: {solver} takes {', '.join(takes) or 'none'}, the "
                                f"config {', '.join(sorted(known))}")  # fmt: skip
    return changed, own
