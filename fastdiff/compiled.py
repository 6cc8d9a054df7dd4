"""The whole loop as one graph: a module for torch.export, and an executor through torch.compile."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .errors import FastdiffError
from .noise import stacked
from .plans import Plan
from .sampling import DenoiserLike, Executor, prepared, run

# else torch counts the graphs of all samplers together, and the ninth plan or shape of a process is an error (torch < 2.13)
ISOLATED: dict[str, Any] = dict.fromkeys({"isolate_recompiles"} & set(inspect.signature(torch.compile).parameters), True)


def not_compiled(error: Exception) -> FastdiffError:
    """What to say of a failure of torch.compile: its own errors, a missing C++ compiler among them, share no base."""
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    return FastdiffError(f"torch.compile failed ({why}): leave out --compile")


class Sampler(nn.Module):
    """A denoiser and a plan as a module that `torch.compile(fullgraph=True)` and `torch.export` take whole: the loop unrolls,
    the weights are its constants, the networks its submodules.

    Conditions are those bound now. Guidance by gradients does not go with it: torch traces no torch.autograd.grad.
    """

    def __init__(self, denoiser: DenoiserLike, plan: Plan | None = None) -> None:
        super().__init__()
        self.denoiser, self.plan = prepared(denoiser, plan)
        leaves = self.denoiser.leaves if isinstance(self.denoiser, Denoiser) else ()
        networks = {id(leaf.network): leaf.network for leaf in leaves if isinstance(leaf.network, nn.Module)}
        self.networks = nn.ModuleList(networks.values())
        # what a trace must find ready: the registers, and what the denoiser computes for each time on the host
        self.program, self.draws = self.plan.program, self.plan.draws
        for step in self.program.steps:
            if step.call and isinstance(self.denoiser, Denoiser):
                self.denoiser.choices(step.t)
                for leaf in leaves:
                    leaf.level(step.t)

    def forward(self, x: Tensor, noises: Tensor | None = None) -> Tensor:
        """The sample (B, *shape) from the start state x and the plan's draws, noises (draws, B, *shape), both of x's dtype.

        Raises:
            FastdiffError: another number of noises than the plan draws.
        """
        given = 0 if noises is None else noises.shape[0]
        if given != self.draws:
            raise FastdiffError(f"plan {self.plan.name} draws {self.draws} noises; given {given}")
        return run(self.denoiser, self.program, x, None if noises is None else stacked(noises))


class Compiled(Executor):
    """What `compile` returns."""

    def __init__(self, denoiser: DenoiserLike, plan: Plan | None = None, **options: Any) -> None:
        super().__init__(denoiser, plan)
        self.sampler = torch.compile(Sampler(denoiser, self.plan), fullgraph=True, **{**ISOLATED, **options})

    def execute(self, x: Tensor, noises: Tensor) -> Tensor:
        return self.sampler(x, noises)


def compile(denoiser: DenoiserLike, plan: Plan | None = None, **options: Any) -> Compiled:
    """`sample` with the whole loop, network calls included, as one graph of torch.compile: call it as `sample`, without
    denoiser and plan.

    The network is inlined once for every call of the plan, so compiling takes longer with each: it pays for few calls of a small
    network; else `denoiser.compiled()` compiles the network once. `options` are torch.compile's (backend=, mode=, dynamic=).

    Raises:
        FastdiffError: no plan.
        torch._dynamo.exc.Unsupported: a network that cannot be traced in one graph; torch says where.
    """
    return Compiled(denoiser, plan, **options)
